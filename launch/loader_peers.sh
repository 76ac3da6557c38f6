#!/usr/bin/env bash
# Our data loader beside others, MosaicML streaming among them:  bash launch/loader_peers.sh [out=figures.json]
# Makes .venv (once), and .venv-peers (once), because MosaicML streaming forces an older numpy than ours. DIFFUSION_PYTHON
# names an interpreter that has the requirements already; PEERS_VENV another place than .venv-peers.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
DIFFUSION_VENV=${PEERS_VENV:-.venv-peers} environment requirements-peers.lock
peers=$PYTHON
if [ -n "${DIFFUSION_PYTHON:-}" ]; then PYTHON=$DIFFUSION_PYTHON; else environment requirements.lock; fi
exec "$PYTHON" -m diffusion.benchmark task=loader loader.peers_python="$peers" "$@"
