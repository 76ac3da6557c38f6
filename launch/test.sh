#!/usr/bin/env bash
# Make the environment with the test requirements (once) and run the tests:  bash launch/test.sh [pytest arguments...]
#   bash launch/test.sh                         the default suite
#   bash launch/test.sh -m "slow or not slow"   everything
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements-test.lock
# One test process more than cores, as tests wait for the processes that they start. nproc heeds OMP_NUM_THREADS.
processes=${TEST_PROCESSES:-$(($(env -u OMP_NUM_THREADS nproc) + 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one thread per test process
# A file is one process's: it makes once what its tests share, a SLURM of its own above all.
exec "$PYTHON" -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder "$@"
