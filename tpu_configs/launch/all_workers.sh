#!/usr/bin/env bash
# Runs pivotjax on all workers of a TPU VM that is there, over ssh; every worker runs the same command.
#   PROJECT=my-project ZONE=us-west4-a tpu_configs/launch/all_workers.sh NAME pretrain train/llava15-7b-cc12m.yaml \
#     --model.vision /mnt/data/clip-vit-large-patch14-336 --model.language /mnt/data/vicuna-7b-v1.5 \
#     --data.scenario /mnt/data/cc12m/scenario --checkpoints.folder gs://bucket/run
# The program's folder is copied to the workers and installed first, without models/, runs/ and out/: models and scenario
# must lie where all workers see them (a mounted disk), corpora and, with several workers, checkpoints.folder as well
# (these may be gs://). At the end `out`, unless it is an absolute path, is fetched from worker 0 to the same place here.
# Ctrl-C (or SIGTERM) ends the run on the workers after a checkpoint; the same command goes on from there.
# LIBTPU_INIT_ARGS: flags of the compiler (`xla_flags` of the slice's file as --flag=true; queued_resource.sh sets it).
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
name=${1:?usage: all_workers.sh NAME COMMAND RECIPE [--options]}
shift
(($#)) || { echo "all_workers.sh: no command; for example: pretrain train/llava15-7b-cc12m.yaml" >&2; exit 2; }
: "${PROJECT:?set PROJECT to the Google Cloud project}" "${ZONE:?set ZONE to the zone of the TPU}"
where=(--project "$PROJECT" --zone "$ZONE")

out() { # `out` of the command: the option, or the recipe's
  local found='' before=''
  [[ ! -f $root/${2:-} ]] || found=$(sed -n 's/^out: *\([^ #]*\).*/\1/p' "$root/$2")
  for word; do
    [[ $before != --out ]] || found=$word
    [[ $word != --out=* ]] || found=${word#--out=}
    before=$word
  done
  echo "$found"
}

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
tar -C "$root" --anchored --exclude=./{.git,.venv,venv,runs,out,models} -czf "$archive" .
gcloud compute tpus tpu-vm scp "$archive" "$name:pivotjax.tar.gz" "${where[@]}" --worker all

end() {
  trap - INT TERM # a second Ctrl-C ends this script and leaves the workers
  echo "all_workers.sh: the workers are told to save a checkpoint and end" >&2
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker all --command "kill -TERM \$(cat ~/pivotjax.pid)" || true
  wait "$run" || exit $?
  exit 0
}

command=$(printf '%q ' pivotjax "$@")
set -m # a process group of its own: Ctrl-C here does not cut the connection over which the workers tell how they end
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker all --command "
set -e
echo \$\$ > ~/pivotjax.pid
mkdir -p ~/pivotjax
tar -C ~/pivotjax -xzf ~/pivotjax.tar.gz
cd ~/pivotjax
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'
export PATH=\$PWD/.venv/bin:\$PATH
export LIBTPU_INIT_ARGS=$(printf '%q' "${LIBTPU_INIT_ARGS:-}")
exec $command" </dev/null &
run=$!
set +m
trap end INT TERM
wait "$run"
trap - INT TERM

out=$(out "$@")
if [[ -n $out && $out != /* ]]; then
  mkdir -p "$(dirname "$root/$out")"
  gcloud compute tpus tpu-vm scp --recurse "$name:pivotjax/$out" "$(dirname "$root/$out")" "${where[@]}" --worker 0
fi
