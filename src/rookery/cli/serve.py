"""Serve models to every client that speaks OpenAI's protocol, and to a browser: http://127.0.0.1:8000.

Answers are made side by side. SIGTERM and Ctrl-C let open ones end first.
"""

import argparse
import functools
import logging
import os
import sys
from collections import Counter
from typing import Any

from rookery.cli.options import add_model, load_llm
from rookery.errors import MissingDependency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="files, folders or Hub ids (the embedded model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--name", action="append", default=[], help="name of a model, in their order (its file's)")
    parser.add_argument(
        "--swap", action="append", default=[], metavar="NAME=FILE", help="adapter or tuned state of the first model"
    )
    parser.add_argument("--template", metavar="NAME", help="form of conversation: g1, world, raven (by file name)")
    parser.add_argument("--keys", metavar="FILE", help="API keys that are let in; `--new-key` makes one")
    parser.add_argument("--new-key", metavar="NAME", help="make a key, print it and the line for the file, and stop")
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="let this web page use the server"
    )
    group = parser.add_argument_group("several machines")
    group.add_argument("--ray", action="store_true", help="serve from replicas in a Ray cluster; needs --state-folder")
    group.add_argument("--ray-address", metavar="ADDRESS", help="of a running cluster, or auto (one on this machine)")
    group.add_argument(
        "--replicas", default="1", metavar="N[:M]", help="at least N, and up to M while texts wait (%(default)s)"
    )
    group = parser.add_argument_group("limits")
    group.add_argument("--rows", type=int, default=64, metavar="N", help="texts written at a time (%(default)s)")
    group.add_argument("--queue", type=int, default=256, metavar="N", help="texts that may wait (%(default)s)")
    group.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="of one answer (%(default)s)")
    group.add_argument("--timeout", type=float, default=600, metavar="S", help="of one answer, seconds (%(default)s)")
    group.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="of a request (%(default)s)")
    group.add_argument("--states", type=int, default=256 << 20, metavar="BYTES", help="of kept states (%(default)s)")
    group.add_argument(
        "--state-folder", metavar="DIR", help="kept states are files there, which outlive the server (memory only)"
    )
    group.add_argument("--state-disk", type=int, default=16 << 30, metavar="BYTES", help="of that folder (%(default)s)")
    group.add_argument("--expiry", type=float, default=86400, metavar="S", help="of unused states (%(default)s)")
    group.add_argument("--drain", type=float, default=30, metavar="S", help="for open answers at the end (%(default)s)")
    add_model(parser)


def run(given: argparse.Namespace) -> int:
    if given.new_key:
        from rookery.serve.keys import new_key

        key, line = new_key(given.new_key)
        print(f"{key}\n{line}")
        print(
            "the first line is the key, which is shown only now; put the second into the file for --keys",
            file=sys.stderr,
        )
        return 0
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if given.ray:
        return clustered(given)
    app = application(given)
    welcome(given, f"serves {', '.join(app.state.models)}")
    from rookery.serve.app import serve

    serve(app, given.host, given.port, drain=given.drain)
    return 0


def application(given: argparse.Namespace, place: str = "") -> Any:
    """The models that were asked for, as an ASGI application; `place` names this process in the ids that it makes."""
    try:
        from rookery.serve.app import create_app, names_of
    except ModuleNotFoundError as missing:
        raise MissingDependency(f'the server needs {missing.name}: pip install "rookery[serve]"') from None
    from rookery.serve.keys import Keys

    keys = Keys.read(given.keys) if given.keys else None
    paths = given.models or [given.model]
    names = [given.name[i] if i < len(given.name) else name for i, name in enumerate(names_of(paths))]
    models = {}
    for name, path in zip(names, paths):
        print(f"loading {name}", file=sys.stderr)
        models[name] = load_llm(argparse.Namespace(**{**vars(given), "model": path}), given.template, preload=True)
    parent, first = next(iter(models.items()))
    swaps = swapped(given, first)
    if taken := [name for name in swaps if name in models]:
        raise ValueError(f"--swap names {taken[0]!r}, which a model has already; give another name")
    return create_app(
        models | swaps,
        limits=limits_of(given),
        keys=keys,
        parents=dict.fromkeys(swaps, parent),
        origins=given.cors,
        folder=given.state_folder,
        place=place,
    )


def limits_of(given: argparse.Namespace) -> Any:
    """The server's limits."""
    from rookery.serve.hosting import Limits

    return Limits(
        rows=given.rows,
        queue=given.queue,
        max_tokens=given.max_tokens,
        seconds=given.timeout,
        body=given.max_body,
        states=given.states,
        disk=given.state_disk,
        expiry=given.expiry,
    )


def welcome(given: argparse.Namespace, what: str) -> None:
    """Says where the server is."""
    if given.host not in ("127.0.0.1", "localhost", "::1") and not given.keys:
        print("everybody who reaches this address may use the server: consider --keys", file=sys.stderr)
    print(f"http://{given.host}:{given.port} {what}; Ctrl-C ends it", file=sys.stderr)


def clustered(given: argparse.Namespace) -> int:
    """Serves from replicas in a Ray cluster."""
    if not given.state_folder:
        raise ValueError(
            "--ray needs --state-folder DIR, a folder that all machines share: replicas hand conversations over in it"
        )
    least, _, most = given.replicas.partition(":")
    if not (least.isdigit() and (most or least).isdigit() and 1 <= int(least) <= int(most or least)):
        raise ValueError(f"--replicas takes a number, or the least and the most as 2:8, got {given.replicas!r}")
    # Ray reports its use to its makers unless it is told not to, and only its environment tells it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from rookery.serve.cluster import Size, run
    except ModuleNotFoundError as missing:
        raise MissingDependency(f'--ray needs {missing.name}: pip install "rookery[cluster]"') from None
    # replicas have working folders of their own
    given.state_folder = os.path.abspath(given.state_folder)
    given.models = [os.path.abspath(path) if os.path.exists(path) else path for path in given.models]
    for name in ("model", "keys"):
        if (path := getattr(given, name)) and os.path.exists(path):
            setattr(given, name, os.path.abspath(path))
    size = Size(int(least), int(most or least), given.threads or 1, int((given.device or "").startswith("cuda")))
    run(
        functools.partial(application, given),
        host=given.host,
        port=given.port,
        limits=limits_of(given),
        size=size,
        drain=given.drain,
        address=given.ray_address,
        ready=lambda: welcome(given, f"serves from {given.replicas} replicas"),
    )
    return 0


def swapped(given: argparse.Namespace, first: Any) -> dict[str, Any]:
    """Adapters and tuned states of the first model by name; all share its weights.

    An adapter answers as the merged model would, a tuned state is where its texts start.
    """
    pairs = [swap.partition("=") for swap in given.swap]
    if wrong := next((swap for swap, pair in zip(given.swap, pairs) if not all(pair)), None):
        raise ValueError(f"--swap takes NAME=FILE, got {wrong!r}")
    if twice := next((name for name, count in Counter(name for name, _, _ in pairs).items() if count > 1), None):
        raise ValueError(f"--swap names {twice!r} twice; give each file a name of its own")
    from rookery.checkpoints.hub import local
    from rookery.checkpoints.tuned_state import find_tuned_state

    states = {name: file for name, _, file in pairs if find_tuned_state(local(file))}
    adapters = {name: file for name, _, file in pairs if name not in states}
    found = {name: first.starting_from(file) for name, file in states.items()}
    return found | (adapted(given, adapters, first) if adapters else {})


def adapted(given: argparse.Namespace, files: dict[str, str], first: Any) -> dict[str, Any]:
    """Adapters of the first model by name; those that its runner cannot swap run on torch, which then holds it, too."""
    from rookery.errors import BackendUnavailable

    in_torch, found = None, {}
    for name, file in files.items():
        try:
            found[name] = first.adapted(file, alpha=given.adapter_alpha)
        except BackendUnavailable as reason:
            if in_torch is None:
                from rookery.engine.llm import LLM
                from rookery.engine.runners.torch import TorchRunner

                print(f"{reason}; torch holds the model for this one, too", file=sys.stderr)
                runner, how = TorchRunner.load(first.path), {"tokenizer": first.tokenizer, "template": given.template}
                in_torch = LLM.from_runner(runner, **how)
            found[name] = in_torch.adapted(file, alpha=given.adapter_alpha)
    return found
