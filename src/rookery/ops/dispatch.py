"""Which backend of an operator runs, and why the others cannot."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rookery.errors import BackendUnavailable, unknown

log = logging.getLogger("rookery")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator."""

    name: str
    run: Callable[..., Any]
    """The operator's arguments, keyword-only, to its results."""
    why_not: Callable[..., str | None] = field(default=lambda **call: None)
    """Same arguments: the reason that this call cannot run here, or None if it can."""


class Op:
    """An operator and its backends, the preferred one first; the last must run everywhere."""

    def __init__(self, name: str, backends: list[Backend]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self._announced: set[str] = set()

    def __call__(self, *, backend: str | None = None, **call: Any) -> Any:
        """Runs `backend`, or the first one that can. A backend asked for by name runs or raises BackendUnavailable."""
        return self.pick(backend, **call).run(**call)

    def pick(self, wanted: str | None, **call: Any) -> Backend:
        if wanted is None:
            for backend in self.backends.values():
                if backend.why_not(**call) is None:
                    self._announce(backend)
                    return backend
        if wanted not in self.backends:
            raise unknown(f"backend of {self.name}", str(wanted), self.backends, "`rookery doctor`")
        chosen = self.backends[wanted]
        if reason := chosen.why_not(**call):
            raise BackendUnavailable(f"{self.name}: backend {wanted!r} cannot run: {reason}")
        return chosen

    def _announce(self, backend: Backend) -> None:
        # torch.compile traces this; a trace has no place for a log line
        if not torch.compiler.is_compiling() and backend.name not in self._announced:
            self._announced.add(backend.name)
            log.info("%s runs on backend %r", self.name, backend.name)


def _load_native() -> Any | str:
    try:
        from rookery import _native
    except ImportError as error:
        return f"the compiled module is missing ({error}); reinstall rookery on a machine with a C++20 compiler"
    return _native


_NATIVE = _load_native()  # not functools.cache, which torch.compile warns about


def native_module() -> Any | str:
    """The compiled module `rookery._native`, or the reason why there is none."""
    return _NATIVE


def native_why_not(*tensors: Tensor | None, dtypes: tuple[Any, ...]) -> str | None:
    """Reason that tensors cannot go to the compiled CPU kernels, or None."""
    if isinstance(reason := native_module(), str):
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, a tensor is on {tensor.device}"
        if tensor.dtype not in dtypes:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, a tensor has {tensor.dtype}"
    return None


_TRITON_FOUND = find_spec("triton") is not None


def triton_why_not(*tensors: Tensor | None, dtypes: tuple[Any, ...]) -> str | None:
    """Reason that tensors cannot go to Triton kernels, or None. Under Triton's interpreter they come from the CPU."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and _triton_interprets()):
            return f"it runs on cuda, a tensor is on {tensor.device}"
        if tensor.dtype not in dtypes:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, a tensor has {tensor.dtype}"
    if not _TRITON_FOUND:
        return 'Triton is not installed; pip install "rookery[gpu]"'
    return None


def _triton_interprets() -> bool:
    # Triton takes a while to import, and who interprets has done so; torch.compile cannot trace its settings
    if torch.compiler.is_compiling() or "triton" not in sys.modules:
        return False
    return sys.modules["triton"].knobs.runtime.interpret
