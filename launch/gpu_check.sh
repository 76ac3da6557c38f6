#!/usr/bin/env bash
# Does this machine's GPU compute what its CPU does, and how fast does it train?
#   bash launch/gpu_check.sh [out=figures.json]
# Makes the environment (once), unless DIFFUSION_PYTHON names an interpreter that has the requirements already:
#   DIFFUSION_PYTHON=python3 bash launch/gpu_check.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ -n "${DIFFUSION_PYTHON:-}" ]; then PYTHON=$DIFFUSION_PYTHON; else environment requirements.lock; fi
exec "$PYTHON" -m diffusion.benchmark task=gpu_check "$@"
