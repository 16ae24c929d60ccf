"""Memory and tokens/s of compressed models (RWKV-Lite) beside their originals, with the share of hidden units forced.

    python benchmarks/lite.py [--models rwkv7-0.1b rwkv7-0.4b rwkv5-0.4b] [--threads 1 2] [--save]

Weights are random, in bfloat16, in temporary files. Projections have rank width / 8; a one-bit shadow chooses 20, 30 or
50% of the hidden units of every token, while the network beside it, of 64 hidden units, is computed and never speaks;
the cache has 1,000 rows; of 200 clusters of equal size 20 are computed.

"formula MB" is the memory model of RWKV-Lite for the matrices alone, "with vectors MB" that of `rookery.engine.memory`,
"resident MB" what the runtime counted while it wrote, "float16 /" the original's bytes by each. "mapped MB" are the
pages of the file that the process had mapped afterwards: the system maps 64 KB around each byte that is read as long as
memory is free. With "lean" the runtime copies what a token needs from the file instead.
"""

import argparse
import re
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from decode import STEPS, decoder
from support import Machine, interleaved, report

from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.checkpoints.lite import Head, LowRank, Manifest, Sparsity, compressed, read_manifest
from rookery.checkpoints.safetensors import write_model
from rookery.engine.memory import PARTS, PROJECTION, formula
from rookery.engine.runners.lite import resident_bytes
from rookery.engine.runners.native import NativeRunner
from rookery.registry import configure

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARES = (0.2, 0.3, 0.5)
SIZES = {"0.1b": (768, 12), "0.4b": (1024, 24)}


class Draw:
    """Random numbers of a usual size, fast."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(0)
        self.pool = self.draw.standard_normal(1 << 20, dtype=np.float32)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        flat = np.resize(np.roll(self.pool, int(self.draw.integers(len(self.pool)))), count).reshape(shape)
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        return (flat * np.float32(scale) + np.float32("ln" in name and "weight" in name)).astype(BFLOAT16)


def config_of(name: str):
    """Family and config of "rwkv7-0.1b" or, with the hidden units of RWKV-5.2, "rwkv5-0.4b"."""
    family, size = name.split("-")
    if family == "rwkv7":
        return configure(name)
    width, layers = SIZES[size]
    hidden = int(3.5 * width) // 32 * 32
    return configure(family, hidden_size=width, num_hidden_layers=layers, intermediate_size=hidden, vocab_size=65536)


def plain_file(path: Path, name: str) -> None:
    family, config = config_of(name)
    draw = Draw()
    tensors = {key: draw.tensor(key, shape) for key, shape in family.tensor_shapes(config).items()}
    write_model(path, tensors, family=family.name, config=config, fingerprint="random")


def lite_file(path: Path, name: str, share: float, int8: bool) -> None:
    """A compressed model whose tokens use exactly this share of the hidden units."""
    family, config = config_of(name)
    width, layers, vocab, hidden = (
        config.hidden_size, config.num_hidden_layers, config.vocab_size, config.intermediate_size,
    )  # fmt: skip
    manifest = Manifest(
        low_rank=LowRank(divisor=8),
        sparsity=Sparsity(rank=64, bits=1, thresholds=[1.0] * layers, quantiles=[1 - share] * layers),
        embedding_rows=1000,
        head=Head(clusters=200, fewest=20, most=20),
        int8=int8,
    )
    draw, tensors = Draw(), {}
    for key, shape in family.tensor_shapes(config).items():
        if PROJECTION.fullmatch(key) and shape[0] == shape[1]:
            stem = key.removesuffix(".weight")
            tensors |= {
                f"{stem}{i}.weight": draw.tensor(key, s)
                for i, s in ((1, (width // 8, width)), (2, (width, width // 8)))
            }
        else:
            tensors["head.sorted.weight" if key == "head.weight" else key] = draw.tensor(key, shape)
    for i in range(layers):
        tensors[f"blocks.{i}.mlp.fc1.weight"] = draw.tensor("fc1", (64, width))
        tensors[f"blocks.{i}.mlp.fc2.weight"] = draw.tensor("fc2", (hidden, 64))
        tensors[f"blocks.{i}.ffn.shadow"] = draw.draw.integers(256, size=(1, hidden, width // 8), dtype=np.uint8)
    tensors["head_l1.weight"] = draw.tensor("head_l1", (200, width))
    tensors["head.order"] = draw.draw.permutation(vocab).astype(np.int32)
    tensors["head.starts"] = np.linspace(0, vocab, 201).astype(np.int32)
    written, metadata = compressed(tensors, manifest, BFLOAT16)
    write_model(path, written, family=family.name, config=config, fingerprint="random", metadata=metadata)


def mapped_bytes(path: Path) -> int:
    """Bytes of a file that this process has mapped and present."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def matrices(sizes) -> float:
    """Bytes of the formula but for what it leaves out: vectors, other low-rank maps."""
    return sum(sizes[part] for part in PARTS if part != "the rest")


def measure(folder: Path, name: str, threads: int, rounds: int) -> list[dict]:
    files = {"float16": folder / "plain.safetensors"}
    plain_file(files["float16"], name)
    for share in SHARES:
        files[f"{share:.0%}"] = folder / f"{share}.safetensors"
        lite_file(files[f"{share:.0%}"], name, share, int8=False)
    files["20%, int8"] = folder / "int8.safetensors"
    lite_file(files["20%, int8"], name, 0.2, int8=True)
    runners = {what: NativeRunner(path, threads=threads) for what, path in files.items()}
    for what in [what for what in files if what != "float16"]:  # under names of their own, to count their pages apart
        files[f"{what}, lean"] = folder / f"lean {files[what].name}"
        files[f"{what}, lean"].hardlink_to(files[what])
        runners[f"{what}, lean"] = NativeRunner(files[f"{what}, lean"], threads=threads, lean=True)
    before = {what: runner.read_counts() for what, runner in runners.items()}
    seconds = interleaved({what: decoder(runner, 1) for what, runner in runners.items()}, rounds=rounds)
    shapes = open_checkpoint(files["float16"]).shapes
    dense = formula(shapes)
    rows = []
    for what, path in files.items():
        checkpoint = open_checkpoint(path)
        reads = runners[what].reads_since(before[what])
        sizes = formula(shapes, read_manifest(checkpoint), units=reads.units, rows=reads.rows)
        resident = resident_bytes(checkpoint, reads)
        rows.append({
            "model": name,
            "units": what,
            "threads": threads,
            "formula MB": matrices(sizes) / 1e6,
            "float16 / formula": matrices(dense) / matrices(sizes),
            "with vectors MB": sum(sizes.values()) / 1e6,
            "resident MB": sum(resident.values()) / 1e6,
            "float16 / resident": sum(dense.values()) / sum(resident.values()),
            "mapped MB": mapped_bytes(path) / 1e6,
            "tokens/s": STEPS / seconds.median(what),
            "times float16's": seconds.ratio("float16", what),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["rwkv7-0.1b", "rwkv7-0.4b", "rwkv5-0.4b"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows = []
    for name in given.models:
        for threads in given.threads:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(Path(folder), name, threads, given.rounds)
    report("lite", rows, Machine(threads=max(given.threads)), save=given.save)


if __name__ == "__main__":
    main()
