#!/bin/bash
# Slurm, two nodes of eight GPUs; the options below and any of sbatch's change that:
#
#   sbatch scripts/launch/slurm.sh --config qwen3_8b_to_0p6b --run /shared/runs/qwen3
#   sbatch --nodes 4 scripts/launch/slurm.sh --config qwen3_8b_to_0p6b --run /shared/runs/qwen3 --parallel.fsdp 8
#
# One task drives all GPUs of its node. Two minutes before the time limit every task is told to stop: the run is saved,
# and the same command goes on with it, on another number of nodes too. The run folder has to be one all nodes see.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${DISTILL:-$SLURM_SUBMIT_DIR}" # the repository, with its .venv
srun --kill-on-bad-exit=1 .venv/bin/python scripts/distill.py "$@"
