#!/usr/bin/env bash
# Make the environment with the test requirements (once) and run the tests:  bash launch/test.sh [pytest arguments...]
#   bash launch/test.sh                         the default suite
#   bash launch/test.sh -m "slow or not slow"   everything
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements-test.lock
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one thread a test process: as many processes as cores run side by side
exec "$PYTHON" -m pytest -n "${TEST_PROCESSES:-$(nproc)}" --dist loadgroup "$@"
