"""Say what works on this machine, and why the rest does not."""

import argparse
import json
import os
import platform
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for name in ("rookery", "python", "platform", "native", "embedded model", "torch", "triton"):
        print(f"{name:<15} {_line(found[name])}")
    if found["operators"]:
        print("\noperators (the first backend that works is used)")
    for operator, devices in found["operators"].items():
        for device, backends in devices.items():
            print(f"  {operator} on {device}")
            for backend, reason in backends.items():
                print(f"    {backend:<10} {'works' if reason is None else reason}")
    return 0


def examine() -> dict[str, Any]:
    """What there is, as data that JSON can hold."""
    from rookery import __version__
    from rookery.engine.llm import EMBEDDED

    torch = _torch()
    return {
        "rookery": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
        "native": _native(),
        "embedded model": str(EMBEDDED) if EMBEDDED.is_dir() else "none in this installation",
        "torch": torch,
        "triton": _version("triton", 'GPU kernels; pip install "rookery[gpu]"'),
        "operators": _operators() if isinstance(torch, dict) else {},
    }


def _native() -> dict[str, Any] | str:
    try:
        from rookery import _native as native
    except ImportError as error:
        return f"missing ({error}); reinstall rookery on a machine with a C++20 compiler"
    sets = native.available_isas()
    return {"instruction sets": sets, "default": sets[-1], "threads": native.available_cores()}


def _torch() -> dict[str, Any] | str:
    try:
        import torch
    except ImportError:
        return 'not installed: training, GPUs and families without a compiled runtime; pip install "rookery[torch]"'
    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "devices": devices}


def _version(module: str, purpose: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return f"not installed: {purpose}"


def _operators() -> dict[str, dict[str, dict[str, str | None]]]:
    """Operator -> device -> backend -> None, or the reason why it cannot run the operator's first test case there."""
    import importlib
    import pkgutil
    from importlib.util import find_spec

    import torch

    from rookery import ops

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found: dict[str, dict[str, dict[str, str | None]]] = {}
    for module in pkgutil.iter_modules(ops.__path__):
        package = importlib.import_module(f"rookery.ops.{module.name}")
        # some operators are others in disguise and have no backends of their own
        if not hasattr(package, "OP") or not find_spec(f"{package.__name__}.cases"):
            continue
        operator, cases = package.OP, importlib.import_module(f"{package.__name__}.cases")
        call = cases.make(cases.CASES[0], torch.Generator().manual_seed(0), torch.float32)
        found[module.name] = {}
        for device in devices:
            there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
            found[module.name][device] = {b.name: b.why_not(**there) for b in operator.backends.values()}
    return found


def _line(value: dict[str, Any] | str) -> str:
    if isinstance(value, str):
        return value
    return "; ".join(f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in value.items())
