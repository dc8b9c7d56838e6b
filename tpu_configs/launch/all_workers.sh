#!/usr/bin/env bash
# Runs pivotjax on all workers of a TPU VM that is there, over ssh; every worker runs the same command.
#   PROJECT=my-project ZONE=us-west4-a tpu_configs/launch/all_workers.sh NAME pretrain train/llava15-7b-cc12m.yaml
# The program is copied to the workers and installed first. Interrupted, the run on the workers ends too, after a
# checkpoint; the same command goes on from there. LIBTPU_INIT_ARGS: flags of the compiler (`xla_flags` of the slice's file
# as --flag=true; queued_resource.sh sets them).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
name=${1:?usage: all_workers.sh NAME COMMAND RECIPE [--options]}
shift
(($#)) || { echo "all_workers.sh: no command; for example: pretrain train/llava15-7b-cc12m.yaml" >&2; exit 2; }
: "${PROJECT:?set PROJECT to the Google Cloud project}" "${ZONE:?set ZONE to the zone of the TPU}"
where=(--project "$PROJECT" --zone "$ZONE" --worker all)

archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
tar -C "$here/../.." --exclude .git --exclude runs --exclude models -czf "$archive" .
gcloud compute tpus tpu-vm scp "$archive" "$name:/tmp/pivotjax.tar.gz" "${where[@]}"

command=$(printf '%q ' pivotjax "$@")
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command "
set -e
mkdir -p ~/pivotjax
tar -C ~/pivotjax -xzf /tmp/pivotjax.tar.gz
cd ~/pivotjax
python3 -m venv .venv
.venv/bin/pip install --quiet '.[tpu]'
export PATH=\$PWD/.venv/bin:\$PATH
export LIBTPU_INIT_ARGS=$(printf '%q' "${LIBTPU_INIT_ARGS:-}")
exec $command"
