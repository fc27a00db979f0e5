#!/usr/bin/env bash
# Runs the tests as other processors would, and once with load next to them. Arguments are those of
# run_tests.sh: --all for the slow tests as well, folders and options of pytest.
# Exit code 1 if any of the runs fails; the last lines name them.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

SETTINGS=(
    "OMP_NUM_THREADS=1"
    # Both: torch's own bfloat16 attention needs oneDNN's kernels to fit.
    "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE"
    "OMP_NUM_THREADS=2"
    "BESIDE_LOAD=1"
)

failed=()
for setting in "${SETTINGS[@]}"; do
    echo "== $setting"
    load=()
    if [ "$setting" = BESIDE_LOAD=1 ]; then
        for _ in $(seq "$(nproc)"); do
            (while :; do :; done) &
            load+=($!)
        done
    fi
    # shellcheck disable=SC2086  # a setting may be several variables
    env $setting ./run_tests.sh "$@" || failed+=("$setting")
    if [ ${#load[@]} -gt 0 ]; then
        kill "${load[@]}"
    fi
done

for setting in ${failed[@]+"${failed[@]}"}; do
    echo "failed: $setting" >&2
done
[ ${#failed[@]} -eq 0 ] && echo "passed under each of ${#SETTINGS[@]} settings"
