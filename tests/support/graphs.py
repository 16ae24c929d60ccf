"""CUDA graphs without a GPU: what a function does to tensors is written down once and done again."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "lift_fresh", "masked_select", "unique", "equal.default")
"""Operators that wait for the GPU, or bring numbers from the host: a capture of them fails or keeps old numbers."""


class Recorder(TorchDispatchMode):
    """Lists the operators of a call, with their arguments and results; refuses what a capture refuses."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(func) for name in READS):
            raise RuntimeError(f"{func} cannot be captured")
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, results))
        return results

    def replay(self):
        """Does the same again, to the same tensors: nothing of Python runs but the operators."""
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # views lie where they lay
                    old.copy_(new)


class Recorded:
    """Stands for `CudaGraphs`; `sizes` counts captures."""

    def __init__(self):
        self.captures = 0

    def __call__(self, run):
        run()  # as warming up does, this changes the places
        recorder = Recorder()
        with recorder:
            run()
        self.captures += 1
        return recorder.replay
