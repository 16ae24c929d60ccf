"""Many streaming clients at once: `rookery serve` beside llama.cpp's server, the same model and load, in turns.

    python benchmarks/server.py [--llama-bin DIR] [--model 0.1b] [--bits 16] [--clients 64 256] [--seconds 60]
                                [--rounds 2] [--check 100] [--work DIR] [--save]

RWKV-7 with random weights. Every client sends a prompt of 64 tokens (all its own, or 48 shared and 16 its own), reads
the stream of 64 tokens to its end and asks again, until the time is over. Token ids travel, so no tokenizer is timed.
Told are tokens/s, the time to the first token and between tokens (median and 99th percentile), peak memory, errors,
tokens that were asked for and did not come, and, of --check streams of ours drawn at random (0: all), how many differ
from the text that the model writes alone, in another process, with the server gone.
DIR has llama-server and llama-quantize. --save writes benchmarks/results/server-BITS.json.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from inference import Files, library_path
from support import Machine, report

from rookery.engine.llm import LLM

PROMPT, SHARED, ANSWER = 64, 48, 64


@dataclass
class Load:
    """What clients saw."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    errors: int = 0
    lost: int = 0
    told: list[tuple[list[int], int, str]] = field(default_factory=list)
    """Prompt, seed and text of every answer."""


def prompt(seed: int, shared: bool) -> list[int]:
    """Token ids of the printable part of the World vocabulary."""
    common, own = random.Random(0), random.Random(seed)
    head = [common.randrange(300, 60000) for _ in range(SHARED if shared else 0)]
    return head + [own.randrange(300, 60000) for _ in range(PROMPT - len(head))]


async def client(http: httpx.AsyncClient, number: int, shared: bool, until: float, load: Load) -> None:
    """Asks again and again; what is open at the end is read to its end and counts by its tokens in time."""
    turn = 0
    while time.perf_counter() < until:
        turn += 1
        body = {
            "prompt": prompt(1000 * number + turn, shared),
            "max_tokens": ANSWER,
            "temperature": 1.0,
            "top_p": 0.9,
            "seed": turn,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {"0": -100},
            "ignore_eos": True,
        }
        began = last = time.perf_counter()
        seen = in_time = written = 0
        pieces = []
        try:
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    raise httpx.HTTPError(str(reply.status_code))
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now, event = time.perf_counter(), json.loads(line.removeprefix("data: "))
                    if event.get("usage"):
                        written = event["usage"]["completion_tokens"]
                    if not event.get("choices") or not (piece := event["choices"][0]["text"]):
                        continue
                    pieces.append(piece)
                    (load.first if seen == 0 else load.between).append(now - (began if seen == 0 else last))
                    last, seen, in_time = now, seen + 1, in_time + (now < until)
            load.answers += 1
            load.lost += ANSWER - written
            # a token may have no text of its own, so that pieces count only where an answer was cut by the time
            load.tokens += written if time.perf_counter() < until else in_time
            load.told.append((body["prompt"], turn, "".join(pieces)))
        except (httpx.HTTPError, KeyError, ValueError):
            load.errors += 1
            await asyncio.sleep(0.1)


async def drive(address: str, clients: int, shared: bool, seconds: float) -> Load:
    """The load of so many clients for so long."""
    load = Load()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(client(http, number, shared, until, load) for number in range(clients)))
    return load


@contextmanager
def running(words: list[str], env: dict[str, str] | None = None):
    """A server as a process; gives its address and its number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*words, "--port", str(port)]
    environment = {**os.environ, **(env or {})}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(1800):
                try:
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
            else:
                raise RuntimeError(f"{words[0]} did not start")
            yield address, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()


def peak_megabytes(pid: int) -> float:
    """Peak resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def different(llm: Any, load: Load, count: int) -> tuple[int, int]:
    """How many answers were compared with the model's lone text, and how many of them are not it."""
    some = load.told if not count else random.Random(0).sample(load.told, min(count, len(load.told)))
    how = {"temperature": 1.0, "top_p": 0.9, "logit_bias": {0: -float("inf")}}
    return len(some), sum(text != llm.generate(prompt, ANSWER, seed=seed, **how) for prompt, seed, text in some)


def measured(load: Load, pid: int, seconds: float) -> dict[str, float]:
    """The figures of one turn of one server."""

    def percentile(values: list[float], share: float) -> float:
        return 1e3 * sorted(values)[int(share * (len(values) - 1))] if values else float("nan")

    return {
        "tokens/s": load.tokens / seconds,
        "first ms p50": percentile(load.first, 0.5),
        "first ms p99": percentile(load.first, 0.99),
        "token ms p50": percentile(load.between, 0.5),
        "token ms p99": percentile(load.between, 0.99),
        "peak MB": peak_megabytes(pid),
        "answers": load.answers,
        "errors": load.errors,
        "lost": load.lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bin", type=Path, help="folder with llama-server and llama-quantize")
    parser.add_argument("--model", default="0.1b")
    parser.add_argument("--bits", default="16", choices=("16", "8", "4"))
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--check", type=int, default=100, help="streams compared with their lone run; 0: all")
    parser.add_argument("--work", type=Path, help="where models are kept (a temporary folder)")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    cores = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        files = Files(given.work or Path(folder), given.llama_bin)
        rows: list[dict[str, Any]] = []
        for clients in given.clients:
            servers = {"rookery": ([*rookery(files, given, clients), "--threads", cores], None)}
            if given.llama_bin:
                servers["llama.cpp"] = ([*llama(files, given, clients), "-t", cores], library_path(given.llama_bin))
            for shared in (False, True):
                found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
                for _ in range(given.rounds):
                    for name, (words, env) in servers.items():
                        with running(words, env) as (address, pid):
                            load = asyncio.run(drive(address, clients, shared, given.seconds))
                            found[name].append(measured(load, pid, given.seconds))
                        if name == "rookery":
                            llm = LLM(files.rookery(given.model, given.bits), tokenizer="world", threads=int(cores))
                            pair = dict(zip(("checked", "different"), different(llm, load, given.check)))
                            found[name][-1] |= pair
                for name, turns in found.items():
                    row: dict[str, Any] = {"clients": clients, "prompts": "shared" if shared else "own", "server": name}
                    row |= {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
                    if name == "rookery" and "llama.cpp" in found:
                        pairs = zip(turns, found["llama.cpp"])
                        row["ratio"] = statistics.median(a["tokens/s"] / max(b["tokens/s"], 1e-9) for a, b in pairs)
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr)
        report(f"server-{given.bits}", rows, Machine(threads=int(cores)), save=given.save)


def rookery(files: Files, given: argparse.Namespace, clients: int) -> list[str]:
    words = [sys.executable, "-m", "rookery", "serve", str(files.rookery(given.model, given.bits)), "--name", "m"]
    return [*words, "--rows", str(min(clients, 64)), "--queue", "1024", "--tokenizer", "world"]


def llama(files: Files, given: argparse.Namespace, clients: int) -> list[str]:
    slots = min(clients, 64)
    context = slots * (PROMPT + ANSWER + 16)
    model = files.gguf(given.model, given.bits)
    words = [str(given.llama_bin / "llama-server"), "-m", str(model), "-np", str(slots), "-c", str(context)]
    return [*words, "--no-webui", "-tb", str(len(os.sched_getaffinity(0)))]


if __name__ == "__main__":
    main()
