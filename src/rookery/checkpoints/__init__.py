"""Any model file in, tensors out; and back. Nothing here imports torch or executes what a file contains."""

from typing import Any

__all__ = ["Checkpoint", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    # on first use: state files are read by code that needs neither the registry nor the readers
    if name in __all__:
        from rookery.checkpoints import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'rookery.checkpoints' has no attribute {name!r}")
