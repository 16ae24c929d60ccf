"""Writing a file so that it is whole or absent, whatever happens in between."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes its place when the block ends without error.

    An error, an interruption or a full disk leaves `path` as it was and removes the temporary file. The data is flushed
    to the disk before the rename, so that a power cut cannot leave an empty file of the right name.
    """
    import tempfile  # here: readers import this file, too, and a short answer should not wait for it

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # gone already when the rename happened
            temporary.unlink()


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `replacing`, for a folder of files; `path` must not exist, or be an empty folder."""
    import shutil
    import tempfile

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"cannot write {str(path)!r}: it exists already; give a new name or remove it first")
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield temporary
        for name in temporary.rglob("*"):
            if name.is_file():
                with open(name, "rb+") as file:
                    os.fsync(file.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when the rename happened


def _umask() -> int:
    # tempfile makes private files; a model file should be readable as any other file of the user
    umask = os.umask(0)
    os.umask(umask)
    return umask
