#!/usr/bin/env bash
# Trains a TOML with torchrun; further arguments override its keys:
#   ./run_train.sh my.toml --training.steps=20 --job.description="first try"
# CONFIG_FILE  the TOML where none is given          train_configs/debug.toml
# NGPU         processes per node                    one per GPU, 2 without GPUs
# NNODES       nodes; all of them run this script    1
# RDZV_ENDPOINT, RDZV_ID  where nodes meet           MASTER_ADDR:MASTER_PORT, titan_lite
# MAX_RESTARTS how often torchrun starts anew after a process died: from the last checkpoint  0
# PYTHON       interpreter that makes .venv          python3
# SIGTERM and SIGUSR1 end the run after the step in hand, with a checkpoint; its exit code is then 75.
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
if [[ ${1:-} == *.toml ]]; then
    CONFIG_FILE=$1
    shift
fi
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
if [ "$NNODES" != 1 ] && [ "${MAX_RESTARTS:-0}" != 0 ]; then
    # In the former one, processes that are started anew would find the addresses of dead ones.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
# A process that stops as asked says so in this file, for torchrun not to start it again.
TITAN_LITE_EXIT_CODE_FILE=$(mktemp)
# The signals that ask to stop are for the processes: torchrun would kill them 30 s after its own.
export TITAN_LITE_EXIT_CODE_FILE PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
(
    trap '' TERM USR1
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NGPU" \
        --max-restarts "${MAX_RESTARTS:-0}" "${rendezvous[@]}" \
        -m titan_lite.train "$CONFIG_FILE" "$@"
) &
launcher=$!
stop() {
    # Asked once, the processes end between steps; asked again, torchrun ends them.
    if [ "$asked" = 0 ]; then pkill -USR1 -P "$launcher"; else kill -INT "$launcher"; fi || true
    asked=1
    waiting=1
}
asked=0
trap stop TERM USR1
trap 'waiting=1' INT
waiting=1
while [ "$waiting" = 1 ]; do
    waiting=0
    wait "$launcher" && code=0 || code=$?
done
[ ! -s "$TITAN_LITE_EXIT_CODE_FILE" ] || code=$(cat "$TITAN_LITE_EXIT_CODE_FILE")
rm -f "$TITAN_LITE_EXIT_CODE_FILE"
exit "$code"
