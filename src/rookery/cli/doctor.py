"""Say what works on this machine, and why the rest does not."""

import argparse
import json
import os
import platform
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--profile", metavar="MODEL", help="instead: where the time of a token goes in this model")
    parser.add_argument("--quantize", metavar="TYPE", help="with --profile: int8 or int4 (the file's precision)")
    parser.add_argument("--threads", type=int, metavar="N", help="with --profile (all cores; one for a small model)")
    parser.add_argument("--isa", metavar="NAME", help="with --profile: force an instruction set")


def run(args: argparse.Namespace) -> int:
    if args.profile is not None:
        return show_profile(args)
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


def show_profile(args: argparse.Namespace) -> int:
    """Bytes, time and share of the bandwidth of each part of a step."""
    from rookery.engine.llm import model_path
    from rookery.engine.profile import profile
    from rookery.engine.runners.native import NativeRunner

    path = model_path(args.profile or None)
    runner = NativeRunner(path, quantize=args.quantize, threads=args.threads, isa=args.isa)
    found = profile(runner)
    rows = [(part.name, part.nbytes, part.seconds) for part in found.parts]
    rows.append(("between", 0, found.seconds - sum(part.seconds for part in found.parts)))
    rows.append(("step", found.nbytes, found.seconds))
    if args.json:
        parts = [{"part": name, "bytes": nbytes, "seconds": seconds} for name, nbytes, seconds in rows]
        settings = {"model": str(path), "isa": runner.isa, "threads": runner.threads, "active": found.active}
        print(json.dumps({**settings, "read_bandwidth": found.read_bandwidth, "parts": parts}, indent=2))
        return 0
    print(f"{path}: {runner.isa}, {runner.threads} threads, memory read at {found.read_bandwidth / 1e9:.1f} GB/s")
    print(f"{'part':<18}{'MB':>9}{'ms':>9}{'time':>8}{'GB/s':>8}{'bandwidth':>11}")
    for name, nbytes, seconds in rows:
        rate = nbytes / seconds if seconds > 0 else 0.0
        print(
            f"{name:<18}{nbytes / 1e6:>9.2f}{seconds * 1e3:>9.3f}{seconds / found.seconds:>8.1%}"
            f"{rate / 1e9:>8.1f}{rate / found.read_bandwidth:>11.0%}"
        )
    print(f"{1 / found.seconds:.1f} tokens/s; {1 - found.active:.0%} of the channel mixes' hidden units were zero")
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
    found = {"instruction sets": sets, "default": sets[-1], "threads": native.available_cores()}
    return found | ({"note": native.isa_note()} if native.isa_note() else {})


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
