# Sourced by run_train.sh and run_tests.sh: sets PYTHON to an interpreter that has titan_lite.
#   use_environment base   what training needs
#   use_environment dev    and what lint, types and tests need
# An active environment that has titan_lite is used as it is. Otherwise .venv is made next to this
# file's folder (in ~/.cache/titan_lite if that folder is read-only), from constraints.txt. It is updated
# only if pyproject.toml or constraints.txt changes, or if a GPU appears after the CPU build of torch was
# installed. Needs nothing but bash, coreutils and Python.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
VENV=$ROOT/.venv

has_nvidia_gpu() {
    [ "${DEVICE:-}" != cpu ] && command -v nvidia-smi >/dev/null &&
        [[ $'\n'$(nvidia-smi -L 2>/dev/null) == *$'\n'GPU\ * ]]
}

is_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python; do
        if is_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "titan_lite needs Python 3.10 or newer; set PYTHON to one" >&2
    return 1
}

# Prints the line of constraints.txt that pins torch.
torch_pin() {
    local line
    while read -r line; do
        if [[ $line == torch==* ]]; then
            echo "$line"
        fi
    done <"$ROOT/constraints.txt"
}

# On Linux the default torch wheel brings several GB of CUDA libraries. Without an NVIDIA GPU the
# CPU build is tried first: from pip's own sources, then with uv, which knows where PyTorch keeps it.
install_torch() {
    local pin cpu_build=$VENV/torch-is-cpu-build
    pin=$(torch_pin)
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
    local kind=$1 extra=""
    [ "$kind" = base ] || extra="[$kind]"
    echo "Installing titan_lite ($kind) into $VENV, once" >&2
    [ -x "$VENV/bin/pip" ] || "$(find_python)" -m venv "$VENV"
    install_torch
    if [ "$VENV" = "$ROOT/.venv" ]; then
        "$VENV/bin/pip" install --quiet --constraint "$ROOT/constraints.txt" --editable "$ROOT$extra"
    else
        # Building writes into the sources, so a copy is built; use_environment puts ROOT first.
        local copy
        copy=$(mktemp -d)
        cp -R "$ROOT/pyproject.toml" "$ROOT/README.md" "$ROOT/titan_lite" "$copy"
        "$VENV/bin/pip" install --quiet --constraint "$ROOT/constraints.txt" "$copy$extra"
        rm -rf "$copy"
    fi
    requirements >"$VENV/requirements-base"
    requirements >"$VENV/requirements-$kind"
}

requirements() {
    cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"
}

is_installed() {
    [ -e "$VENV/requirements-$1" ] && [ "$(requirements)" = "$(cat "$VENV/requirements-$1")" ] &&
        ! { [ -e "$VENV/torch-is-cpu-build" ] && has_nvidia_gpu; }
}

# Sets VENV to a folder that can be written where the checkout cannot.
find_venv() {
    if is_installed "$1" || [ -w "$ROOT" ]; then
        return
    fi
    local name cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/titan_lite
    name=$(echo "$ROOT" | cksum)
    VENV=$cache/venv-${name%% *}
    if ! mkdir -p "$cache" 2>/dev/null || ! [ -w "$cache" ]; then
        echo "Cannot create a virtual environment: neither $ROOT nor $cache is writable. Activate an" \
            "environment that has titan_lite, or set XDG_CACHE_HOME to a writable folder" >&2
        return 2
    fi
}

version_of() {
    "$1" -c 'import sys; print(sys.version)' 2>/dev/null || true
}

# Checks that an existing environment runs, and that PYTHON, if set, is of the version it was made with.
check_venv() {
    local python=$VENV/bin/python there chosen
    if ! [ -e "$python" ] && ! [ -L "$python" ]; then
        return
    fi
    if ! is_python "$python"; then
        echo "$python does not run Python 3.10 or newer: delete $VENV, and it is made again" >&2
        return 2
    fi
    there=$(version_of "$python")
    chosen=$(version_of "${PYTHON:-$python}")
    if [ "$there" != "$chosen" ]; then
        echo "PYTHON=$PYTHON is Python ${chosen%% *}, but $VENV was made with Python ${there%% *}: delete" \
            "$VENV, and it is made again with PYTHON, or unset PYTHON to use it as it is" >&2
        return 2
    fi
}

use_environment() {
    local kind=$1 needed="titan_lite" candidate
    if [ -n "${PYTHON:-}" ] && ! is_python "$PYTHON"; then
        echo "PYTHON=$PYTHON does not run Python 3.10 or newer" >&2
        return 2
    fi
    [ "$kind" = base ] || needed="titan_lite mypy pytest ruff"
    for candidate in "${PYTHON:-python3}" "${PYTHON:-python}"; do
        # Run from another folder: here, the source tree itself would be found as the package.
        if (cd / && "$candidate" -c 'import sys, importlib.metadata as m
[m.version(p) for p in sys.argv[1:]]' $needed 2>/dev/null); then
            PYTHON=$candidate
            return
        fi
    done
    find_venv "$kind"
    check_venv
    if ! is_installed "$kind"; then
        (
            # Two launches on one checkout must not install over each other.
            ! command -v flock >/dev/null || flock 9
            is_installed "$kind" || install_package "$kind"
        ) 9>"$VENV.lock"
    fi
    PYTHON=$VENV/bin/python
    if [ "$VENV" != "$ROOT/.venv" ]; then
        export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    fi
}
