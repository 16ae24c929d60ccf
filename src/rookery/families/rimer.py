"""Rimer: RWKV-7 over patches of a series, the frame of Timer (arXiv 2402.02368) with the mixers of arXiv 2503.14456.

The idea is that of BlackGoose Rimer (arXiv 2503.06121); what that work released is the family `rimer-released`.
"""

from dataclasses import dataclass
from typing import Any

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7
from rookery.families.base import Family, Headed, Shapes
from rookery.families.forecast import ForecastConfig, layers_in, predicted_patches

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The quantile levels that a forecast has by default."""


@dataclass(frozen=True, kw_only=True)
class RimerConfig(Headed, ForecastConfig):
    """Sizes and choices of one Rimer model."""

    head_dim: int = 32
    """Channels per head."""
    intermediate_size: int = 256
    """Hidden units of the channel mix."""
    decay_rank: int = 32
    """Ranks of RWKV-7's low-rank maps: decay, in-context learning rate, value residual, gate."""
    rate_rank: int = 32
    value_rank: int = 32
    gate_rank: int = 32

    def __post_init__(self) -> None:
        ForecastConfig.__post_init__(self)
        Headed.__post_init__(self)

    @property
    def blocks(self) -> rwkv7.RWKV7Config:
        """The same sizes as RWKV-7's mixers take them."""
        names = ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")
        ranks = ("decay_rank", "rate_rank", "value_rank", "gate_rank")
        return rwkv7.RWKV7Config(vocab_size=1, **{name: getattr(self, name) for name in names + ranks})


def create(*, hidden_size: int = 64, **given: Any) -> RimerConfig:
    """A config whose unnamed sizes follow RWKV-7's formulas for this width, with heads of 32 channels."""
    sizes = {"intermediate_size": 4 * hidden_size, **rwkv7.suggested_ranks(hidden_size), "levels": LEVELS, **given}
    sizes.setdefault("head_dim", min(32, hidden_size))
    return RimerConfig(hidden_size=hidden_size, **sizes)


def tensor_shapes(config: RimerConfig) -> dict[str, tuple[int, ...]]:
    width, patch = config.hidden_size, config.patch_length
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (width, 2 * patch), "embed.bias": (width,)}
    official = rwkv7.tensor_shapes(config.blocks)
    shapes |= {name: official[name] for name in official if name.startswith(("blocks.", "ln_out."))}
    rows = config.output_patches * patch * config.outputs
    return shapes | {"head.weight": (rows, width), "head.bias": (rows,)}


def recognise(shapes: Shapes) -> bool:
    return {"embed.weight", "blocks.0.att.r_k", "head.bias"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> RimerConfig:
    """Sizes from the tensors; a head is taken to predict one value a point, our own files say otherwise themselves."""
    try:
        width, inputs = shapes["embed.weight"]
        _, head_dim = shapes["blocks.0.att.r_k"]
        sizes = {
            "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
            "decay_rank": shapes["blocks.0.att.w1"][1],
            "rate_rank": shapes["blocks.0.att.a1"][1],
            "gate_rank": shapes["blocks.0.att.g1"][1],
            "output_patches": predicted_patches(shapes["head.weight"][0], inputs // 2),
        }
        if "blocks.1.att.v1" in shapes:
            sizes["value_rank"] = shapes["blocks.1.att.v1"][1]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole Rimer checkpoint: {missing} is missing") from None
    layers = layers_in(shapes, "blocks.")
    return RimerConfig(
        hidden_size=width, num_hidden_layers=layers, head_dim=head_dim, patch_length=inputs // 2, **sizes
    )


PRESETS = {
    "tiny": create(hidden_size=64, num_hidden_layers=2, output_patches=4),
    "small": create(hidden_size=128, num_hidden_layers=4, head_dim=64, output_patches=4),
    "base": create(hidden_size=512, num_hidden_layers=8, head_dim=64, output_patches=4),
    "test": RimerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=16,
        intermediate_size=64,
        decay_rank=8,
        rate_rank=8,
        value_rank=4,
        gate_rank=8,
        patch_length=4,
        output_patches=2,
        context_length=32,
        levels=(0.1, 0.5, 0.9),
    ),
}

FAMILY = Family(
    name="rimer",
    kind="series",
    config=RimerConfig,
    builder="rookery.models.forecast:Rimer",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    fingerprinted=("embed.weight", "ln_out.weight"),
)
