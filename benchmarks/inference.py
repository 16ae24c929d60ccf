"""Decode, prefill, batches, start and memory of rookery beside llama.cpp, the `rwkv` package and fla, in one run.

    python benchmarks/inference.py [--llama-bin DIR] [--models 0.1b 0.4b 1.5b:8,4] [--threads 1 2] [--formats 16 8 4]
                                   [--rounds 5] [--work DIR] [--save]

`1.5b:8,4` measures a model in these formats alone.

RWKV-7 with random weights at the published shapes, each in 16 bits (bfloat16), 8 (int8; Q8_0) and 4 (int4 with an
8-bit head; Q4_0 as `llama-quantize` makes it, with a Q6_K head). Every contender is a process of its own, pinned to
its cores; they take turns, and the ratios are medians over the rounds. DIR of --llama-bin has llama-bench,
llama-batched-bench and llama-quantize; the `rwkv` package and fla's model for transformers are measured in 16 bits
where they are installed and run, and a line says why where they do not.
The read bandwidth is measured by rookery's process between its own steps; "roofline" is the bytes that a step moves by
its time and that bandwidth. --save writes benchmarks/results/inference.json, .md and, with matplotlib, .png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from support import RESULTS, Machine

from rookery.families import rwkv7

QUANTIZE = {"16": None, "8": "int8", "4": "int4"}
LLAMA = {"16": "bf16", "8": "q8_0", "4": "q4_0"}
UBATCH = 512


@dataclass
class Setup:
    """What a measurement is told."""

    model: str
    bits: str
    threads: int
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])
    prefill: list[int] = field(default_factory=lambda: [512, 2048])
    steps: int = 32


def random_file(path: Path, config: rwkv7.RWKV7Config) -> None:
    """A bfloat16 model with weights of a usual size."""
    from rookery.checkpoints.safetensors import write_model
    from rookery.checkpoints.source import Stored

    draw = np.random.default_rng(0)
    pool = draw.standard_normal(1 << 20, dtype=np.float32)
    dtype = np.dtype(ml_dtypes.bfloat16)

    def values(name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
        flat = np.resize(np.roll(pool, offset), int(np.prod(shape))).reshape(shape)
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        return (flat * np.float32(scale) + np.float32("ln" in name and "weight" in name)).astype(dtype)

    tensors = {}
    for name, shape in rwkv7.tensor_shapes(config).items():
        offset = int(draw.integers(len(pool)))
        read = lambda n=name, s=shape, o=offset: values(n, s, o)  # noqa: E731
        tensors[name] = Stored(shape, dtype, read, "bfloat16", 2 * int(np.prod(shape)))
    write_model(path, tensors, family="rwkv7", config=config, fingerprint="random")


class Files:
    """The models of all contenders, made when they are first asked for."""

    def __init__(self, folder: Path, llama: Path | None) -> None:
        self.folder, self.llama = folder, llama

    def rookery(self, model: str, bits: str) -> Path:
        path = self.folder / f"{model}.safetensors"
        if not path.exists():
            random_file(path, rwkv7.PRESETS[model])
        return path if bits == "16" else self._converted(path, f"{model}-{QUANTIZE[bits]}.safetensors", QUANTIZE[bits])

    def gguf(self, model: str, bits: str) -> Path:
        whole = self._converted(self.rookery(model, "16"), f"{model}-bf16.gguf", "bfloat16")
        path = self.folder / f"{model}-{LLAMA[bits]}.gguf"
        if not path.exists():
            words = [str(self.llama / "llama-quantize"), str(whole), str(path), LLAMA[bits].upper()]
            run(words, env=library_path(self.llama))
        return path

    def pth(self, model: str) -> Path:
        return self._converted(self.rookery(model, "16"), f"rwkv7-{model}.pth", None)

    def fla(self, model: str) -> Path:
        return self._converted(self.rookery(model, "16"), f"{model}-fla", None, to="fla")

    def _converted(self, source: Path, name: str, dtype: str | None, to: str | None = None) -> Path:
        from rookery.checkpoints.convert import convert

        path = self.folder / name
        if not path.exists():
            convert(source, path, dtype=dtype, to=to)
        return path


def library_path(folder: Path) -> dict[str, str]:
    known = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{known}" if known else str(folder)}


def pinned(threads: int) -> Callable[[], None]:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return lambda: os.sched_setaffinity(0, cores)


def run(words: list[str], threads: int | None = None, env: dict[str, str] | None = None) -> str:
    """What a program says on stdout; the benchmark ends with its last words where it fails."""
    before = pinned(threads) if threads else None
    env = {**(env or os.environ), "OMP_NUM_THREADS": str(threads or 1)}
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, preexec_fn=before)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def lines_of_json(text: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in text.splitlines() if line.startswith("{"))


# ---- contenders: each gives figure -> value


def rookery_worker(path: str, setup: Setup) -> dict[str, float]:
    """Runs in a process of its own; every figure is the best of three turns, between which the others take theirs."""
    from rookery import _native
    from rookery.engine.profile import step_bytes
    from rookery.engine.runners.native import NativeRunner

    runner = NativeRunner(path, threads=setup.threads, preload=True)
    draw = np.random.default_rng(1)
    prompt = draw.integers(1, runner.config.vocab_size, size=max(setup.prefill)).tolist()

    def decoder(rows: int) -> Callable[[], float]:
        states = [runner.init_state() for _ in range(rows)]
        ids = prompt[:rows]
        steps = max(4, setup.steps // rows)

        def decode() -> float:
            start = time.perf_counter()
            for _ in range(steps):
                ids[:] = runner.forward_batch(ids, states).argmax(1).tolist()
            return rows * steps / (time.perf_counter() - start)

        return decode

    def prefill(count: int) -> float:
        start = time.perf_counter()
        runner.forward(prompt[:count], runner.init_state())
        return count / (time.perf_counter() - start)

    decoder(1)()
    reads, there = runner._model.ffn_reads
    nbytes = sum(step_bytes(runner, reads / there).values())
    memory = np.ones(nbytes, np.uint8)

    def read() -> float:
        start = time.perf_counter()
        for _ in range(8):
            _native.read_memory(memory, setup.threads)
        return 8 * nbytes / (time.perf_counter() - start)

    calls = {"read": read} | {f"decode {rows}": decoder(rows) for rows in setup.batches}
    calls |= {f"prefill {count}": lambda count=count: prefill(count) for count in setup.prefill}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            taken[name].append(call())
    figures = {name: max(values) for name, values in taken.items()}
    return figures | {"bytes": nbytes, "roofline": figures["decode 1"] * nbytes / figures["read"]}


def rookery(files: Files, setup: Setup) -> dict[str, float]:
    path = files.rookery(setup.model, setup.bits)
    words = [sys.executable, __file__, "--worker", json.dumps({"path": str(path), **asdict(setup)})]
    return json.loads(run(words, setup.threads).splitlines()[-1])


def llama(files: Files, setup: Setup) -> dict[str, float]:
    """llama-bench and llama-batched-bench; the best of three repetitions, as for rookery."""
    path, env = files.gguf(setup.model, setup.bits), library_path(files.llama)
    common = ["-m", str(path), "-t", str(setup.threads)]
    prompts = ",".join(map(str, setup.prefill))
    words = [str(files.llama / "llama-bench"), *common, "-p", prompts, "-n", str(setup.steps), "-r", "3"]
    words += ["-b", "2048", "-ub", str(UBATCH), "-o", "jsonl"]
    figures = {}
    for row in lines_of_json(run(words, setup.threads, env)):
        name = f"prefill {row['n_prompt']}" if row["n_prompt"] else "decode 1"
        figures[name] = max(row["samples_ts"])
    rows = [n for n in setup.batches if n > 1]
    if rows:
        steps = max(8, setup.steps // 4)
        words = [
            str(files.llama / "llama-batched-bench"),
            *common,
            "-tb",
            str(setup.threads),
            "-c",
            "4096",
            "-b",
            "512",
        ]
        words += ["-ub", str(UBATCH), "-npp", "4", "-ntg", str(steps), "-npl", ",".join(map(str, rows))]
        for row in lines_of_json(run([*words, "--output-format", "jsonl"], setup.threads, env)):
            figures[f"decode {row['pl']}"] = row["speed_tg"]
    return figures


RWKV = """
import contextlib, io, json, os, sys, time
os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
import torch
path, threads, prefill, steps = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
with contextlib.redirect_stdout(io.StringIO()):
    from rwkv.model import RWKV
    models = {kind: RWKV(model=path, strategy=f"cpu {kind}") for kind in ("fp32", "bf16")}
found = {}
with torch.no_grad():
    for model in models.values():  # the faster of its two types counts
        prompt = [(i * 7919) % 50000 + 1 for i in range(max(prefill))]
        state = model.forward(prompt[:32], None)[1]
        for _ in range(2):
            start, token = time.perf_counter(), 7
            for _ in range(steps):
                out, state = model.forward([token], state)
                token = int(out.argmax())
            found["decode 1"] = max(found.get("decode 1", 0), steps / (time.perf_counter() - start))
        for count in prefill[:1]:
            for _ in range(2):
                start = time.perf_counter()
                model.forward(prompt[:count], None)
                name = f"prefill {count}"
                found[name] = max(found.get(name, 0), count / (time.perf_counter() - start))
print(json.dumps(found))
"""


def rwkv_package(files: Files, setup: Setup) -> dict[str, float]:
    return in_python(RWKV, str(files.pth(setup.model)).removesuffix(".pth"), setup)


FLA = """
import json, sys, time
import torch
from fla.models.rwkv7 import RWKV7ForCausalLM
path, threads, prefill, steps = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
model, found = RWKV7ForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), {}
prompt = [(i * 7919) % 50000 + 1 for i in range(prefill[0])]
with torch.inference_mode():
    for _ in range(2):
        start = time.perf_counter()
        out = model(torch.tensor([prompt]), use_cache=True)
        name = f"prefill {prefill[0]}"
        found[name] = max(found.get(name, 0), prefill[0] / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        found["decode 1"] = max(found.get("decode 1", 0), steps / (time.perf_counter() - start))
print(json.dumps(found))
"""


def fla(files: Files, setup: Setup) -> dict[str, float]:
    return in_python(FLA, str(files.fla(setup.model)), setup)


def in_python(program: str, path: str, setup: Setup) -> dict[str, float]:
    """What one of the Python contenders finds; DoesNotRun with the last line of its complaint."""
    arguments = [path, str(setup.threads), json.dumps(setup.prefill), str(max(4, setup.steps // 4))]
    try:
        return json.loads(run([sys.executable, "-c", program, *arguments], setup.threads).splitlines()[-1])
    except SystemExit as complaint:
        raise DoesNotRun(str(complaint).strip().splitlines()[-1]) from None


class DoesNotRun(Exception):
    """A contender that does not run here."""


OTHERS: dict[str, Callable[[Files, Setup], dict[str, float]]] = {"rwkv": rwkv_package, "fla": fla}


# ---- start to first token


def started(words: list[str], threads: int, env: dict[str, str] | None = None) -> tuple[float, float]:
    """Seconds of a fresh process and MB of its peak memory, mapped pages of the model among them."""
    start = time.perf_counter()
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(
        words, env=env, stdin=nothing, stdout=nothing, stderr=nothing, preexec_fn=pinned(threads)
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = status
    if status:
        raise SystemExit(f"{' '.join(words)} ended with {status}")
    return seconds, used.ru_maxrss / 1024


def start(files: Files, model: str, bits: str, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Contender -> seconds and peak MB, medians; llama-bench reads one token without warming up."""
    program = "import sys; from rookery.cli.main import main; sys.exit(main())"
    options = ["generate", "--max-tokens", "1", "--model", str(files.rookery(model, bits)), "--threads", str(threads)]
    calls = {"rookery": ([sys.executable, "-c", program, *options, "a"], None)}
    if files.llama:
        words = [str(files.llama / "llama-bench"), "-m", str(files.gguf(model, bits)), "-t", str(threads), "-p", "1"]
        calls["llama.cpp"] = ([*words, "-n", "0", "-r", "1", "--no-warmup"], library_path(files.llama))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, (words, env) in calls.items():
            found = started(words, threads, env)
            if turn >= 0:
                taken[name].append(found)
    return {
        name: {"seconds": statistics.median(t for t, _ in found), "peak MB": statistics.median(m for _, m in found)}
        for name, found in taken.items()
    }


# ---- the run and what is written


def measure(files: Files, setups: list[Setup], rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each setup and figure, medians of all contenders and of rookery's ratios to them; contender -> why it
    does not run.
    """
    contenders: dict[str, Callable[[Files, Setup], dict[str, float]]] = {"rookery": rookery}
    if files.llama:
        contenders["llama.cpp"] = llama
    contenders |= OTHERS
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    absent: dict[str, str] = {}
    for turn in range(rounds):
        for i, setup in enumerate(setups):
            for name, contender in contenders.items():
                if name in absent or (name in OTHERS and setup.bits != "16"):
                    continue
                try:
                    found.setdefault((i, name), []).append(contender(files, setup))
                except DoesNotRun as why:
                    absent[name] = str(why)
                    continue
                what = f"{setup.model}, {setup.bits} bits, {setup.threads} threads, {name}"
                print(f"round {turn + 1} of {rounds}: {what}", file=sys.stderr)
    rows = []
    for i, setup in enumerate(setups):
        own = found[i, "rookery"]
        for figure in own[0]:
            row: dict[str, Any] = {"model": setup.model, "bits": setup.bits, "threads": setup.threads, "figure": figure}
            row["rookery"] = statistics.median(turn[figure] for turn in own)
            for name in contenders:
                theirs = found.get((i, name), [])
                if name != "rookery" and len(theirs) == rounds and figure in theirs[0]:
                    ratios = [mine[figure] / other[figure] for mine, other in zip(own, theirs, strict=True)]
                    row[name] = statistics.median(turn[figure] for turn in theirs)
                    row[f"times {name}"] = statistics.median(ratios)
                    row[f"times {name}, spread"] = [min(ratios), max(ratios)]
            rows.append(row)
    return rows, absent


def markdown(rows: list[dict[str, Any]], starts: list[dict[str, Any]], absent: dict[str, str], machine: Machine) -> str:
    """The tables; tokens/s unless said otherwise."""
    text = [f"# Inference on {machine.device}, {machine.cores} cores ({' '.join(machine.extensions)})", ""]
    names = [name for name in ("llama.cpp", *OTHERS) if any(name in row for row in rows)]
    heads = ["model", "bits", "threads", "figure", "rookery", *(h for name in names for h in (name, f"times {name}"))]
    text += [
        "Tokens a second; medians of the rounds, and medians of the ratios.",
        "",
        _row(heads),
        _row(["---"] * len(heads)),
    ]
    for row in rows:
        if row["figure"] in ("bytes", "read", "roofline"):
            continue
        text.append(_row([_cell(row.get(head, "")) for head in heads]))
    text += ["", *(f"{name} does not run here: {why}\n" for name, why in absent.items())]
    text += [
        "Bytes that a step at batch 1 moves, bandwidth measured in the same process, and the share of it in use.",
        "",
    ]
    text += [_row(["model", "bits", "threads", "MB a token", "read GB/s", "share"]), _row(["---"] * 6)]
    keys = dict.fromkeys((row["model"], row["bits"], row["threads"]) for row in rows)
    value = {(row["model"], row["bits"], row["threads"], row["figure"]): row["rookery"] for row in rows}
    for key in keys:
        nbytes, read, share = (value[*key, figure] for figure in ("bytes", "read", "roofline"))
        text.append(_row([*map(str, key), f"{nbytes / 1e6:.0f}", f"{read / 1e9:.1f}", f"{share:.0%}"]))
    text += ["", "From the shell to the first token; peak memory counts the mapped pages of the model.", ""]
    text += [_row(["model", "bits", "threads", "contender", "seconds", "peak MB"]), _row(["---"] * 6)]
    text += [_row([_cell(value) for value in row.values()]) for row in starts]
    return "\n".join(text) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Rookery's speed as multiples of llama.cpp's; nothing where there is none or no matplotlib."""
    shown = [row for row in rows if "times llama.cpp" in row]
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    if not shown:
        return
    figures = list(dict.fromkeys(row["figure"] for row in shown))
    groups = list(dict.fromkeys((row["model"], row["threads"]) for row in shown))
    fig, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.5), sharey=True, squeeze=False)
    for axis, group in zip(axes[0], groups):
        for n, bits in enumerate(dict.fromkeys(row["bits"] for row in shown)):
            times = {row["figure"]: row["times llama.cpp"] for row in shown
                     if (row["model"], row["threads"]) == group and row["bits"] == bits}  # fmt: skip
            places = [i + 0.27 * (n - 1) for i, figure in enumerate(figures) if figure in times]
            axis.bar(places, [times[figure] for figure in figures if figure in times], 0.25, label=f"{bits} bits")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(figures)), figures, rotation=30, ha="right", fontsize=8)
        axis.set_title(f"{group[0]}, {group[1]} thread{'s' if group[1] > 1 else ''}", fontsize=9)
    axes[0][0].set_ylabel("times llama.cpp")
    axes[0][0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--models", nargs="+", default=["0.1b", "0.4b"], help=f"of {', '.join(rwkv7.PRESETS)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=["16", "8", "4"], choices=[*QUANTIZE])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=32, help="tokens of one timed round of decoding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep the random models in this folder")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        told = json.loads(given.worker)
        print(json.dumps(rookery_worker(told.pop("path"), Setup(**told))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        files = Files(work, given.llama_bin)
        formats = {
            model: some.split(",") if some else given.formats
            for model, _, some in (word.partition(":") for word in given.models)
        }
        setups = [
            Setup(model, bits, threads, given.batches, given.prefill, given.steps)
            for model, some in formats.items()
            for bits in some
            for threads in given.threads
        ]
        rows, absent = measure(files, setups, given.rounds)
        starts = [
            {"model": model, "bits": bits, "threads": max(given.threads), "contender": name, **figures}
            for model, some in formats.items()
            for bits in some
            for name, figures in start(files, model, bits, max(given.threads), given.rounds).items()
        ]
    machine = Machine(threads=max(given.threads))
    text = markdown(rows, starts, absent, machine)
    print(text)
    if given.save:
        RESULTS.mkdir(exist_ok=True)
        content = {
            "benchmark": "inference",
            "machine": asdict(machine),
            "rows": rows,
            "absent": absent,
            "start": starts,
        }
        (RESULTS / "inference.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "inference.md").write_text(text, encoding="utf-8")
        plot(rows, RESULTS / "inference.png")


if __name__ == "__main__":
    main()
