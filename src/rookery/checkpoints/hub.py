"""Models from the Hugging Face Hub: "owner/name", "owner/name@revision", "owner/name/folder/file.pth".

Downloads, the cache, resuming and the settings HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are those of the
`huggingface_hub` package.
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rookery.errors import BadCheckpoint

log = logging.getLogger("rookery")

ENDINGS = (".safetensors", ".pth", ".pt", ".gguf", ".bin")
BESIDE = (
    "config.json",
    "adapter_config.json",
    "tokenizer.json",
    "vocab.txt",
    "rwkv_vocab_v20230424.txt",
    "20B_tokenizer.json",
)
"""Small files that go with a model: settings and tokenizer."""
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that make a repository one model, the preferred first."""
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
"""Errors of this machine, not of the connection."""
ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[^/@\\]+)*)(?:@(\w[\w./-]*))?")


class Address(NamedTuple):
    """Where a model is on the Hub."""

    repository: str
    file: str | None
    revision: str | None


def address(name: str | os.PathLike[str]) -> Address | None:
    """The parts of a Hub id; None for what is there as a file, or can only be meant as one."""
    if not isinstance(name, str) or os.path.exists(name):
        return None
    found = ID.fullmatch(name)
    if found is None or ".." in name or os.path.isdir(Path(name).parts[0]):
        return None
    repository, file, revision = found[1], found[2].strip("/") or None, found[3]
    if file is None and repository.lower().endswith(
        (*ENDINGS, ".st", ".state")
    ):  # a file in a folder that is not there
        return None
    return Address(repository, file, revision)


def local(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """`path` itself, or where the file or folder of the Hub id that it is lies once it is fetched."""
    return fetch(os.fspath(path)) if address(path) else path


def fetch(
    name: str, *, endpoint: str | None = None, cache: str | os.PathLike[str] | None = None, offline: bool | None = None
) -> Path:
    """The file or folder of a Hub id on this machine, downloaded unless the cache has it.

    Without a file in the id, the repository must be one model: a folder with model.safetensors or its index, or one
    model file. Offline (`offline`, by default what HF_HUB_OFFLINE says), or when the Hub cannot be reached, the cache
    answers. Raises BadCheckpoint with what to do.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    where = address(name)
    if where is None:
        raise BadCheckpoint(
            f"{name!r} is no model name of the Hub; they look like 'owner/name' or 'owner/name@revision'"
        )
    api = huggingface_hub.HfApi(endpoint=endpoint)
    if constants.HF_HUB_OFFLINE if offline is None else offline:
        return _from_cache(where, name, cache, "no connection is allowed (HF_HUB_OFFLINE)")
    try:
        info = api.model_info(where.repository, revision=where.revision)
        files = [entry.rfilename for entry in info.siblings or ()]
        main, needed = _choose(where, name, files)
        with _progress():
            folder = huggingface_hub.snapshot_download(
                where.repository,
                revision=where.revision,
                allow_patterns=[re.sub(r"([\[*?])", r"[\1]", file) for file in needed],
                endpoint=endpoint,
                cache_dir=cache,
            )
    except GatedRepoError:
        raise BadCheckpoint(
            f"{name!r}: the owner gives access on request only; ask for it on its page, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise BadCheckpoint(f"{name!r}: {where.repository!r} has no revision {where.revision!r}") from None
    except RepositoryNotFoundError:
        raise BadCheckpoint(
            f"there is no file {name!r}, and no model of that name on the Hub that you may read; check the spelling, "
            "or `hf auth login` for a private one"
        ) from None
    except HfHubHTTPError as error:
        raise BadCheckpoint(f"{name!r}: the Hub answers with an error, try again later ({_line(error)})") from None
    # HfHubHTTPError's parent is the base of the HTTP library's errors, whichever library it is
    except (OSError, HfHubHTTPError.__mro__[1]) as error:
        if getattr(error, "errno", None) in LOCAL:
            raise
        return _from_cache(where, name, cache, f"the Hub cannot be reached ({_line(error)})")
    return Path(folder) / main if main else Path(folder)


def _choose(where: Address, name: str, files: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file to open (None: the folder), and the files to download."""
    top = [file for file in files if "/" not in file]
    if where.file is not None:
        if where.file not in files:
            models = [file for file in files if file.lower().endswith(ENDINGS)]
            raise BadCheckpoint(f"{name!r}: the repository has no file {where.file!r}; it has {_some(models)}")
        folder = where.file.rpartition("/")[0]
        beside = {f"{folder}/{file}" if folder else file for file in (*BESIDE, Path(where.file).name + ".json")}
        return where.file, [where.file, *(file for file in files if file in beside)]
    for whole in WHOLE:
        if whole in top:
            stem = whole.partition(".")[0]
            ending = ".safetensors" if "safetensors" in whole else ".bin"
            shards = [f for f in top if f.startswith(stem) and f.endswith(ending)] if "index" in whole else []
            return None, [whole, *shards, *(file for file in top if file in BESIDE)]
    models = [file for file in files if file.lower().endswith(ENDINGS)]
    if len(models) != 1:
        raise BadCheckpoint(
            f"{name!r}: the repository is not one model, it has {_some(models)}; name one, as '{where.repository}/FILE'"
        )
    return models[0], [models[0], *(file for file in top if file in (*BESIDE, models[0] + ".json"))]


def _some(files: Sequence[str]) -> str:
    return (", ".join(files[:6]) + (f" and {len(files) - 6} more" if len(files) > 6 else "")) or "no model file"


def _from_cache(where: Address, name: str, cache: str | os.PathLike[str] | None, why: str) -> Path:
    """What an earlier download left. Found by the cache's documented layout: the package's own look-up refuses a
    repository of which only some files were fetched."""
    from huggingface_hub import constants

    root = Path(cache or constants.HF_HUB_CACHE) / f"models--{where.repository.replace('/', '--')}"
    revision = where.revision or "main"
    reference = root / "refs" / revision
    folder = root / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    if not folder.is_dir():
        raise BadCheckpoint(
            f"there is no file {name!r}; {why}, and the cache has no model of that name. Download it first, or give a "
            "path"
        )
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    main, _needed = _choose(where, name, files)
    log.info("%s: %s; the copy in %s is used", name, why, folder)
    return folder / main if main else folder


def _line(error: Any) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160] + " …"


@contextmanager
def _progress() -> Iterator[None]:
    """Bars on a terminal, nothing where stderr is a file or a pipe."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
