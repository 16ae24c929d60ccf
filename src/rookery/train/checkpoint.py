"""Checkpoints of a run: whole or absent, the newest good one is found again.

What every process holds alike one of them writes into one file, step-N.pt. Several that hold pieces of the weights
write a folder, step-N, in torch's distributed format. Either is read by any number of processes.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rookery.checkpoints.atomic import replacing
from rookery.errors import RookeryError

log = logging.getLogger("rookery")

FACTS = "run.json"
"""In a folder: what is no tensor, and the sizes of the other files."""


class CannotSave(RookeryError, OSError):
    """A checkpoint could not be written; those before are as they were."""


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Writes `folder`/step-N.pt and removes all but the newest `keep`. Raises CannotSave, as on a full disk."""
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # to a file of Python's, whose errors say why: torch's own writer knows only that something went wrong
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"step": step, **content}, file)
    except (OSError, RuntimeError) as failure:  # RuntimeError when torch closes the archive of a failed write
        raise CannotSave(cannot_save(step, folder, failure)) from failure
    _remove_old(folder, keep)
    return path


def cannot_save(step: int, folder: Path, failure: BaseException) -> str:
    """What to tell the user."""
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = (cause and cause.strerror) or str(failure).splitlines()[0]
    found = _newest_first(folder)
    last = f"the last checkpoint is {found[0].name}" if found else "there is no checkpoint before it"
    return (
        f"step {step} could not be saved to {str(folder)!r}: {reason}; {last}. "
        "Make room, then the same command continues"
    )


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Content of the newest one-process checkpoint that can be read; None if there is none.

    Damaged ones are reported.
    """
    for path in _newest_first(folder):
        if path.suffix == ".pt" and (found := _read_file(path)) is not None:
            return found
    return None


def restore(
    folder: Path, check: Callable[[dict[str, Any]], None], structure: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Facts and tensors of the newest checkpoint that can be read; None if there is none.

    `check(facts)` may refuse the checkpoint by raising. `structure()` gives nested tensors, of which each process may
    hold pieces, and these are filled in place. Damaged checkpoints are reported. All processes must call this.
    """
    for path in _newest_first(folder):
        if path.suffix == ".pt":
            found = _read_file(path)
            if found is None:
                continue
            check(found)
            tensors = structure()
            _fill(tensors, {name: found.pop(name) for name in tensors})
            return found, tensors
        try:
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
            for name, size in facts.pop("files").items():
                if (path / name).stat().st_size != size:
                    raise ValueError(f"{name} is not whole")
        except (OSError, ValueError, KeyError) as damage:
            _report(path, damage)
            continue
        check(facts)
        tensors = structure()
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=not dist.is_initialized())
        return facts, tensors
    return None


def save_sharded(folder: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any], keep: int) -> None:
    """Writes `folder`/step-N, every process its pieces. Raises CannotSave in all processes if it fails in one."""
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.part"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))  # flushes to the disk; barriers inside
    except dcp.CheckpointException as failure:
        cause = next(iter(failure.failures.values()))[0]
        raise CannotSave(cannot_save(step, folder, cause)) from failure
    if first:
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        (temporary / FACTS).write_text(json.dumps({"step": step, **facts, "files": sizes}), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        os.replace(temporary, final)
        _remove_old(folder, keep)
    dist.barrier()


def save_by_first(folder: Path, step: int, content: dict[str, Any], keep: int) -> None:
    """As `save_checkpoint`, by the first of several processes; CannotSave in all of them if it fails."""
    reason: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            save_checkpoint(folder, step, content, keep)
        except CannotSave as failure:
            reason = [str(failure)]
    dist.broadcast_object_list(reason)
    if reason[0]:
        raise CannotSave(reason[0])


def sweep(folder: Path) -> None:
    """Removes what writers left behind that were killed in the middle of a checkpoint."""
    for left in folder.glob(".step-*.part"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, readable or not; 0 where there is none."""
    found = _newest_first(folder)
    return int(found[0].stem[5:]) if found else 0


def _read_file(path: Path) -> dict[str, Any] | None:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as damage:  # torch raises RuntimeError, UnpicklingError, EOFError, zipfile errors …
        _report(path, damage)
        return None


def _report(path: Path, damage: Exception) -> None:
    log.warning("checkpoint %s cannot be read (%s); trying the one before", path, damage)


@torch.no_grad()
def _fill(into: Any, found: Any) -> None:
    """Copies whole tensors, and what is no tensor, into the same structure, of which each process may hold pieces."""
    pairs = into.items() if isinstance(into, dict) else enumerate(into)
    for key, there in pairs:
        if isinstance(there, Tensor):
            there.copy_(_like(found[key], there))
        elif isinstance(there, dict | list):
            _fill(there, found[key])
        else:
            into[key] = found[key]


def _like(full: Tensor, there: Tensor) -> Tensor:
    if not hasattr(there, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(there.device), there.device_mesh, there.placements)


def _remove_old(folder: Path, keep: int) -> None:
    for old in _newest_first(folder)[keep:]:
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}(\.pt)?", path.name)]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)
