"""One thread per test process: workers that share cores wait on each other's barriers otherwise, 50 times slower."""

import os

# read by torch when it is first imported, which is later than this file
os.environ["OMP_NUM_THREADS"] = "1"
