"""Freed memory: it is true that …"""

import subprocess
import sys

import pytest

# a process of its own, because the setting cannot be taken back
PROGRAM = """
import resource, sys
import torch
from rookery.train.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else True
# the first blocks differ a little in what alignment takes from them, so some steps pass until one fits all that follow
for step in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""


def faults_of_the_last_step(setting: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, setting], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == "True"
    return int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting belongs to glibc")
def test_a_block_that_was_freed_is_used_again_without_new_pages():
    # 40 MB are 9,766 pages of 4 KiB, or 19 of 2 MiB
    assert faults_of_the_last_step("keep") < 10
    assert faults_of_the_last_step("give back") > 15
