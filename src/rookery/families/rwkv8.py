"""RWKV-8 preview rc00 (core.md 1.8): RWKV-7 whose channel mix is scaled by a vector indexed by the token.

Code: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v8_rc00_demo.py. Weights: rwkv-8-pile.
"""

from dataclasses import dataclass

from rookery.families import rwkv7
from rookery.families.base import Family, Shapes


@dataclass(frozen=True, kw_only=True)
class RWKV8Config(rwkv7.RWKV7Config):
    """Sizes and choices of one RWKV-8 rc00 model: those of RWKV-7."""


def create(**given) -> RWKV8Config:
    """A config whose unnamed sizes follow RWKV-7's formulas."""
    return rwkv7.widened(rwkv7.create(**given), RWKV8Config)


def tensor_shapes(config: rwkv7.RWKV7Config) -> dict[str, tuple[int, ...]]:
    table = config.vocab_size, config.hidden_size
    more = {f"blocks.{i}.ffn.enn.weight": table for i in range(config.num_hidden_layers)}
    return rwkv7.tensor_shapes(config) | more


def recognise(shapes: Shapes) -> bool:
    has = shapes.keys()
    return {"blocks.0.att.r_k", "blocks.0.ffn.enn.weight"} <= has and "blocks.0.qkv.qq.weight" not in has


def config_from_shapes(shapes: Shapes) -> RWKV8Config:
    """Sizes from the tensors alone."""
    return rwkv7.widened(rwkv7.config_from_shapes(shapes), RWKV8Config)


PRESETS = {name: rwkv7.widened(rwkv7.PRESETS[name], RWKV8Config) for name in ("pile-0.1b", "test")}

FAMILY = Family(
    name="rwkv8",
    kind="language",
    config=RWKV8Config,
    builder="rookery.models.rwkv8:RWKV8",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=rwkv7.is_unused,
)
