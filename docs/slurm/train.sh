#!/bin/bash
# Train on several nodes under Slurm:  sbatch docs/slurm/train.sh imagenet256-xl2 --out /shared/runs/xl2
# The words after the script's name are passed to `dumo train`. Submit it again to resume the run.
# Adapt the lines marked SITE to your cluster. The script was not tested on a cluster (docs/gpus.md).

#SBATCH --job-name=dumo
#SBATCH --nodes=2                    # SITE: any number, which may change when a run is resumed
#SBATCH --ntasks-per-node=1          # one torchrun per node; torchrun starts a process per GPU
#SBATCH --gpus-per-node=8            # SITE: GPUs per node
#SBATCH --cpus-per-task=64           # SITE: all cores of the node, because the task contains all of its processes
#SBATCH --exclusive                  # do not share the nodes
#SBATCH --time=24:00:00              # SITE: the longest time that the partition allows
#SBATCH --requeue                    # requeue after a preemption or the loss of a node, and resume
#SBATCH --open-mode=append           # a requeued job appends to the same log
#SBATCH --output=dumo-%j.log         # %j is the job's number, which a requeued job keeps
#SBATCH --signal=B:USR1@120          # 120 s before the time limit, send USR1 to this shell (B), which calls `again`

set -euo pipefail                    # stop at the first error and at unset variables

# SITE: the environment in which dumo is installed, on a file system that is shared by all nodes.
source /shared/dumo/.venv/bin/activate

# SITE: local copies of data, and the cache of downloads, on the same file system, unless the variables are set. If the
# nodes have no network, fill the cache before, and set HF_HUB_OFFLINE=1.
export DUMO_DATA=${DUMO_DATA:-/shared/data}
export HF_HOME=${HF_HOME:-/shared/huggingface}

# torchrun would set it to 1. On an exclusive node a few threads per process are fine.
export OMP_NUM_THREADS=4

# SITE: if a node has several network interfaces, the one that connects the nodes, for gloo and NCCL's bootstrap.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# The rendezvous is on the first node of the job. The port depends on the job's number, so that jobs do not collide.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

again() {                            # shortly before the time limit: save a checkpoint and requeue the job
    kill -USR1 "$step"               # srun forwards it to each torchrun, and torchrun to its ranks
    wait "$step" || true
    echo "time limit: the job resumes from here when it runs again"
    scontrol requeue "$SLURM_JOB_ID" || echo "this cluster does not requeue: submit the job again"
    exit 0
}
trap again USR1

# srun starts one torchrun on each node, and --kill-on-bad-exit ends all of them when one has failed. Since Slurm 22.05
# srun uses a single core unless --cpus-per-task is passed.
#   --nnodes          the number of torchruns
#   --nproc-per-node  processes per node: gpu means one per GPU
#   --rdzv-backend    c10d: torchrun opens the store on the node of the endpoint
#   --rdzv-id         identifies the job
#   --max-restarts    how often all ranks are restarted from the last checkpoint after a process dies
#   --signals-to-handle  signals that are forwarded to the ranks, which save and exit; USR1 would otherwise kill torchrun
#   --shutdown-timeout   seconds for saving; less than the 120 above
# srun runs in the background because a shell handles signals only between commands or while it waits.
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node gpu \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:$port" \
    --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout 100 \
    -m dumo train "$@" &
step=$!
wait "$step"
