#!/usr/bin/env bash
# Trains on several nodes under Slurm; stopped by the time limit or a preemption, it goes on where it was.
#
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm_train.sh configs/sdxl_dpo_lora.yaml data.shards=/data/latents output=/runs/xl
#
# The words after the script are those of `mmalign train`. Each node runs one torchrun with a process for each GPU.
# Five minutes before the time limit Slurm wakes this script with USR1; it sends SIGTERM to the processes, which save
# a checkpoint at the end of their step, and puts the job back into the queue. At a preemption Slurm itself sends the
# SIGTERM, and requeues the job. A job that ends by itself, or by scancel, does not come back.
# The same command serves every start, for `--resume latest` begins anew where there is no checkpoint yet.
#SBATCH --job-name=mmalign-train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

python=${PYTHON:-python}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes%%$'\n'*}
# A port of its own for each job, should two share a node.
port=$((20000 + SLURM_JOB_ID % 20000))
# torchrun kills its processes so many seconds after SIGTERM; a step and a large checkpoint may take longer than its 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

requeue=false
woken=false
# scancel with a signal reaches the step alone, not this script; SIGTERM to srun itself would kill the step at once.
trap 'woken=true; requeue=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'woken=true' TERM

srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:$port" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m mmalign train "$@" --resume latest &
step=$!

status=0
wait "$step" || status=$?
# A signal ends `wait` before the step has ended: it is still saving.
while $woken; do
    woken=false
    status=0
    wait "$step" || status=$?
done

if $requeue && ((status != 0)); then
    echo "out of time: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
