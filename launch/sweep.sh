#!/usr/bin/env bash
# Train a sweep on this machine, one run after another:  bash launch/sweep.sh [overrides...], of which some list values
#   bash launch/sweep.sh seed=0,1,2
#   bash launch/sweep.sh optimizer.lr=1e-4,2e-4 ema.decay=0.999,0.9999 +experiment=cifar10
# Each run has a folder named by its overrides, runs/NAME/<overrides>. The same command goes on where it stopped.
# On a cluster: slurm/array.sbatch.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.lock
run "$PYTHON" -m diffusion.train --multirun "$@"
