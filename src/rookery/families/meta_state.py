"""Meta-State (arXiv 2504.08247): RWKV-7 whose channel mix also reads the matrix state, and that can be made larger.

An interpretation; there are no public code, weights or tables to compare with, so compare it with our own baselines
only (state_methods.md 2). RWKV-7's channel mix is taken as what lets tokens and parameter tokens meet:
`intermediate_size` of them, keys in `ffn.key`, values in `ffn.value`. Beside RWKV-7's tensors there is one vector per
block, `ffn.sse_eta`.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7
from rookery.families.base import Family, Shapes


@dataclass(frozen=True, kw_only=True)
class MetaStateConfig(rwkv7.RWKV7Config):
    """Sizes and choices of one Meta-State model."""

    num_heads: int = 0
    """Heads of the time mix; 0: as many as make the width. Growth adds heads, so that the time mix may be wider."""
    sse_ratio: float = 0.5
    """Share of the heads, the last ones, whose state the channel mix reads, where `encoder_heads` does not name
    them."""
    encoder_heads: tuple[int, ...] | None = None
    """Heads of the time mix whose state the channel mix reads (self-state encoder)."""
    encoder_blocks: tuple[int, ...] | None = None
    """For each of them the block of `head_dim` residual channels that asks and is added to; the head's number unless
    given."""
    eta: Literal["learned", "one"] = "learned"
    """Whether the strength of what is added is learned, or 1."""
    evolve: Literal["wkv", "own"] = "wkv"
    """What is read: the time mix's state, or one of its own to which the channel mix's answers are written
    (experimental: tokens are read one by one)."""
    groups: int = 1
    """Equal groups of parameter tokens."""
    active_groups: int = 1
    """Of which so many, the most excited ones, answer a token."""
    growth: tuple[str, ...] = ()
    """What was added to the model, in order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = self.hidden_size // self.head_dim
        heads = self.num_heads or blocks
        chosen = self.encoder_heads
        if chosen is None:
            if not 0 <= self.sse_ratio <= 1:
                raise ValueError(f"sse_ratio must lie in [0, 1], got {self.sse_ratio}")
            chosen = range(heads - math.ceil(self.sse_ratio * heads), heads)
        channels = chosen if self.encoder_blocks is None else self.encoder_blocks
        for name, value in (("encoder_heads", chosen), ("encoder_blocks", channels), ("growth", self.growth)):
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "num_heads", heads)
        self._check(blocks)

    def _check(self, blocks: int) -> None:
        heads, channels = self.encoder_heads, self.encoder_blocks
        for name, given, bound in (("encoder_heads", heads, self.num_heads), ("encoder_blocks", channels, blocks)):
            if len(set(given)) < len(given) or any(not 0 <= one < bound for one in given):
                raise ValueError(f"{name} must be different numbers from 0 to {bound - 1}, got {list(given)}")
        if len(heads) != len(channels):
            raise ValueError(f"{len(heads)} encoder heads need as many blocks of channels, got {len(channels)}")
        if self.groups < 1 or self.intermediate_size % self.groups or not 1 <= self.active_groups <= self.groups:
            raise ValueError(
                f"groups ({self.groups}) must divide the {self.intermediate_size} parameter tokens, "
                f"and active_groups ({self.active_groups}) lie in 1 to groups"
            )

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of RWKV-7's state; with a state of its own that of the encoder heads again."""
        plain = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        own = len(self.encoder_heads) * self.head_dim**2 if self.evolve == "own" else 0
        return plain + self.num_hidden_layers * batch * own * max(4, itemsize)


OWN = tuple(name for name in MetaStateConfig.__dataclass_fields__ if name not in rwkv7.RWKV7Config.__dataclass_fields__)
"""Fields that RWKV-7 does not have."""


def create(**given) -> MetaStateConfig:
    """A config whose unnamed sizes follow RWKV-7's formulas."""
    own = {name: given.pop(name) for name in OWN if name in given}
    return rwkv7.widened(rwkv7.create(**given), MetaStateConfig, **own)


def tensor_shapes(config: MetaStateConfig) -> dict[str, tuple[int, ...]]:
    eta = (len(config.encoder_heads) * config.head_dim,)
    return rwkv7.tensor_shapes(config) | {f"blocks.{i}.ffn.sse_eta": eta for i in range(config.num_hidden_layers)}


def recognise(shapes: Shapes) -> bool:
    return {"blocks.0.att.r_k", "blocks.0.ffn.sse_eta"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> MetaStateConfig:
    """Sizes from the tensors alone, for models that have grown no heads: which channels these ask, no tensor tells."""
    plain = rwkv7.config_from_shapes(shapes)
    encoders, left = divmod(shapes["blocks.0.ffn.sse_eta"][0], plain.head_dim)
    if left or encoders > plain.num_heads:
        raise BadCheckpoint(
            f"blocks.0.ffn.sse_eta has {shapes['blocks.0.ffn.sse_eta'][0]} numbers, which are no heads of "
            f"{plain.head_dim} out of {plain.num_heads}"
        )
    heads = tuple(range(plain.num_heads - encoders, plain.num_heads))
    return rwkv7.widened(plain, MetaStateConfig, sse_ratio=encoders / plain.num_heads, encoder_heads=heads)


PRESETS = {name: rwkv7.widened(config, MetaStateConfig) for name, config in rwkv7.PRESETS.items() if name != "test"}
PRESETS["test"] = replace(
    rwkv7.widened(rwkv7.PRESETS["test"], MetaStateConfig, groups=4, active_groups=3),
    # more heads than the width holds, read by a block of channels that is not their own
    num_heads=3,
    encoder_heads=(2,),
    encoder_blocks=(0,),
)

FAMILY = Family(
    name="meta-state",
    kind="language",
    config=MetaStateConfig,
    builder="rookery.models.meta_state:MetaState",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=rwkv7.is_unused,
)
