# Sourced by run_train.sh and run_tests.sh: sets PYTHON to an interpreter that has titan_lite.
#   use_environment base   what training needs
#   use_environment dev    and what lint, types and tests need
# An active environment that has titan_lite is used as it is. Otherwise .venv is made beside this
# file's folder, from constraints.txt, and left alone until pyproject.toml or constraints.txt
# changes, or a GPU appears where the CPU build of torch was installed.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "titan_lite needs Python 3.10 or newer; set PYTHON to one" >&2
    return 1
}

# On Linux the default torch wheel brings several GB of CUDA libraries. Without an NVIDIA GPU the
# CPU build is asked for first: of pip's own sources, then of uv, which knows where PyTorch keeps it.
install_torch() {
    local pin cpu_build=$VENV/torch-is-cpu-build
    pin=$(grep '^torch==' "$ROOT/constraints.txt")
    if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
        if "$VENV/bin/pip" install --quiet "$pin+cpu" 2>/dev/null ||
            { "$VENV/bin/pip" install --quiet uv && "$VENV/bin/uv" pip install --quiet \
                --python "$VENV/bin/python" --torch-backend cpu "$pin" 2>/dev/null; }; then
            touch "$cpu_build"
            return
        fi
        echo "No CPU build of torch was found: installing the default one, with CUDA" >&2
    elif [ -e "$cpu_build" ]; then
        "$VENV/bin/pip" uninstall --quiet --yes torch
    fi
    "$VENV/bin/pip" install --quiet "$pin"
    rm -f "$cpu_build"
}

install_package() {
    local kind=$1 package=$ROOT
    [ "$kind" = base ] || package="$ROOT[$kind]"
    echo "Installing titan_lite ($kind) into $VENV, once"
    [ -x "$VENV/bin/python" ] || "$(find_python)" -m venv "$VENV"
    install_torch
    "$VENV/bin/pip" install --quiet --constraint "$ROOT/constraints.txt" --editable "$package"
    requirements >"$VENV/requirements-base"
    requirements >"$VENV/requirements-$kind"
}

requirements() {
    cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"
}

is_installed() {
    requirements | cmp -s - "$VENV/requirements-$1" &&
        ! { [ -e "$VENV/torch-is-cpu-build" ] && has_nvidia_gpu; }
}

use_environment() {
    local kind=$1 needed="titan_lite"
    [ "$kind" = base ] || needed="titan_lite mypy pytest ruff"
    # Asked from another folder: here, the source tree itself would answer for the package.
    if (cd / && python3 -c 'import sys, importlib.metadata as m; [m.version(p) for p in sys.argv[1:]]' \
        $needed 2>/dev/null); then
        PYTHON=python3
        return
    fi
    if ! is_installed "$kind"; then
        (
            # Two launches on one checkout must not install over each other.
            ! command -v flock >/dev/null || flock 9
            is_installed "$kind" || install_package "$kind"
        ) 9>"$ROOT/.venv.lock"
    fi
    PYTHON=$VENV/bin/python
}
