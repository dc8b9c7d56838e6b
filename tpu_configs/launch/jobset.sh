#!/usr/bin/env bash
# Prints a GKE JobSet that runs pivotjax on a TPU slice; pipe it to kubectl.
#   IMAGE=gcr.io/my-project/pivotjax tpu_configs/launch/jobset.sh v5e-256 pretrain train/llava15-7b-cc12m.yaml | kubectl apply -f -
# IMAGE: a container with pivotjax[tpu] installed and the recipe in its working folder. NAME: of the JobSet (default:
# pivotjax-SLICE). A worker that is lost restarts the whole job, which goes on from its last checkpoint; workers that
# are told to end have two minutes to save one. The cluster needs the JobSet controller and a node pool of the slice.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
slice=${1:?usage: jobset.sh SLICE COMMAND RECIPE [--options]}
shift
facts=$here/../$slice.yaml
[[ -f $facts ]] || { echo "jobset.sh: there is no $facts; see tpu_configs/" >&2; exit 2; }
(($#)) || { echo "jobset.sh: no command; for example: pretrain train/llava15-7b-cc12m.yaml" >&2; exit 2; }
: "${IMAGE:?set IMAGE to a container with pivotjax\[tpu\]}"
name=${NAME:-pivotjax-$slice}

fact() { # the value of a key of the slice's file
  sed -n "s/^$1: *//p" "$facts" | tr -d '"'
}

flags=$(sed -n 's/^  \(xla_[a-z_]*\): */--\1=/p' "$facts" | tr '\n' ' ')
topology=$(fact topology)
hosts=$(fact hosts)
chips=$(($(fact chips) / hosts))
arguments=$(printf '                - "%s"\n' "$@")

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
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
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
YAML
