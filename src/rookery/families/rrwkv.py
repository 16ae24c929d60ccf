"""RRWKV, "Retrospected RWKV" (arXiv 2306.05176, withdrawn): RWKV-4 with mediums. Sizes, names, presets.

Inspired by a paper of which only the idea could be read; there are no code and no weights (hybrids.md 6).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families import rwkv4
from rookery.families.base import Family, Shapes


@dataclass(frozen=True, kw_only=True)
class RRWKVConfig(rwkv4.RWKV4Config):
    """Sizes and choices of one RRWKV model."""

    interval: int = 64
    """Tokens that a medium stands for."""
    medium_rank: int = 48
    """Hidden units of what scales a medium's channels."""
    pool: Literal["mean", "last", "ema"] = "mean"
    """What a medium is made of: the mean of its interval's inputs, the last one, or an average that fades by a tenth a
    token."""
    retention: Literal["sum", "decay"] = "sum"
    """What becomes of older mediums in the time mix: they are all kept alike, or fade at a learned rate per medium."""

    def __post_init__(self) -> None:
        if self.interval < 2:
            raise ValueError(f"interval must be at least 2, got {self.interval}")

    @property
    def medium_weights(self) -> list[float]:
        """How much each token of an interval counts in its medium."""
        last = [0.0] * (self.interval - 1) + [1.0]
        fading = [0.9 ** (self.interval - 1 - i) for i in range(self.interval)]
        mean = [1 / self.interval] * self.interval
        return {"mean": mean, "last": last, "ema": [w / sum(fading) for w in fading]}[self.pool]

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of RWKV-4's state (5 numbers a channel) and the mediums' (7): the same after any number of tokens."""
        plain = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        mediums = 5 * max(4, itemsize) + 2 * itemsize  # sums are float32 at least
        return plain + self.num_hidden_layers * batch * self.hidden_size * mediums


def around(config: rwkv4.RWKV4Config, **own: Any) -> RRWKVConfig:
    """An RWKV-4 config with mediums."""
    return RRWKVConfig(**asdict(config), **{"medium_rank": max(4, config.hidden_size // 16), **own})


def create(*, interval: int = 64, pool: str = "mean", retention: str = "sum", **given: Any) -> RRWKVConfig:
    """A config with RWKV-4's proportions and a sixteenth of the width as rank, unless given."""
    rank = {"medium_rank": given.pop("medium_rank")} if "medium_rank" in given else {}
    return around(rwkv4.create(**given), interval=interval, pool=pool, retention=retention, **rank)


def medium_shapes(config: RRWKVConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a block has besides RWKV-4's."""
    width, rank = config.hidden_size, config.medium_rank
    squeeze = {"rr_e1": (width, rank), "rr_e2": (rank, width)}
    shapes = {f"att.{name}": shape for name, shape in squeeze.items()} | {"att.rr_um": (width,)}
    shapes |= {f"att.rr_rho_{name}": (width,) for name in "kvr"}
    shapes |= {"att.rr_fade": (width,)} if config.retention == "decay" else {}
    shapes |= {f"ffn.{name}": shape for name, shape in squeeze.items()}
    return shapes | {f"ffn.rr_rho_{name}": (width,) for name in "kr"}


def tensor_shapes(config: RRWKVConfig) -> dict[str, tuple[int, ...]]:
    more = medium_shapes(config)
    blocks = range(config.num_hidden_layers)
    return rwkv4.tensor_shapes(config) | {f"blocks.{i}.{name}": more[name] for i in blocks for name in more}


def recognise(shapes: Shapes) -> bool:
    return "blocks.0.att.rr_um" in shapes


def config_from_shapes(shapes: Shapes, **untold: Any) -> RRWKVConfig:
    """Sizes from the tensors, which show neither the interval nor the pooling; `untold` may give those."""
    plain = rwkv4.config_from_shapes({name: shape for name, shape in shapes.items() if ".rr_" not in name})
    if "blocks.0.att.rr_e1" not in shapes:
        raise BadCheckpoint("not a whole RRWKV checkpoint: 'blocks.0.att.rr_e1' is missing")
    retention = "decay" if "blocks.0.att.rr_fade" in shapes else "sum"
    return around(plain, medium_rank=shapes["blocks.0.att.rr_e1"][1], retention=retention, **untold)


_TEST = around(rwkv4.PRESETS["test"], interval=8, medium_rank=4)
PRESETS = {size: around(rwkv4.PRESETS[size]) for size in ("169m", "430m", "1.5b")}
PRESETS |= {"test": _TEST, "decay-test": around(rwkv4.PRESETS["test"], interval=5, pool="ema", retention="decay")}

FAMILY = Family(
    name="rrwkv",
    kind="language",
    config=RRWKVConfig,
    builder="rookery.models.rrwkv:RRWKV",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=("interval", "pool"),
    tensor_shapes=tensor_shapes,
)
