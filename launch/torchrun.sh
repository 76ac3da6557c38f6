#!/usr/bin/env bash
# Train with torchrun, on one machine or, started on each of them, on several:
#   bash launch/torchrun.sh [flags of torchrun, as --name=value] [overrides...]
#   bash launch/torchrun.sh --nnodes=2 --rdzv-endpoint=HEAD:29500 +experiment=lsun_church
#   bash launch/torchrun.sh --nnodes=1:4 --rdzv-endpoint=HEAD:29500 +experiment=lsun_church
# HEAD is the name of one of them, the same on all; the run folder and the data are on a disk that all see. With 1:4
# machines may come and go, HEAD apart: all processes are started anew and go on from the last checkpoint, and what is
# trained is the same on any number of them. When a process fails, that is done three times at most (--max-restarts).
# After a signal the processes have 10 minutes to save in, and 30 s when a machine joins or leaves.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.lock

flags=(--nproc-per-node="$(processes)" --max-restarts=3 --rdzv-backend=c10d)
flags+=(--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1) # and hand on to the processes, which save
[[ " $* " == *" --nnodes"[=\ ]* ]] || flags+=(--standalone)
while [[ ${1:-} == --* ]]; do
  flags+=("$1")
  shift
done
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # to save in, after a signal
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else a machine that joins later waits in vain for the address of rank 0
run "$PYTHON" -m torch.distributed.run "${flags[@]}" -m diffusion.train trainer=ddp "$@"
