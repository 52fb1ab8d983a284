#!/bin/bash
# Starts several processes on this machine, to try out a cluster or to give every process its own devices.
# One node of eight GPUs does not need it: `python scripts/distill.py …` is one process that uses all of them.
#
#   scripts/launch/local.sh 2 --config addition --run runs/pair       # two processes
#
# CPUs: each process has the N devices of XLA_FLAGS=--xla_force_host_platform_device_count=N. GPUs: process i gets
# device i.
set -euo pipefail
processes=$1
shift
export JAX_NUM_PROCESSES=$processes JAX_COORDINATOR_ADDRESS=localhost:${PORT:-9876}
cd "$(dirname "$0")/../.."
started=()
trap 'kill "${started[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
    JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i "${PYTHON:-.venv/bin/python}" scripts/distill.py "$@" &
    started+=($!)
done
code=0
for job in "${started[@]}"; do
    wait "$job" || code=$?
done
exit "$code"
