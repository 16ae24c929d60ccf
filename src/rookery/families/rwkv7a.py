"""RWKV-7a, "DeepEmbed" (core.md 1.6): RWKV-7 whose channel mix is gated by a table indexed by the token.

Code: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7a_demo.py. Weights: rwkv7a-g1b-0.1b.
"""

import math
from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7
from rookery.families.base import Family, Shapes


@dataclass(frozen=True, kw_only=True)
class RWKV7aConfig(rwkv7.RWKV7Config):
    """Sizes and choices of one RWKV-7a model."""

    embed_rank: int = 32
    """Every token has a matrix of this many rows and columns per block."""


def create(*, embed_rank: int = 32, **given) -> RWKV7aConfig:
    """A config whose unnamed sizes follow RWKV-7's formulas."""
    return rwkv7.widened(rwkv7.create(**given), RWKV7aConfig, embed_rank=embed_rank)


def gate_shapes(config: RWKV7aConfig) -> dict[str, tuple[int, ...]]:
    """What a channel mix has besides RWKV-7's."""
    width, ffn, rank = config.hidden_size, config.intermediate_size, config.embed_rank
    tables = {"s_emb.weight": (config.vocab_size, rank**2), "s_emb_x.weight": (rank**2, width)}
    return tables | {"s0": (ffn,), "s1": (width, rank), "s2": (rank, ffn)}


def tensor_shapes(config: RWKV7aConfig) -> dict[str, tuple[int, ...]]:
    more = gate_shapes(config)
    blocks = range(config.num_hidden_layers)
    return rwkv7.tensor_shapes(config) | {f"blocks.{i}.ffn.{name}": more[name] for i in blocks for name in more}


def recognise(shapes: Shapes) -> bool:
    has = shapes.keys()
    return {"blocks.0.att.r_k", "blocks.0.ffn.s_emb.weight"} <= has and "blocks.0.qkv.qq.weight" not in has


def embed_rank(shapes: Shapes) -> int:
    """Side of the tokens' matrices; BadCheckpoint where they are not square."""
    numbers = shapes["blocks.0.ffn.s_emb.weight"][1]
    rank = math.isqrt(numbers)
    if rank**2 != numbers:
        raise BadCheckpoint(f"blocks.0.ffn.s_emb.weight has {numbers} numbers a token, which make no square matrix")
    return rank


def config_from_shapes(shapes: Shapes) -> RWKV7aConfig:
    """Sizes from the tensors alone."""
    return rwkv7.widened(rwkv7.config_from_shapes(shapes), RWKV7aConfig, embed_rank=embed_rank(shapes))


PRESETS = {name: rwkv7.widened(rwkv7.PRESETS[name], RWKV7aConfig) for name in ("0.1b",)}
PRESETS["test"] = rwkv7.widened(rwkv7.PRESETS["test"], RWKV7aConfig, embed_rank=4)

FAMILY = Family(
    name="rwkv7a",
    kind="language",
    config=RWKV7aConfig,
    builder="rookery.models.rwkv7a:RWKV7a",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=rwkv7.is_unused,
)
