"""Saves two states in turn to one file until it is killed; the test looks at what is there then.

python kill_while_saving.py FILE
"""

import sys

import numpy as np
import safetensors.numpy  # noqa: F401 (here, not while the first file is written)

from rookery.checkpoints.state_file import write_state

if __name__ == "__main__":
    path = sys.argv[1]
    states = [{"layers.0.wkv": np.full((1, 16, 64, 64), value, np.float32)} for value in (1.0, 2.0)]
    print("begun", flush=True)
    while True:
        for state in states:
            write_state(path, state, model="a model")
