#!/bin/bash
# Runs on an existing Cloud TPU slice (gcloud compute tpus tpu-vm create …), from your own machine:
#
#   export TPU=my-slice ZONE=us-east5-a
#   scripts/launch/tpu.sh setup                                                   # copies the repository, installs it
#   scripts/launch/tpu.sh --config qwen3_8b_to_0p6b --run /shared/runs/qwen3     # the same command on all workers
#
# JAX finds out the index of each worker. The run folder must lie on a file system that all workers mount, such as
# Filestore. If a worker is lost, the others end; the same command resumes from the last checkpoint.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}"

on_all() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

if [ "${1:-}" = setup ]; then
    archive=$(mktemp -d)/distill.tar.gz
    git -C "$(dirname "$0")/../.." archive --prefix distill/ -o "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU": --zone "$ZONE" --worker=all
    on_all "tar xzf distill.tar.gz && cd distill && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
else
    on_all "cd distill && .venv/bin/python scripts/distill.py $(printf '%q ' "$@")"
fi
