#!/usr/bin/env bash
# Train on all GPUs of this machine, a process each:  bash launch/local.sh [overrides...]
#   bash launch/local.sh +experiment=cifar10
#   CUDA_VISIBLE_DEVICES=0,1 bash launch/local.sh +experiment=cifar10     on these two alone
# Without a GPU it is one process on the CPU.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.lock
run "$PYTHON" -m diffusion.train trainer=ddp trainer.devices="$(processes)" "$@"
