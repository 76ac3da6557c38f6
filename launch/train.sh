#!/usr/bin/env bash
# Make the environment (once) and train:  bash launch/train.sh [overrides...]
#   bash launch/train.sh                        the digits, minutes on two CPU cores
#   bash launch/train.sh +experiment=cifar10
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.lock
exec "$PYTHON" -m diffusion.train "$@"
