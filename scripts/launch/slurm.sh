#!/bin/bash
# Slurm job for two nodes of eight GPUs; change the options below, or override them on the command line of sbatch:
#
#   sbatch scripts/launch/slurm.sh --config qwen3_8b_to_0p6b --run /shared/runs/qwen3
#   sbatch --nodes 4 scripts/launch/slurm.sh --config qwen3_8b_to_0p6b --run /shared/runs/qwen3 --parallel.fsdp 8
#
# One task drives all GPUs of its node. Two minutes before the time limit every task gets SIGTERM and the run is saved.
# The same command resumes it, also on another number of nodes. The run folder must be visible to all nodes.
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
