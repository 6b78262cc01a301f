#!/usr/bin/env bash
#SBATCH --job-name=forge-core
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#
# One training run on one node. A job that is preempted or hits its time limit is requeued and goes on from its newest
# checkpoint, bit for bit; set training.save_steps to what you can afford to lose.
#
#   sbatch launch/slurm.sh recipe.yaml [a.b=c ...]        under SLURM
#   bash launch/slurm.sh recipe.yaml [a.b=c ...]          anywhere else: the directives above are comments
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 RECIPE [KEY=VALUE]..." >&2
  exit 2
fi

forge-core check "$@"                 # a wrong recipe fails here, before the GPU is used
exec forge-core train "$@" --resume   # from the start where there is no checkpoint yet
