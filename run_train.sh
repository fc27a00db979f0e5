#!/usr/bin/env bash
# Trains a TOML, one process per GPU: finds the environment, and hands over to titan_lite.launch.
if [ -z "${BASH_VERSION:-}" ]; then
    echo "run_train.sh needs bash: use bash run_train.sh, or ./run_train.sh" >&2
    exit 2
fi
set -euo pipefail

for argument in "$@"; do
    [ "$argument" = -h ] || [ "$argument" = --help ] || continue
    cat <<'HELP'
Trains a TOML file; further arguments override its keys:
  ./run_train.sh my.toml --training.steps=20 --job.description="first try"
  ./run_train.sh --parallel.tp=2

Environment variables, with their defaults:
CONFIG_FILE  configuration, if none is given as an argument  train_configs/debug.toml
NGPU         processes on this node                          one per GPU, 2 without GPUs
DEVICE       "cpu" trains on the CPU although there is a GPU
NNODES       nodes; all of them run this script              1
RDZV_ENDPOINT  HOST:PORT of the first node, where all meet   MASTER_ADDR:MASTER_PORT
RDZV_ID      a name for the job, the same on all nodes       titan_lite
MAX_RESTARTS how often all processes start again, from the
             last checkpoint, after one has failed           0
PYTHON       interpreter; if it lacks titan_lite, it creates
             .venv, which is used instead                    python3

SIGTERM, SIGUSR1, SIGHUP (unless ignored, as by nohup) and Ctrl-C stop the run within two steps (three on GPUs), with a
checkpoint if checkpoint.enable is true. A second Ctrl-C ends the run at once. If the launcher is killed, the training
processes stop too.
Exit codes: 0 done, 1 failed, 2 a configuration error, or a folder or port already in use, 75 stopped with a checkpoint,
143 stopped by a signal without one, 130 ended at once by a second Ctrl-C, or by Ctrl-C before training starts.
HELP
    exit
done

ROOT=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
source "$ROOT/scripts/environment.sh"
use_environment base

export CONFIG_FILE=${CONFIG_FILE:-$ROOT/train_configs/debug.toml}
# The current folder may have one named titan_lite, such as a clone. Python 3.10 does not read the variable.
export PYTHONSAFEPATH=1
exec "$PYTHON" -c 'import sys; sys.path[:] = filter(None, sys.path)
from titan_lite.launch import main; sys.exit(main())' "$@"
