#!/usr/bin/env bash
# Lint, types, and the tests that are not marked slow.
#   ./run_tests.sh --all                  the slow ones as well, as CI does
#   ./run_tests.sh tests/config -k typo   further arguments go to pytest
if [ -z "${BASH_VERSION:-}" ]; then
    echo "run_tests.sh needs bash: use bash run_tests.sh, or ./run_tests.sh" >&2
    exit 2
fi
set -euo pipefail

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
source scripts/environment.sh
use_environment dev
marked=(-m "not slow")
if [ "${1:-}" = --all ]; then
    marked=()
    shift
fi

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Two files of tests at a time, each in one place, in the order of tests/conftest.py; one thread per process unless OMP_NUM_THREADS
# is set, since the distributed tests start several.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
    ${marked[@]+"${marked[@]}"} "$@"
