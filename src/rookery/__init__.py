"""Rookery: run, train, adapt, compress, convert and serve the RWKV family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rookery.engine.llm import LLM
    from rookery.engine.session import Session
    from rookery.models import create_model, load
    from rookery.registry import list_models
    from rookery.state import State

__version__ = "0.1.0"
__all__ = ["LLM", "Session", "State", "create_model", "list_models", "load"]

_HOME = {
    "LLM": "rookery.engine.llm",
    "Session": "rookery.engine.session",
    "State": "rookery.state",
    "create_model": "rookery.models",
    "list_models": "rookery.registry",
    "load": "rookery.models",
}


def __getattr__(name: str) -> Any:
    # imported on first use, so that `import rookery` costs nothing and a core install never looks for torch
    if name not in _HOME:
        raise AttributeError(f"module 'rookery' has no attribute {name!r}")
    try:
        home = import_module(_HOME[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from rookery.errors import MissingDependency

        raise MissingDependency(f'rookery.{name} needs torch: pip install "rookery[torch]"') from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
