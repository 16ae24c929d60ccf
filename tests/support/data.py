"""Where tests find the shared data folder."""

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def shared(name: str) -> Path:
    """Path of a file in the shared data folder ($ROOKERY_DATA, else ../shared/data); skips the test if absent."""
    root = Path(os.environ.get("ROOKERY_DATA", CHECKOUT.parent / "shared" / "data"))
    path = root / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data folder; {root} has no such file (set ROOKERY_DATA)")
    return path
