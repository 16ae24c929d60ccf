"""Files of compressed models (RWKV-Lite, arXiv 2412.10856): what lies in them, and the plain model that they stand for.

A compressed model is a safetensors file of our own convention whose metadata "lite" are a manifest (`Manifest`) and in
which these tensors take the place of the official ones, r being a rank, h that of a predictor, K a number of clusters:

| in place of | there are |
|---|---|
| a projection `X.weight` [out, in] | `X1.weight` [r, in], `X2.weight` [out, r]: the second times the first |
| `ffn.key.weight`, `ffn.value.weight` of a sparse layer | `ffn.neurons` [hidden, 2 width]: a unit's key row, then its \
value column; as int8 [unit + width, hidden] by columns, key rows filled up to whole lines of 64 |
| | `mlp.fc1.weight` [h, width], `mlp.fc2.weight` [hidden, h]; `ffn.shadow` uint8 [bits, hidden, width / 8], lowest \
bit first, and with levels of rows `ffn.shadow_levels` float32 [2, hidden] |
| `head.weight` | `head.sorted.weight`, its rows cluster by cluster; `head.order` int32 [vocab], their tokens; \
`head.starts` int32 [K + 1]; `head_l1.weight` [K, width] |
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from rookery.checkpoints.pack import LINE, pack, packed_size
from rookery.checkpoints.pack import VERSION as PACKED
from rookery.checkpoints.source import Stored, short
from rookery.errors import BadCheckpoint

VERSION = "lite-1"
"""Version of the manifest and of the tensors' layout."""
FACTORED = re.compile(r"(blocks\.\d+\.(?:att|ffn)\.(?:receptance|key|value|gate))([12])\.weight")
NEURONS = ".ffn.neurons"


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Projections kept as two factors."""

    divisor: int
    """Rank = width // divisor."""
    kind: str = "simple"
    """"simple": the product of the factors. The only kind that comes from a trained matrix."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How hidden units are guessed before their weights are read; lists have an entry for every layer."""

    rank: int = 64
    """Hidden units of the predictor; 0: there is none."""
    thresholds: Sequence[float | None] = ()
    """A unit is used if its predicted probability is above this; None where the layer is dense or has no predictor."""
    bits: int = 1
    """Bits of a number in the shadow of the key matrix, 1, 2 or 4; 0: there is none."""
    levels: str = "minmax"
    """"minmax": the shadow's levels lie evenly between the smallest and largest weight; "row": each row has two."""
    quantiles: Sequence[float | None] = ()
    """Share of the units that the shadow does not choose; None where the layer is dense or has no shadow."""

    def is_sparse(self, layer: int) -> bool:
        return self.thresholds[layer] is not None or self.quantiles[layer] is not None


@dataclass(frozen=True, kw_only=True)
class Head:
    """The head in two levels."""

    clusters: int
    mass: float = 0.95
    """Guessed probability that the clusters whose logits are computed have together, …"""
    fewest: int = 3
    """… which are so many at least …"""
    most: int = 100
    """… and at most."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that was decided when a model was compressed; ValueError where a number is out of its range."""

    low_rank: LowRank | None = None
    sparsity: Sparsity | None = None
    embedding_rows: int = 0
    """Rows of the embedding that are kept in memory; 0: all are read where they lie."""
    head: Head | None = None
    int8: bool = False
    """Large matrices have 8 bits a number."""

    def __post_init__(self) -> None:
        if self.embedding_rows < 0:
            raise ValueError(f"the embedding cache has {self.embedding_rows} rows; give 0 (no cache) or more")
        for part, check in (
            (self.low_rank, _check_low_rank),
            (self.sparsity, _check_sparsity),
            (self.head, _check_head),
        ):
            if part is not None:
                check(part)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)})

    def techniques(self) -> list[str]:
        """What was done, in words."""
        return [
            *([f"low-rank projections (width / {self.low_rank.divisor})"] if self.low_rank else []),
            *(["sparse channel mixes"] if self.sparsity else []),
            *([f"embedding cache of {self.embedding_rows} rows"] if self.embedding_rows else []),
            *([f"head of {self.head.clusters} clusters"] if self.head else []),
            *(["int8"] if self.int8 else []),
        ]


def _check_low_rank(low_rank: LowRank) -> None:
    if low_rank.divisor < 1:
        raise ValueError(f"low-rank divisor {low_rank.divisor} is not 1 or more (rank = width // divisor)")
    if low_rank.kind != "simple":
        raise ValueError(f"low-rank kind {low_rank.kind!r} is not 'simple', the only one that a trained matrix becomes")


def _check_sparsity(sparsity: Sparsity) -> None:
    if sparsity.rank < 0:
        raise ValueError(f"the predictor has {sparsity.rank} hidden units; give 0 (no predictor) or more")
    if sparsity.bits not in (0, 1, 2, 4):
        raise ValueError(f"the shadow has {sparsity.bits} bits; give 1, 2, 4 or 0 (no shadow)")
    if sparsity.rank == 0 and sparsity.bits == 0:
        raise ValueError("sparse channel mixes need a predictor, a shadow or both; neither is wanted")
    if sparsity.levels not in ("minmax", "row") or (sparsity.levels == "row" and sparsity.bits != 1):
        raise ValueError(
            f"shadow levels {sparsity.levels!r} of {sparsity.bits} bits: known are minmax, and row for 1 bit"
        )
    if len(sparsity.thresholds) != len(sparsity.quantiles):
        raise ValueError("thresholds and quantiles must have an entry for every layer")
    for what, values, absent in (
        ("threshold", sparsity.thresholds, sparsity.rank == 0),
        ("quantile", sparsity.quantiles, sparsity.bits == 0),
    ):
        for layer, value in enumerate(values):
            if value is not None and absent:
                raise ValueError(f"layer {layer} has a {what} and nothing that it is for")
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{what} {value} of layer {layer} must lie between 0 and 1")


def _check_head(head: Head) -> None:
    if not 0 < head.mass <= 1:
        raise ValueError(f"the head's mass {head.mass} must lie above 0 and not above 1")
    if not 1 <= head.fewest <= head.most:
        raise ValueError(f"the head needs 1 ≤ fewest ≤ most clusters, got fewest {head.fewest} and most {head.most}")
    if head.clusters < 1:
        raise ValueError(f"the head has {head.clusters} clusters; give 1 or more")


def manifest_of(metadata: Mapping[str, str], where: str) -> Manifest | None:
    """The manifest in a file's metadata, None where it is no compressed model; BadCheckpoint for one that is wrong."""
    if "lite" not in metadata:
        return None
    try:
        told = json.loads(metadata["lite"])
        version = told.pop("version")
        if version != VERSION:
            raise BadCheckpoint(
                f"{where!r} was compressed by another version of rookery ({short(version)}); this one reads "
                f"{VERSION!r}. Compress the original again"
            )
        parts = {"low_rank": LowRank, "sparsity": Sparsity, "head": Head}
        made = {key: kind(**told[key]) if told[key] is not None else None for key, kind in parts.items()}
        return Manifest(**{**told, **made})
    except BadCheckpoint:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as wrong:
        raise BadCheckpoint(
            f"{where!r}: its manifest cannot be read ({short(wrong)}); compress the original again"
        ) from None


def plain(tensors: Mapping[str, Stored], metadata: Mapping[str, str], where: str) -> dict[str, Stored]:
    """The tensors of a file under official names; those of a compressed model are the plain ones they stand for."""
    if manifest_of(metadata, where) is None:
        return dict(tensors)
    try:
        return _plain(tensors)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise BadCheckpoint(f"{where!r} is damaged: what it says of its compression does not fit its tensors") from None


def _plain(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    width = tensors["emb.weight"].shape[1]
    official: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if factor := FACTORED.fullmatch(name):
            if factor[2] == "2":
                official[f"{factor[1]}.weight"] = _product(tensor, tensors[f"{factor[1]}1.weight"])
        elif name.endswith(NEURONS):
            official |= _split_neurons(name.removesuffix("neurons"), tensor, width)
        elif name == "head.sorted.weight":
            official["head.weight"] = _unsorted(tensor, tensors["head.order"])
        elif not is_extra(name):
            official[name] = tensor
    return official


def is_extra(name: str) -> bool:
    """Whether a tensor of a compressed model is none of the plain one's."""
    return name in ("head.order", "head.starts", "head_l1.weight") or bool(
        re.fullmatch(r"blocks\.\d+\.(mlp\.fc[12]\.weight|ffn\.shadow|ffn\.shadow_levels)", name)
    )


def _product(second: Stored, first: Stored) -> Stored:
    (out, rank), (same, inputs) = second.shape, first.shape
    if rank != same:
        raise ValueError

    def read() -> np.ndarray:
        return (second.read().astype(np.float32) @ first.read().astype(np.float32)).astype(second.dtype)

    return Stored((out, inputs), second.dtype, read, f"low-rank {second.encoding}", first.nbytes + second.nbytes)


def _split_neurons(at: str, both: Stored, width: int) -> dict[str, Stored]:
    hidden = both.shape[1 if both.packed else 0]
    unit = both.shape[0] - width if both.packed else width
    if unit < width or both.shape != ((unit + width, hidden) if both.packed else (hidden, 2 * width)):
        raise ValueError

    def rows() -> np.ndarray:
        return both.read().T if both.packed else both.read()

    part = partial(Stored, dtype=both.dtype, encoding=both.encoding, nbytes=both.nbytes // 2)
    return {
        f"{at}key.weight": part((hidden, width), read=lambda: rows()[:, :width]),
        f"{at}value.weight": part((width, hidden), read=lambda: rows()[:, unit:].T),
    }


def _unsorted(rows: Stored, order: Stored) -> Stored:
    if order.shape != rows.shape[:1] or order.dtype != np.int32:
        raise ValueError

    def read() -> np.ndarray:
        place = np.empty(len(order.read()), np.int64)
        place[order.read()] = np.arange(len(place))
        return rows.read()[place]

    return Stored(rows.shape, rows.dtype, read, rows.encoding, rows.nbytes)


def compressed(
    tensors: Mapping[str, np.ndarray], manifest: Manifest, dtype: np.dtype
) -> tuple[dict[str, np.ndarray | Stored], dict[str, str]]:
    """What a compressed model's file holds: its tensors with numbers of `dtype`, and metadata.

    `tensors` are named as in the file, but `ffn.key.weight` and `ffn.value.weight` of sparse layers, which are put
    side by side here. With `manifest.int8` matrices are packed, but for the embedding, of which only rows are read, and
    what guesses.
    """
    written: dict[str, np.ndarray | Stored] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, tensor in _side_by_side(tensors, manifest).items():
        order = "columns" if name.endswith((NEURONS, ".ffn.value.weight")) else "rows"
        if tensor.dtype.kind in "iu" or name.endswith("shadow_levels"):
            written[name] = tensor
        elif manifest.int8 and tensor.ndim == 2 and not is_extra(name) and name != "emb.weight" and _is_matrix(name):
            matrix = _packable(tensor) if name.endswith(NEURONS) else tensor
            size = packed_size("int8", order, *matrix.shape)
            make: Callable[[], np.ndarray] = partial(pack, matrix.astype(np.float32), "int8", order)
            written[name] = Stored((size,), np.dtype(np.uint8), make, "int8", size)
            table[name] = {"format": "int8", "order": order, "shape": list(matrix.shape)}
        else:
            written[name] = tensor.astype(dtype)
    packed = {"packed": json.dumps({"version": PACKED, "tensors": table})} if table else {}
    return written, {"lite": manifest.to_json(), **packed}


def _is_matrix(name: str) -> bool:
    return name.endswith((".weight", NEURONS))


def _side_by_side(tensors: Mapping[str, np.ndarray], manifest: Manifest) -> dict[str, np.ndarray]:
    """Key rows and value columns of sparse layers as `ffn.neurons`."""
    made: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(blocks\.(\d+)\.ffn\.)(key|value)\.weight", name)
        if found is None or manifest.sparsity is None or not manifest.sparsity.is_sparse(int(found[2])):
            made[name] = tensor
        elif found[3] == "key":
            made[f"{found[1]}neurons"] = np.concatenate([tensor, tensors[f"{found[1]}value.weight"].T], axis=1)
    return made


def _packable(neurons: np.ndarray) -> np.ndarray:
    """[hidden, 2 width] as [unit + width, hidden]: both parts of a unit begin with a line of their own."""
    width = neurons.shape[1] // 2
    unit = -(-width // LINE) * LINE
    made = np.zeros((unit + width, len(neurons)), np.float32)
    made[:width], made[unit:] = neurons[:, :width].T, neurons[:, width:].T
    return made


def read_manifest(checkpoint: Any) -> Manifest | None:
    """How the model in an open checkpoint was compressed, None if it was not."""
    return manifest_of(checkpoint.metadata, checkpoint.path) if checkpoint.lite else None


__all__ = ["Head", "LowRank", "Manifest", "Sparsity", "compressed", "manifest_of", "plain", "read_manifest"]
