"""Which format a file has, and the reader for it."""

import os
from collections.abc import Callable
from pathlib import Path

from rookery.checkpoints.safetensors import read_safetensors
from rookery.checkpoints.source import Source
from rookery.errors import BadCheckpoint


def read_file(path: str | os.PathLike[str]) -> Source:
    """The tensors in a file of any readable format, under the file's own names."""
    file = Path(path)
    if not file.exists():
        raise BadCheckpoint(f"there is no file {os.fspath(path)!r}")
    if not file.is_file():
        raise BadCheckpoint(f"{os.fspath(path)!r} is neither a file nor a folder")
    with open(file, "rb") as opened:
        start = opened.read(16)
    return _reader(start, file)(path)


def _reader(start: bytes, path: Path) -> Callable[[str | os.PathLike[str]], Source]:
    """The function that reads a file with these first bytes. Formats differ there; names and endings do not count."""
    if start[:4] == b"PK\3\4":
        from rookery.checkpoints.pth import read_pth

        return read_pth
    if start[:4] == b"fmgg":
        from rookery.checkpoints.ggmf import read_ggmf

        return read_ggmf
    if start[8:9] == b"{" or not start:  # an empty file is reported as such by any reader
        return read_safetensors
    if start[:4] == b"GGUF":
        from rookery.checkpoints.gguf import read_gguf

        return read_gguf
    where = str(path)
    from rookery.checkpoints.llama2c import is_llama2c, read_llama2c_source

    if is_llama2c(path):
        return read_llama2c_source
    if start[:1] == b"\x80":
        raise BadCheckpoint(
            f"{where!r} is a bare pickle, as torch wrote before version 1.6. Load it once with a torch you trust it to "
            "and save it again: torch.save(torch.load(path, weights_only=True), new_path)"
        )
    raise BadCheckpoint(
        f"{where!r} is no model file of a known format (pth, safetensors, gguf, ggmf); it starts with {start!r}"
    )
