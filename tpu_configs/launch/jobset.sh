#!/usr/bin/env bash
# Prints a GKE JobSet that runs pivotjax on a TPU slice; pipe it to kubectl.
#   IMAGE=gcr.io/my-project/pivotjax CLAIM=data tpu_configs/launch/jobset.sh v5e-256 \
#     pretrain train/llava15-7b-cc12m.yaml \
#     --model.vision /mnt/data/clip-vit-large-patch14-336 --model.language /mnt/data/vicuna-7b-v1.5 \
#     --data.scenario /mnt/data/cc12m/scenario --out /mnt/data/runs/cc12m --checkpoints.folder gs://bucket/run |
#     kubectl apply -f -
# IMAGE: a container with pivotjax[tpu,gcs] installed and the recipe in its working folder. CLAIM: a
# PersistentVolumeClaim that all pods can mount and write (Filestore, for example); it becomes /mnt/data, where models,
# scenario and `out` lie. NAME: of the JobSet (default: pivotjax-SLICE). A worker that is lost, or told to end (two
# minutes to save a checkpoint, exit status 143), restarts the whole job, which goes on from its last checkpoint; bad
# input (exit status 2) fails it at once. The cluster needs the JobSet controller and a node pool of the slice.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
slice=${1:?usage: jobset.sh SLICE COMMAND RECIPE [--options]}
shift
facts=$here/../$slice.yaml
[[ -f $facts ]] || { echo "jobset.sh: there is no $facts; see tpu_configs/" >&2; exit 2; }
(($#)) || { echo "jobset.sh: no command; for example: pretrain train/llava15-7b-cc12m.yaml" >&2; exit 2; }
: "${IMAGE:?set IMAGE to a container with pivotjax\[tpu,gcs\]}"
: "${CLAIM:?set CLAIM to a PersistentVolumeClaim for /mnt/data}"
name=${NAME:-pivotjax-$slice}

fact() { # the value of a key of the slice's file
  sed -n "s/^$1: *//p" "$facts" | tr -d '"'
}

json() { # a string in quotes, as JSON and YAML both read it
  local text=${1//\\/"\\\\"}
  text=${text//\"/'\"'}
  text=${text//$'\t'/'\t'}
  printf '"%s"' "${text//$'\n'/'\n'}"
}

flags=$(sed -n 's/^  \(xla_[a-z_]*\): */--\1=/p' "$facts" | tr '\n' ' ')
topology=$(fact topology)
hosts=$(fact hosts)
chips=$(($(fact chips) / hosts))
arguments=$(for word; do echo "                - $(json "$word")"; done)

cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
    rules: # any other failure restarts the job
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: pivotjax
              operator: In
              values: [2]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(fact gke_accelerator)
              cloud.google.com/gke-tpu-topology: ${topology#*:}
            containers:
            - name: pivotjax
              image: $IMAGE
              command: ["pivotjax"]
              args:
$arguments
              env:
              - name: LIBTPU_INIT_ARGS
                value: "${flags% }"
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                requests:
                  google.com/tpu: $chips
                limits:
                  google.com/tpu: $chips
              volumeMounts:
              - {name: shm, mountPath: /dev/shm}
              - {name: data, mountPath: /mnt/data}
            volumes:
            - name: shm # the input's worker processes hand batches over in shared memory; a container's own has 64 MB
              emptyDir: {medium: Memory}
            - name: data
              persistentVolumeClaim: {claimName: $CLAIM}
YAML
