"""The exceptions that users may want to catch. Each is also a builtin exception, so either name works."""

import difflib
from collections.abc import Iterable


class RookeryError(Exception):
    """Base of every error that this library raises on purpose; the message says what to do."""


class UnknownName(RookeryError, ValueError):
    """A model, recipe, backend or setting of that name does not exist."""


class BadCheckpoint(RookeryError, ValueError):
    """A model file is damaged, unsafe, or not what it was said to be."""


class BadState(RookeryError, ValueError):
    """A state file or state does not fit the model it was given to."""


class BadTokenizer(RookeryError, ValueError):
    """A tokenizer file is damaged, no tokenizer fits the model, or a token id or text lies outside its vocabulary."""


class BackendUnavailable(RookeryError, RuntimeError):
    """A backend asked for by name cannot run this call on this machine."""


class MissingDependency(RookeryError, ImportError):
    """An optional library is needed; the message names the extra that installs it."""


def unknown(kind: str, name: str, known: Iterable[str], where: str) -> UnknownName:
    """The error for a name that nobody registered, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownName(f"no {kind} named {name!r}.{hint} {where} shows all {len(known)}.")
