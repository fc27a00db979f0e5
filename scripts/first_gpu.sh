#!/usr/bin/env bash
# The first hour on a GPU: crashes, ceilings and speeds, as one table next to what was predicted.
#   scripts/first_gpu.sh [STAGE ...]   all by default: ceilings attention features tests first 1b 8b torchtitan
# OUTPUT      folder of results, outputs/first_gpu; a stage that succeeded there is not run again
# REHEARSE    1: on the CPU, with sizes so small that only the commands are tested
# WHEELS      folder of wheels to install first, for a machine without a package index
# TORCHTITAN  folder into which torchtitan is installed, by default that of the wheels or
#             outputs/torchtitan; the stage is left out where torchtitan is not there
# PYTHON      interpreter that has torch, python3
# Each stage has a time limit, and keeps what it wrote when it reaches it. The table is printed at
# the end, and written to OUTPUT/table.md after each stage; logs are next to it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

PYTHON=${PYTHON:-python3}
OUTPUT=$(realpath -m "${OUTPUT:-outputs/first_gpu}")
STAGES=" ${*:-ceilings attention features tests first 1b 8b torchtitan} "
mkdir -p "$OUTPUT"
export PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OUTPUT/inductor}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
TORCHTITAN=${TORCHTITAN:-${site:-outputs/torchtitan}}

eight=(--model.num_layers=8 --training.local_batch_size=4 --activation_checkpoint.mode=none)
sizes=() shapes=() runs=(--each 60 --limit 180) rounds=() suite=() tiny=()
if [ -n "${REHEARSE:-}" ]; then
    export DEVICE=cpu CUDA_VISIBLE_DEVICES=
    sizes=(--size 128 --copy-mb 1 --seconds 0.1)
    shapes=(--seq-len 64 --heads 4 2 --head-dim 16 --documents 1 4)
    runs=(--each 600 --limit 2000 --training.steps=4) rounds=(--warmup 1 --rounds 2 --steps 1) suite=(--limit 4000)
    tiny=(--model.num_layers=2 --model.dim=64 --model.ffn_dim=128 --training.seq_len=64
        --training.local_batch_size=1 --compile.enable=false --float8.emulate=true
        --attention.kernel=auto --parallel.fsdp_symm_mem=false)
fi

# stage NAME SECONDS MODULE ARGUMENT...
stage() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    [[ $STAGES == *" $name "* ]] || return 0
    if [ -e "$OUTPUT/$name.done" ]; then
        echo "== $name: done before" >&2
        return
    fi
    if [ -e "$OUTPUT/$name.json" ]; then
        mv --backup=numbered "$OUTPUT/$name.json" "$OUTPUT/$name.before.json"
    fi
    [ -z "${REHEARSE:-}" ] || limit=$((10 * limit))
    echo "== $name, at most $limit s" >&2
    timeout --kill-after=10 "$limit" "$PYTHON" -m "$@" >"$OUTPUT/$name.log" 2>&1 || code=$?
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) >>"$OUTPUT/stages.tsv"
    if [ "$code" = 0 ]; then
        touch "$OUTPUT/$name.done"
    else
        failed=1
        echo "$name: exit code $code" >&2
        tail -n 15 "$OUTPUT/$name.log" >&2
    fi
    "$PYTHON" -m benchmarks.first_gpu "$OUTPUT" >/dev/null
}

failed=0
stage ceilings 60 benchmarks.ceilings "${sizes[@]}" --output "$OUTPUT/ceilings.json"
stage attention 60 benchmarks.attention "${shapes[@]}" --output "$OUTPUT/attention.json"
stage features 240 benchmarks.features "${tiny[@]}" "${runs[@]}" --output "$OUTPUT/features.json"
# addopts is emptied: the options in pyproject.toml need pytest plugins that a rented machine may not have.
mapfile -t tests < <(grep -rl --include='*.py' pytest.mark.gpu tests)
stage tests 150 pytest -q -o addopts= -m gpu "${tests[@]}" --junitxml "$OUTPUT/tests.xml"
stage first 150 benchmarks.step benchmarks/configs/llama3_8b.toml --profile --rounds 3 "${rounds[@]}" \
    "${eight[@]}" --compile.enable=true "${tiny[@]}" --output "$OUTPUT/first.json"
stage 1b 735 benchmarks.h200 --only 1b --limit 600 "${suite[@]}" "${rounds[@]}" "${tiny[@]}" \
    --output "$OUTPUT/1b.json"
# Eight layers with 32,768 tokens: all of 8B on one GPU would spend 16 % of its time on work that GPUs of
# a cluster do not have.
stage 8b 570 benchmarks.h200 --only 8b "${suite[@]}" "${rounds[@]}" "${eight[@]}" "${tiny[@]}" \
    --output "$OUTPUT/8b.json"
if [ -d "$TORCHTITAN/torchtitan" ]; then
    # Both models are in the GPU's memory at once, so each has one sequence.
    stage torchtitan 400 benchmarks.beside_torchtitan benchmarks/configs/llama3_8b.toml \
        --packages "$TORCHTITAN" --nproc 1 --dtypes bfloat16 --modes compile --rounds 3 "${rounds[@]}" \
        "${eight[@]}" --training.local_batch_size=1 "${tiny[@]}" --output "$OUTPUT/torchtitan.json"
fi
[ ! -e "$OUTPUT/table.md" ] || cat "$OUTPUT/table.md"
exit "$failed"
