"""One thread per test process, because the suite runs in parallel processes; and no test ever reaches for a network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
