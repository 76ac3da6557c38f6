#!/usr/bin/env bash
# Train a sweep:  bash launch/sweep.sh [flags] [overrides...], of which some list values
#   bash launch/sweep.sh seed=0,1,2
#   bash launch/sweep.sh optimizer.lr=1e-4,2e-4 ema.decay=0.999,0.9999 +experiment=cifar10
# is a run after another on this machine; on a cluster each is a job, submitted by submitit:
#   bash launch/sweep.sh launcher=slurm --partition=gpu --time=12:00:00 seed=0,1,2
#   bash launch/sweep.sh launcher=slurm launcher.array_parallelism=4 --gpus-per-node=2 --ntasks-per-node=2 seed=0,1,2
# Each run has a folder named by its overrides, runs/NAME/<overrides>, wherever it is trained. The same command goes on
# where it stopped. All runs are looked at before the first begins: one that cannot be is refused at once.
#
# On a cluster: flags are those of sbatch, values joined to them by "="; SBATCH_PARTITION, SBATCH_ACCOUNT and the like
# are taken from the environment. The time limit is an hour unless it is given: a job that has reached it has saved, is
# requeued and goes on. The sweep is submitted and not waited for. At most array_parallelism runs at a time. Runs that
# differ in more than lists of values: slurm/array.sbatch.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.lock
run "$PYTHON" -m diffusion.train --multirun "$@"
