"""Decode and prefill tokens/s of the compiled runtime against the memory bandwidth measured in the same run.

    python benchmarks/decode.py [--model 0.1b] [--dtype bfloat16] [--threads 1 2] [--save]

Weights are random, in a temporary file that stays in the page cache. At batch 1 a step must read every weight but the
embedding, so its ceiling is bandwidth / bytes; readings of as many bytes of ordinary memory (in pages of 2 MB) and of
the mapped file take their turns between the steps. Columns of the channel mix that ReLU² makes unnecessary are not
counted as read (about half of them here; trained models skip more).
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
from support import Machine, Seconds, interleaved, report

from rookery import _native
from rookery.checkpoints.safetensors import write_model
from rookery.checkpoints.source import map_file
from rookery.engine.runners.native import NativeRunner
from rookery.families import rwkv7

STEPS = 8
"""Tokens of one timed round of decoding."""
PROMPT = 512
"""Tokens of one timed prefill."""
VECTOR = 0.3
"""Size of random numbers in vectors; those in matrices keep the scale of their input."""


def random_file(folder: Path, config: rwkv7.RWKV7Config, dtype: np.dtype) -> Path:
    """A model file with weights of a usual size."""
    draw = np.random.default_rng(0)
    pool = draw.standard_normal(1 << 20, dtype=np.float32)
    tensors = {}
    for name, shape in rwkv7.tensor_shapes(config).items():
        count = int(np.prod(shape))
        flat = np.resize(np.roll(pool, int(draw.integers(len(pool)))), count).reshape(shape)
        scale = shape[-1] ** -0.5 if len(shape) == 2 else VECTOR
        tensors[name] = (flat * np.float32(scale) + np.float32("ln" in name and "weight" in name)).astype(dtype)
    path = folder / "random.safetensors"
    write_model(path, tensors, family="rwkv7", config=config, fingerprint="random")
    return path


@contextmanager
def model_or_random(path: str | None, size: str | None) -> Iterator[str | Path | None]:
    """`path`, or for a time a file with random bfloat16 weights of a published size."""
    with tempfile.TemporaryDirectory() as folder:
        yield path if size is None else random_file(Path(folder), rwkv7.PRESETS[size], np.dtype(ml_dtypes.bfloat16))


def model_name(path: str | None, size: str | None, quantize: str | None = None) -> str:
    """What tables call the model of `model_or_random`: a file's name, the size of random weights, or embedded."""
    name = Path(path).name if path else f"random {size}" if size else "embedded"
    return f"{name} {quantize}" if quantize else name


def bytes_of_a_step(config: rwkv7.RWKV7Config, itemsize: int, active: float) -> int:
    """Bytes of weights and state that a token at batch 1 moves, with this share of the channel mix active."""
    total = 0
    for name, shape in rwkv7.tensor_shapes(config).items():
        count = int(np.prod(shape))
        if name == "emb.weight":
            count = config.hidden_size
        elif name.endswith("ffn.value.weight"):
            count = int(active * count)
        wide = len([n for n in shape if n > 1]) < 2 or name.endswith("r_k")  # vectors are kept in float32
        total += count * (4 if wide else itemsize)
    return total + 2 * config.state_nbytes(tokens_seen=1, batch=1, itemsize=4)  # read and written


def decoder(runner: NativeRunner, rows: int) -> Callable[[], None]:
    """A round of decoding: STEPS tokens in each of `rows` states."""
    states = [runner.init_state() for _ in range(rows)]
    ids = [7 * row % runner.config.vocab_size for row in range(rows)]

    def run() -> None:
        for _ in range(STEPS):
            logits = runner.forward(ids, states[0]) if rows == 1 else runner.forward_batch(ids, states)
            ids[:] = logits.argmax(1).tolist()

    return run


def measure(path: Path, config: rwkv7.RWKV7Config, itemsize: int, threads: int, rounds: int) -> dict:
    runner = NativeRunner(path, threads=threads)
    decoder(runner, 1)()
    read, there = runner._model.ffn_reads
    size = bytes_of_a_step(config, itemsize, read / there)
    memory, mapped = np.ones(size, np.uint8), map_file(path)[:size]
    prompt = np.random.default_rng(1).integers(config.vocab_size, size=PROMPT).tolist()
    calls = {
        "read": lambda: [_native.read_memory(memory, threads) for _ in range(STEPS)],
        "read file": lambda: [_native.read_memory(mapped, threads) for _ in range(STEPS)],
        "batch 1": decoder(runner, 1),
        "batch 8": decoder(runner, 8),
        "prefill": lambda: runner.forward(prompt, runner.init_state()),
    }
    seconds: Seconds = interleaved(calls, rounds=rounds)
    low, high = seconds.spread("read", "batch 1")
    return {
        "threads": threads,
        "isa": runner.isa,
        "read GB/s": STEPS * size / seconds.median("read") / 1e9,
        "MB a token": size / 1e6,
        "active": read / there,
        "decode tokens/s": STEPS / seconds.median("batch 1"),
        "share of bandwidth": seconds.ratio("read", "batch 1"),
        "of the file's": seconds.ratio("read file", "batch 1"),
        "spread": f"{low:.2f}-{high:.2f}",
        "batch 8 tokens/s": 8 * STEPS / seconds.median("batch 8"),
        f"prefill {PROMPT} tokens/s": PROMPT / seconds.median("prefill"),
        "best": {
            "decode": STEPS / seconds.best("batch 1"),
            "read GB/s": STEPS * size / seconds.best("read") / 1e9,
            "read file GB/s": STEPS * size / seconds.best("read file") / 1e9,
            "batch 8": 8 * STEPS / seconds.best("batch 8"),
            "prefill": PROMPT / seconds.best("prefill"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.1b", choices=[*rwkv7.PRESETS])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    config, dtype = rwkv7.PRESETS[given.model], np.dtype(getattr(ml_dtypes, given.dtype, given.dtype))
    with tempfile.TemporaryDirectory() as folder:
        path = random_file(Path(folder), config, dtype)
        rows = [
            {"model": given.model, "dtype": given.dtype} | measure(path, config, dtype.itemsize, threads, given.rounds)
            for threads in given.threads
        ]
    report("decode", rows, Machine(threads=max(given.threads)), save=given.save)


if __name__ == "__main__":
    main()
