#!/usr/bin/env bash
# Trains in a Slurm job of GPUS GPUs; WORK_DIR may be left out, as --work-dir of train.py. SRUN_ARGS are srun's own.
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: [GPUS=8 GPUS_PER_NODE=min(GPUS,8) CPUS_PER_TASK=5 SRUN_ARGS=] $0 PARTITION JOB_NAME CONFIG [WORK_DIR] [options of train.py]" >&2
  exit 2
fi
partition=$1 job=$2 config=$3
shift 3
if [[ $# -gt 0 && $1 != -* ]]; then
  set -- --work-dir "$@"
fi

# SRUN_ARGS, unquoted, is a list of words.
gpus=${GPUS:-8}
a_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
exec srun --partition="$partition" --job-name="$job" \
  --gres="gpu:$a_node" --ntasks="$gpus" --ntasks-per-node="$a_node" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
