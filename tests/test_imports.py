"""Importing costs little and does nothing: no torch in the core, no slow library before it is used."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rookery

CORE = ("errors", "registry", "families", "tokenizers", "checkpoints", "engine", "cli")
LATE = ("torch", "tokenizers", "huggingface_hub", "llguidance", "tyro", "rich", "gguf")
ENVIRONMENT = {"PYTHONPATH": str(Path(rookery.__file__).parents[1])}


def core_modules() -> list[str]:
    """Every module of the core but those that run torch models."""
    modules = (m.name for m in pkgutil.walk_packages(rookery.__path__, "rookery."))
    door = {f"rookery.engine.runners.{name}" for name in ("torch", "torch_rows", "torch_graphs")}
    return [m for m in modules if m.split(".")[1] in CORE and m not in door]


def imported_by(program: str) -> set[str]:
    """Names of the modules that a fresh interpreter has imported after `program`."""
    code = f"import sys\nbefore = set(sys.modules)\n{program}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_core_imports_neither_torch_nor_slow_libraries():
    modules = core_modules()
    assert "rookery.checkpoints.state_file" in modules
    found = imported_by(f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)")
    assert set(modules) <= found
    assert not found & {*LATE}


def test_importing_the_package_imports_nothing_but_the_standard_library():
    assert {name.partition(".")[0] for name in imported_by("import rookery")} <= {"rookery", *sys.stdlib_module_names}


def test_what_needs_torch_says_so_where_there_is_none():
    code = "import sys; sys.modules['torch'] = None; import rookery; rookery.create_model"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    said = 'rookery.errors.MissingDependency: rookery.create_model needs torch: pip install "rookery[torch]"'
    assert done.stderr.splitlines()[-1] == said


def test_another_missing_module_is_not_taken_for_torch(monkeypatch):
    monkeypatch.setitem(rookery._HOME, "load", "rookery.no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = rookery.load
