"""RWKV-X (arXiv 2504.21463): RWKV-7 with a sparse-attention block after every few of its own, cache bounded.

Code and weights: howard-hou/RWKV-X (files like RWKV-X-0.2B-64k-Base.pth). The files tell all sizes but chunk_size, topk
and the limits of the cache.
"""

import logging
from dataclasses import dataclass, fields
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7
from rookery.families.base import Family, Shapes
from rookery.families.chunked import BUDGETS, ChunkedAttention
from rookery.families.rwkv7 import RWKV7Config

log = logging.getLogger("rookery")


@dataclass(frozen=True, kw_only=True)
class RWKVXConfig(ChunkedAttention, RWKV7Config):
    """Sizes and choices of one RWKV-X model; `num_hidden_layers` counts the RWKV-7 blocks."""

    num_sparse_layers: int = 4
    """Sparse-attention blocks; one alone stands after all RWKV-7 blocks, several after equal numbers of them."""
    remainder: Literal["refuse", "append", "drop"] = "refuse"
    """RWKV-7 blocks left over where the numbers do not divide: an error, or they run last, or never (as the published
    code has it)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_budget()
        if self.remainder not in ("refuse", "append", "drop"):
            raise ValueError(f"remainder must be refuse, append or drop, got {self.remainder!r}")
        if self.num_sparse_layers < 0:
            raise ValueError(f"num_sparse_layers must be 0 or more, got {self.num_sparse_layers}")
        if self.remainder == "refuse" and self.num_sparse_layers and self.num_hidden_layers % self.num_sparse_layers:
            raise ValueError(
                f"{self.num_hidden_layers} RWKV-7 blocks cannot be shared equally among {self.num_sparse_layers} "
                'sparse ones; choose a divisor, or remainder="append" to run the rest at the end ("drop": never, as '
                "the published code does)"
            )

    @property
    def interval(self) -> int:
        """RWKV-7 blocks before each sparse one."""
        return self.num_hidden_layers // max(1, self.num_sparse_layers)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the blocks in the order in which they run: "rwkv.blocks.0", …, "moba.0", …"""
        names = []
        for sparse in range(self.num_sparse_layers):
            names += [f"rwkv.blocks.{i}" for i in range(sparse * self.interval, (sparse + 1) * self.interval)]
            names.append(f"moba.{sparse}")
        last = len(names) - self.num_sparse_layers
        if self.remainder == "drop" and self.num_sparse_layers:
            return tuple(names)
        return (*names, *(f"rwkv.blocks.{i}" for i in range(last, self.num_hidden_layers)))

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the RWKV-7 blocks' state; per sparse block a cache and the channel mix's shift."""
        recurrent = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        ran = sum(name.startswith("rwkv.") for name in self.order)
        cache = self.cache_nbytes(tokens_seen=tokens_seen, heads=self.num_heads, dim=self.head_dim, itemsize=itemsize)
        sparse = batch * self.num_sparse_layers * (cache + self.hidden_size * itemsize)
        return recurrent // self.num_hidden_layers * ran + sparse

    def rwkv7(self) -> RWKV7Config:
        """The config of the RWKV-7 within."""
        return RWKV7Config(**{field.name: getattr(self, field.name) for field in fields(RWKV7Config)})


def create(*, num_hidden_layers: int = 12, num_sparse_layers: int | None = None, **given) -> RWKVXConfig:
    """A config whose unnamed sizes follow RWKV-7's formulas, with a quarter of sparse blocks or a little less."""
    if num_sparse_layers is None:
        most = max(1, num_hidden_layers // 3)
        num_sparse_layers = next(n for n in range(most, 0, -1) if num_hidden_layers % n == 0)
    own = {name: given.pop(name) for name in OWN if name in given}
    plain = rwkv7.create(num_hidden_layers=num_hidden_layers, **given)
    return rwkv7.widened(plain, RWKVXConfig, num_sparse_layers=num_sparse_layers, **own)


OWN = (*(field.name for field in fields(ChunkedAttention)), "remainder")
"""Fields that no file of weights tells."""


def sparse_shapes(config: RWKVXConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one sparse block."""
    width, ffn = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{n}.{part}": (width,) for n in ("ln1", "ln2") for part in ("weight", "bias")
    }
    shapes |= {f"att.{name}.weight": (width, width) for name in ("receptance", "key", "value", "output")}
    shapes |= {"ffn.x_k": (1, 1, width), "ffn.key.weight": (ffn, width), "ffn.value.weight": (width, ffn)}
    return shapes


def tensor_shapes(config: RWKVXConfig) -> dict[str, tuple[int, ...]]:
    own = sparse_shapes(config)
    shapes = {f"rwkv.{name}": shape for name, shape in rwkv7.tensor_shapes(config.rwkv7()).items()}
    return shapes | {f"moba.{i}.{name}": own[name] for i in range(config.num_sparse_layers) for name in own}


def within(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The RWKV-7's tensors among those of a file, under its own names."""
    return {name.removeprefix("rwkv."): shape for name, shape in shapes.items() if name.startswith("rwkv.")}


def recognise(shapes: Shapes) -> bool:
    return "rwkv.blocks.0.att.r_k" in shapes


def config_from_shapes(shapes: Shapes, **told: Any) -> RWKVXConfig:
    """Sizes from the tensors. What these leave open and nobody told is the published default, with a warning."""
    plain = rwkv7.config_from_shapes(within(shapes))
    numbers = {name.split(".")[1] for name in shapes if name.startswith("moba.")}
    if numbers != {str(i) for i in range(len(numbers))}:
        raise BadCheckpoint(f"not a whole RWKV-X checkpoint: its sparse blocks are numbered {sorted(numbers)}")
    if numbers and not {"chunk_size", "topk"} <= told.keys():
        log.warning(
            "files of RWKV-X do not say chunk_size and topk: taken are %d and %d; if the model was trained with "
            "others, give them as settings (--setting chunk_size=1024)",
            told.get("chunk_size", ChunkedAttention.chunk_size),
            told.get("topk", ChunkedAttention.topk),
        )
    try:
        return rwkv7.widened(plain, RWKVXConfig, num_sparse_layers=len(numbers), **told)
    except ValueError as wrong:
        raise BadCheckpoint(str(wrong)) from None


def is_unused(name: str) -> bool:
    """RWKV-7's."""
    return rwkv7.is_unused(name.removeprefix("rwkv."))


def _size(plain: RWKV7Config, sparse: int, **more: Any) -> RWKVXConfig:
    return rwkv7.widened(plain, RWKVXConfig, num_sparse_layers=sparse, **{**BUDGETS["paper-64k"], **more})


_TINY = {"chunk_size": 4, "topk": 3, "max_entries": 32, "min_entries": 24, "window": 8, "observed": 3}
PRESETS = {
    "0.2b": _size(rwkv7.PRESETS["0.1b"], 4),
    "3.6b": _size(rwkv7.PRESETS["2.9b"], 8),
    # one block more or less must still make a model
    "test": _size(rwkv7.PRESETS["test"], 2, remainder="append", **_TINY),
}

FAMILY = Family(
    name="rwkv-x",
    kind="language",
    config=RWKVXConfig,
    builder="rookery.models.rwkv_x:RWKVX",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=OWN,
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
    fingerprinted=("rwkv.emb.weight", "rwkv.ln_out.weight"),
)
