#!/usr/bin/env bash
# Asks Google Cloud for a TPU slice, waits for it, and runs pivotjax on all of its workers.
#   PROJECT=my-project ZONE=us-west4-a tpu_configs/launch/queued_resource.sh v5e-256 \
#     pretrain train/llava15-7b-cc12m.yaml \
#     --model.vision /mnt/data/clip-vit-large-patch14-336 --model.language /mnt/data/vicuna-7b-v1.5 \
#     --data.scenario /mnt/data/cc12m/scenario --checkpoints.folder gs://bucket/run
# PROJECT, ZONE: where. NAME: of the TPU (default: pivotjax-SLICE). SPOT=1: cheaper, and taken away at any time, with its
# disks; the same command asks for another one, and the run goes on from its last checkpoint in checkpoints.folder.
# `out` is a folder on the workers, fetched at the end; all_workers.sh says what must lie where all of them see it.
# The TPU stays, and costs, until `gcloud compute tpus queued-resources delete NAME --force`.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
slice=${1:?usage: queued_resource.sh SLICE COMMAND RECIPE [--options]}
shift
facts=$here/../$slice.yaml
[[ -f $facts ]] || { echo "queued_resource.sh: there is no $facts; see tpu_configs/" >&2; exit 2; }
: "${PROJECT:?set PROJECT to the Google Cloud project}" "${ZONE:?set ZONE to a zone that has this TPU}"
name=${NAME:-pivotjax-$slice}

fact() { # the value of a key of the slice's file
  sed -n "s/^$1: *//p" "$facts" | tr -d '"'
}

where=(--project "$PROJECT" --zone "$ZONE")

state() { # WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED; nothing: never asked for
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)' 2>/dev/null || true
}

now=$(state)
if [[ $now == SUSPENDED || $now == FAILED ]]; then # it was taken away: what is left of it goes before a new one comes
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  now=
fi
if [[ -z $now ]]; then
  options=()
  [[ ${SPOT:-0} == 1 ]] && options+=(--spot)
  gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" \
    --accelerator-type "$(fact accelerator_type)" --runtime-version "$(fact runtime)" "${options[@]}"
fi
until now=$(state) && [[ $now == ACTIVE ]]; do
  if [[ $now == FAILED || $now == SUSPENDED ]]; then
    echo "queued_resource.sh: $name is $now; run this again to ask for another one" >&2
    exit 1
  fi
  echo "$name is ${now:-asked for}; looking again in a minute"
  sleep 60
done
flags=$(sed -n 's/^  \(xla_[a-z_]*\): */--\1=/p' "$facts" | tr '\n' ' ')
LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-${flags% }} exec "$here/all_workers.sh" "$name" "$@"
