"""API keys: a file with one `name:sha256` a line, never the keys themselves."""

import hashlib
import hmac
import os
import re
import secrets
from contextvars import ContextVar
from pathlib import Path

CALLER: ContextVar[str | None] = ContextVar("caller", default=None)
"""Name of the key that the request at hand came with; None where the server asks for none."""


class Keys:
    """Who may use the server."""

    def __init__(self, digests: dict[str, str]) -> None:
        self.digests = digests

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Keys":
        """The keys of a file; ValueError names a line that is none."""
        digests = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, digest = line.strip().rpartition(":")
            if not name or not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(
                    f"{path}, line {number}: expected name:sha256, as `rookery serve --new-key NAME` prints"
                )
            digests[name] = digest
        if not digests:
            raise ValueError(f"{path} holds no key; `rookery serve --new-key NAME` makes one")
        return cls(digests)

    def owner(self, given: str) -> str | None:
        """The name that a key belongs to. Every digest is compared, in constant time."""
        digest, found = hashlib.sha256(given.encode()).hexdigest(), None
        for name, known in self.digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and the line for the file."""
    if not re.fullmatch(r"[A-Za-z0-9_.@-]{1,64}", name):
        raise ValueError(f"a key's name has 1 to 64 letters, digits, '_', '.', '@' or '-', got {name!r}")
    key = f"rk-{secrets.token_urlsafe(32)}"
    return key, f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
