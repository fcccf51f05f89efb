#!/usr/bin/env bash
# Generates, judges or encodes shards with many jobs side by side: a Slurm array in which each task makes its share.
#
#   sbatch --array=0-31 scripts/slurm_shards.sh generate output=/data/candidates prompts=prompts.txt model.path=my/model
#   sbatch --array=0-7  scripts/slurm_shards.sh judge shards=/data/candidates output=/data/pairs scorer.name=clip ...
#   sbatch --array=0-31 scripts/slurm_shards.sh encode shards=/data/pairs output=/data/latents model.path=my/model
#
# The words after the script are a verb and its config. Shards that are there are skipped and half-written ones never
# are there, so that an array that was killed is simply submitted again, with any number of tasks. Whichever task finds
# all shards in place writes shards.json, without which the next verb does not start; chain them with
# `sbatch --dependency=afterok:<job> ...`.
#SBATCH --job-name=mmalign-shards
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=8:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -euo pipefail

case "${1:-}" in
    generate | judge | encode) ;;
    *)
        echo "expected generate, judge or encode, then its config; got '${1:-}'" >&2
        exit 2
        ;;
esac

# A range of task numbers need not begin at 0.
place=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec "${PYTHON:-python}" -m mmalign "$@" "share=[$place, $SLURM_ARRAY_TASK_COUNT]"
