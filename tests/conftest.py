"""What must hold before any test: one thread per process, and a Ctrl-C that is heard."""

import os
import signal

# Read by torch when it is first imported, which is later than this file. Workers that share cores wait on each other's
# barriers otherwise, 50 times slower.
os.environ["OMP_NUM_THREADS"] = "1"

# Programs that were started in the background ignore SIGINT, and so do those that they start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
