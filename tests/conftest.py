"""Before torch loads: waiting threads sleep, so that tests on a busy machine take as long as on an idle one."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has its own process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
