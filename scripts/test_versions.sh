#!/usr/bin/env bash
# Runs the tests under other versions than those of constraints.txt. Further arguments go to pytest.
#   scripts/test_versions.sh oldest   Python 3.10 and the lower bounds in pyproject.toml
#   scripts/test_versions.sh newest   Python 3.13 and the newest releases
# PYTHON  another interpreter. Each kind has a virtual environment, .venv-oldest and .venv-newest,
#         which is made by the first call and again after pyproject.toml changes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
oldest) python=python3.10 resolution=lowest-direct ;;
newest) python=python3.13 resolution=highest ;;
*)
    sed -n '2,/^set /{/^# /s/^# //p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
venv=.venv-$1
shift

install() {
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --resolution "$resolution" \
        "$@" --editable '.[dev,plot,sentencepiece]'
}

if ! cmp -s pyproject.toml "$venv/pyproject.toml"; then
    echo "Installing into $venv, once"
    "${PYTHON:-$python}" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet uv
    # The CPU build of torch where uv can fetch it; otherwise the default, with CUDA.
    install --torch-backend cpu 2>/dev/null || install
    cp pyproject.toml "$venv/"
fi
"$venv/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
