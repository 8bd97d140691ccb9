#!/bin/bash
# Train on several nodes under Slurm:  sbatch docs/slurm/train.sh imagenet256-xl2 --out /shared/runs/xl2
# What follows the script's name are the words of `dumo train`. Submitted again, it goes on where the run stopped.
# Set the lines marked SITE as your cluster wants them. Not tried on a cluster: docs/gpus.md says what was tried.

#SBATCH --job-name=dumo
#SBATCH --nodes=2                    # SITE: any number; another one on resuming is fine
#SBATCH --ntasks-per-node=1          # one torchrun a node; torchrun starts a process per GPU
#SBATCH --gpus-per-node=8            # SITE: GPUs of a node
#SBATCH --cpus-per-task=64           # SITE: all cores of the node, for the task has all of its processes
#SBATCH --exclusive                  # nobody else on these nodes
#SBATCH --time=24:00:00              # SITE: the longest that the partition allows
#SBATCH --requeue                    # after a preemption or the loss of a node the job waits again, then goes on
#SBATCH --open-mode=append           # a requeued job writes on in the same log
#SBATCH --output=dumo-%j.log         # %j: the job's number, which a requeued job keeps
#SBATCH --signal=B:USR1@120          # 120 s before the time is up, USR1 to this shell (B), which `again` hears

set -euo pipefail                    # stop at the first error, and at a variable that is not set

# SITE: the environment in which dumo is installed, on a file system that all nodes see.
source /shared/dumo/.venv/bin/activate

# SITE: local copies of data, and the cache of downloads, on that file system too, where you have not set a variable
# yourself. Without a network on the nodes, fill the cache before, and set HF_HUB_OFFLINE=1.
export DUMO_DATA=${DUMO_DATA:-/shared/data}
export HF_HOME=${HF_HOME:-/shared/huggingface}

# torchrun sets it to 1 where nobody did: with little else on the cores, a few threads per process do no harm.
export OMP_NUM_THREADS=4

# SITE: where a node has several networks, the one that the nodes share, for the sockets of gloo and of NCCL's start.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# The ranks meet at the first node of the job; a port from the job's number, so that two jobs do not meet each other.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

again() {                            # the time is nearly up: the ranks save, then the same job waits again
    kill -USR1 "$step"               # srun passes it on to each torchrun, and torchrun to its ranks
    wait "$step" || true
    echo "the time is up: the job goes on from here when it runs again"
    scontrol requeue "$SLURM_JOB_ID" || echo "this cluster does not requeue: submit the job again"
    exit 0
}
trap again USR1

# srun starts one torchrun on each node, and --kill-on-bad-exit ends all as soon as one has failed for good. Since
# Slurm 22.05 it takes one core, not those of the task, unless it is asked.
#   --nnodes          how many torchruns meet
#   --nproc-per-node  processes on each: gpu is as many as it has GPUs
#   --rdzv-backend    c10d: they meet by a store that torchrun itself opens, on the node that the endpoint names
#   --rdzv-id         the same for all that belong together
#   --max-restarts    so often, where a process dies, all are started again and go on from the last checkpoint
#   --signals-to-handle  these reach the ranks, which save and leave; USR1 would kill torchrun otherwise
#   --shutdown-timeout   seconds that they have for it; less than the 120 above
# In the background, and then waited for: a shell hears a signal only between its commands, or while it waits.
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
