#!/usr/bin/env bash
# Trains CONFIG_FILE with torchrun; arguments override its keys:
#   ./run_train.sh --training.steps=20 --job.description="first try"
# CONFIG_FILE  the TOML                              train_configs/debug.toml
# NGPU         processes per node                    one per GPU, 2 without GPUs
# NNODES       nodes; all of them run this script    1
# RDZV_ENDPOINT, RDZV_ID  where nodes meet           MASTER_ADDR:MASTER_PORT, titan_lite
# PYTHON       interpreter that makes .venv          python3
set -euo pipefail

case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^set /{/^# /s/^# //p}' "${BASH_SOURCE[0]}"
    exit ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
use_environment base

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l
    else
        nvidia-smi -L | grep -c '^GPU'
    fi
}

CONFIG_FILE=${CONFIG_FILE:-$ROOT/train_configs/debug.toml}
NNODES=${NNODES:-1}
if has_nvidia_gpu; then
    NGPU=${NGPU:-$(count_gpus)}
else
    NGPU=${NGPU:-2}
fi

for count in "$NGPU" "$NNODES"; do
    [[ $count =~ ^[1-9][0-9]*$ ]] || { echo "NGPU and NNODES are numbers from 1 on, not '$count'" >&2; exit 2; }
done

# Mistakes in the configuration are answered here, once and at once, not by every process.
"$PYTHON" -m titan_lite.cli config "$CONFIG_FILE" --quiet --preflight \
    --world-size $((NGPU * NNODES)) -- "$@"

if ! has_nvidia_gpu; then
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
fi
if [ "$NNODES" = 1 ]; then
    rendezvous=(--standalone)
else
    endpoint=${RDZV_ENDPOINT:-${MASTER_ADDR:?set RDZV_ENDPOINT or MASTER_ADDR}:${MASTER_PORT:-29500}}
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${RDZV_ID:-titan_lite}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NGPU" \
    "${rendezvous[@]}" -m titan_lite.train "$CONFIG_FILE" "$@"
