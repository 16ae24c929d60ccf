"""How many bytes a model needs in memory: by the formula of RWKV-Lite, as the runtime reads them, as the system counts.

The formula (after RWKV-Lite, arXiv 2412.10856), β being bytes of a number: projections of rank r = width / k take
2 r · width β; of the channel mix, the share of 2 · width · hidden β that a token's units make is needed, with the
predictor's rank · (width + hidden) β and the shadow's width · hidden · bits / 8; the embedding is its cache's rows; the
head, the clusters' head, the rows of those that are computed and the rows' tokens. Nothing else shrinks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rookery.checkpoints.lite import Manifest, read_manifest

if TYPE_CHECKING:
    from rookery.checkpoints.checkpoint import Checkpoint
    from rookery.engine.runners.lite import Reads

PARTS = ("time mix", "channel mix", "embedding", "head", "the rest")
PROJECTION = re.compile(r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|gate)[12]?\.weight")


def part_of(name: str) -> str:
    """The part that a tensor belongs to."""
    if name.startswith("emb."):
        return "embedding"
    if name.startswith("head"):
        return "head"
    if re.fullmatch(r"blocks\.\d+\.att\.(receptance|key|value|gate|output)[12]?\.weight", name):
        return "time mix"
    if re.fullmatch(r"blocks\.\d+\.(ffn\.(key|value|receptance|neurons)[12]?(\.weight)?|mlp\..*|ffn\.shadow.*)", name):
        return "channel mix"
    return "the rest"


def formula(
    shapes: Mapping[str, Sequence[int]],
    manifest: Manifest | None = None,
    *,
    units: float = 1.0,
    rows: float = 1.0,
    itemsize: int = 2,
) -> dict[str, float]:
    """Part -> bytes by the formula, of a plain model's `shapes` compressed as `manifest` says (None: not at all).

    `units` is the share of hidden units that a token uses, `rows` that of the head's rows. Matrices have `itemsize`
    bytes a number, with `manifest.int8` the large ones 1; the rest `itemsize`.
    """
    manifest = manifest or Manifest()
    width = shapes["emb.weight"][1]
    large = 1 if manifest.int8 else itemsize
    sizes = dict.fromkeys(PARTS, 0.0)
    for name, shape in shapes.items():
        count, beta, layer = math.prod(shape), itemsize, re.match(r"blocks\.(\d+)\.", name)
        if part_of(name) in ("time mix", "channel mix", "head"):
            beta = large
        if manifest.low_rank and PROJECTION.fullmatch(name) and shape[0] == shape[1]:
            count = 2 * shape[0] * (width // manifest.low_rank.divisor)
        elif layer and is_sparse(manifest, int(layer[1])) and re.search(r"ffn\.(key|value)\.weight$", name):
            count = count * units
        elif name == "emb.weight" and manifest.embedding_rows:
            count = min(manifest.embedding_rows, shape[0]) * width
        elif name == "head.weight" and manifest.head:
            count = count * rows
        sizes[part_of(name)] += count * beta
    hidden = shapes["blocks.0.ffn.key.weight"][0] if "blocks.0.ffn.key.weight" in shapes else 0
    for layer in range(len(manifest.sparsity.thresholds) if manifest.sparsity else 0):
        sizes["channel mix"] += _guessing(manifest, layer, width, hidden, itemsize)
    if manifest.head:
        order = 4 * (shapes["head.weight"][0] + manifest.head.clusters + 1)  # whole numbers of 32 bits
        sizes["head"] += manifest.head.clusters * width * itemsize + order
    return sizes


def is_sparse(manifest: Manifest, layer: int) -> bool:
    """Whether a layer's hidden units are guessed."""
    return manifest.sparsity is not None and manifest.sparsity.is_sparse(layer)


def _guessing(manifest: Manifest, layer: int, width: int, hidden: int, itemsize: int) -> float:
    """Bytes of a layer's predictor and shadow."""
    sparsity, total = manifest.sparsity, 0.0
    assert sparsity is not None
    if sparsity.thresholds[layer] is not None:
        total += sparsity.rank * (width + hidden) * itemsize
    if sparsity.quantiles[layer] is not None:
        total += width * hidden * sparsity.bits / 8
    return total


@dataclass(frozen=True)
class Breakdown:
    """A model's bytes by part, before and after compression."""

    path: str
    techniques: Sequence[str]
    dense: Mapping[str, float]
    """The plain model in 16 bits."""
    theoretical: Mapping[str, float]
    """The formula in 16 bits, or 8 for int8, with the shares of units and rows that were measured."""
    resident: Mapping[str, float]
    """Weights that a step of decoding needs, as the runtime counted them."""
    reads: Any
    """`Reads` of the measured steps; None for a plain model."""
    tokens: int
    """Tokens that were decoded."""
    peak: int
    """Most bytes of memory that the process had, all of Python included."""
    before: int
    """Most bytes that it had before the model was opened."""

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        columns = {"dense float16": self.dense, "formula": self.theoretical, "resident": self.resident}
        table = {part: {name: round(sizes.get(part, 0)) for name, sizes in columns.items()} for part in PARTS}
        total = {name: round(sum(sizes.values())) for name, sizes in columns.items()}
        shares = {} if self.reads is None else {"units": self.reads.units, "head rows": self.reads.rows}
        return {
            "path": self.path,
            "techniques": list(self.techniques),
            "bytes": {**table, "total": total},
            "read": shares,
            "tokens": self.tokens,
            "peak": self.peak,
            "before": self.before,
        }


def measure(checkpoint: Checkpoint, *, tokens: int = 64, threads: int | None = None) -> Breakdown:
    """Decodes some tokens greedily with the compiled runtime and says which bytes of the model that took.

    A compressed model runs `lean`, so that the process has in memory what the runtime counts.
    """
    from rookery.engine.runners.lite import resident_bytes
    from rookery.engine.runners.native import NativeRunner

    before = peak_bytes()
    runner = NativeRunner(checkpoint, threads=threads, lean=bool(checkpoint.lite))
    counts, state, token = runner.read_counts(), runner.init_state(), 0
    for _ in range(tokens):
        token = int(runner.forward([token], state)[0].argmax())
    reads: Reads = runner.reads_since(counts)
    manifest = read_manifest(checkpoint)
    shapes = checkpoint.shapes
    theoretical = formula(shapes, manifest, units=reads.units, rows=reads.rows)
    return Breakdown(
        path=checkpoint.path,
        techniques=manifest.techniques() if manifest else [],
        dense=formula(shapes),
        theoretical=theoretical,
        resident=resident_bytes(checkpoint, reads),
        reads=reads if manifest else None,
        tokens=tokens,
        peak=peak_bytes(),
        before=before,
    )


def peak_bytes() -> int:
    """Most bytes of memory that this process has had so far."""
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def render(breakdown: Breakdown) -> str:
    """The breakdown as a table of text, in MB."""
    told = breakdown.as_dict()
    rows = [["", "dense float16", "formula", "resident"]]
    for part, sizes in told["bytes"].items():
        rows.append([part, *(f"{size / 1e6:.2f}" for size in sizes.values())])
    total = told["bytes"]["total"]
    ratios = [total["dense float16"] / total[name] if total[name] else 0.0 for name in ("formula", "resident")]
    rows.append(["dense float16 is", "", *(f"{ratio:.2f} ×" for ratio in ratios)])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{breakdown.path}: {', '.join(breakdown.techniques) or 'not compressed'}; MB"]
    for row in rows:
        lines.append(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
        )
    if breakdown.reads is not None:
        reads = breakdown.reads
        lines.append(
            f"a step of decoding read {reads.units:.1%} of the hidden units and {reads.rows:.1%} of the head's rows "
            f"({breakdown.tokens} tokens); the embedding's cache answered {reads.hits:.0%}"
        )
    peak, before = breakdown.peak / 1e6, breakdown.before / 1e6
    lines.append(f"peak memory of the process {peak:.1f} MB, {before:.1f} MB of it before the model was opened")
    return "\n".join(lines)
