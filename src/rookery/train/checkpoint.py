"""Checkpoints of a run: whole or absent, the newest good one is found again."""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from rookery.checkpoints.atomic import replacing

log = logging.getLogger("rookery")


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Writes `folder`/step-N.pt and removes all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as temporary:
        torch.save({"step": step, **content}, temporary)
    for old in _newest_first(folder)[keep:]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Content of the newest checkpoint that can be read; None if there is none. Damaged ones are reported."""
    for path in _newest_first(folder):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as damage:  # torch raises RuntimeError, UnpicklingError, EOFError, zipfile errors …
            log.warning("checkpoint %s cannot be read (%s); trying the one before", path, damage)
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)
