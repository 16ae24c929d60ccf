"""Vision-RWKV (arXiv 2403.02308): images, with the attention of RWKV-4, 6 or 7 in both directions. Sizes and names."""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.layout import Layout, Rule
from rookery.families.rwkv7 import RWKV7Config
from rookery.families.rwkv7 import create as create_rwkv7
from rookery.families.rwkv7 import tensor_shapes as language_shapes


@dataclass(frozen=True, kw_only=True)
class VisionRWKVConfig:
    """Sizes and choices of one Vision-RWKV model."""

    variant: Literal["v4", "v6", "v7"] = "v4"
    """v4: averages with a decay per channel; v6: a matrix per head in both directions; v7: one direction a block."""
    num_classes: int = 1000
    """Outputs of the head; 0 for a model of features alone."""
    image_size: int = 224
    """Height and width for which positions are learned; other sizes resize them."""
    patch_size: int = 16
    """Pixels of a token's side."""
    in_channels: int = 3
    """Numbers of a pixel."""
    hidden_size: int = 192
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    intermediate_size: int = 768
    """Hidden units of the channel mix."""
    head_dim: int = 64
    """Channels per head, of v6 and v7."""
    post_norm: bool = False
    """Norms come after a mixer, and before the residual stream."""
    layer_scale: float | None = None
    """Initial factor of each mixer's output, per channel; None for no such parameter."""
    key_norm: bool = False
    """Norms after the attention and after the squared activation, as in the large model."""
    drop_path: float = 0.0
    """Chance that the last block's mixers are left out of a training sample; it rises from 0 in the first block."""
    head_hidden_size: int = 0
    """Hidden units of a head of two layers; 0 for one layer."""
    shift: Literal["q", "1d", "none"] = "q"
    """Neighbours that tokens are mixed with: the four on the grid, the one before, or none."""
    compat: Literal["exact", "cuda32"] = "exact"
    """Attention of v4 by its equation, or as the released kernel computes it (see `rookery.ops.bi_wkv`)."""
    init: Literal["fancy", "local", "global"] = "fancy"
    """Initial decays and mixes: by layer and channel, or the ablations of the paper."""
    mix_rank: int = 32
    """Rank of the data-dependent interpolations, of v6."""
    decay_rank: int = 64
    """Rank of the data-dependent decay, of v6 and v7."""
    rate_rank: int = 32
    """Rank of the rate of removal, of v7."""
    value_rank: int = 32
    """Rank of the value residual, of v7."""
    gate_rank: int = 64
    """Rank of the gate, of v7."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""
    group_norm_eps: float = 1e-5
    """Epsilon of the norm after the recurrence of v6 and v7."""

    def __post_init__(self) -> None:
        if self.variant != "v4" and self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of head_dim ({self.head_dim})")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")

    @property
    def num_heads(self) -> int:
        return 1 if self.variant == "v4" else self.hidden_size // self.head_dim

    @property
    def grid(self) -> int:
        """Tokens along a side of an image of `image_size`."""
        return self.image_size // self.patch_size


def create(*, hidden_size: int = 192, variant: str = "v4", **given) -> VisionRWKVConfig:
    """A config with a channel mix of 4 widths, and the ranks and the epsilon of its variant, unless given."""
    sizes = {"intermediate_size": 4 * hidden_size}
    if hidden_size < 64:
        sizes["head_dim"] = hidden_size
    if variant == "v7":
        language = create_rwkv7(hidden_size=hidden_size, head_dim=given.get("head_dim", sizes.get("head_dim", 64)))
        sizes |= {name: getattr(language, name) for name in ("decay_rank", "rate_rank", "value_rank", "gate_rank")}
        sizes["group_norm_eps"] = 64e-5
    return VisionRWKVConfig(hidden_size=hidden_size, variant=variant, **{**sizes, **given})


def tensor_shapes(config: VisionRWKVConfig) -> dict[str, tuple[int, ...]]:
    width, patch = config.hidden_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.grid**2, width),
        "patch_embed.projection.weight": (width, config.in_channels, patch, patch),
        "patch_embed.projection.bias": (width,),
    }
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _block(config, i).items()}
    shapes |= _norm("ln1", width)
    if not config.num_classes:
        return shapes
    if config.head_hidden_size:
        shapes |= _linear("head.0", config.head_hidden_size, width)
        return shapes | _linear("head.2", config.num_classes, config.head_hidden_size)
    return shapes | _linear("head.fc", config.num_classes, width)


def _block(config: VisionRWKVConfig, layer: int) -> dict[str, tuple[int, ...]]:
    width, hidden, vector = config.hidden_size, config.intermediate_size, (1, 1, config.hidden_size)
    shapes = {name: (width,) for name in ("gamma1", "gamma2") if config.layer_scale is not None}
    for norm in ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
        shapes |= _norm(norm, width)
    shapes |= {f"att.{name}": shape for name, shape in ATTENTION[config.variant](config, layer).items()}
    if config.key_norm:
        shapes |= _norm("att.key_norm", width)
    shapes |= {
        "ffn.spatial_mix_k": vector,
        "ffn.spatial_mix_r": vector,
        "ffn.key.weight": (hidden, width),
        "ffn.receptance.weight": (width, width),
        "ffn.value.weight": (width, hidden),
    }
    return shapes | (_norm("ffn.key_norm", hidden) if config.key_norm else {})


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _attention_4(config: VisionRWKVConfig, layer: int) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    return {
        "spatial_decay": (width,),
        "spatial_first": (width,),
        **{f"spatial_mix_{name}": (1, 1, width) for name in "kvr"},
        **{f"{name}.weight": (width, width) for name in ("key", "value", "receptance", "output")},
    }


def _attention_6(config: VisionRWKVConfig, layer: int) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    return {
        **{f"time_maa_{name}": (1, 1, width) for name in "xwkvrg"},
        "time_maa_w1": (width, 5 * config.mix_rank),
        "time_maa_w2": (5, config.mix_rank, width),
        "time_decay": (1, 1, width),
        "time_decay_w1": (width, config.decay_rank),
        "time_decay_w2": (config.decay_rank, width),
        "time_faaaa": (config.num_heads, config.head_dim),
        **{f"{name}.weight": (width, width) for name in ("receptance", "key", "value", "gate", "output")},
        **_norm("ln_x", width),
    }


def _attention_7(config: VisionRWKVConfig, layer: int) -> dict[str, tuple[int, ...]]:
    sizes = ("hidden_size", "head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank")
    same = RWKV7Config(
        vocab_size=1, num_hidden_layers=1 + min(layer, 1), **{name: getattr(config, name) for name in sizes}
    )
    prefix = f"blocks.{min(layer, 1)}.att."
    return {n.removeprefix(prefix): shape for n, shape in language_shapes(same).items() if n.startswith(prefix)}


ATTENTION = {"v4": _attention_4, "v6": _attention_6, "v7": _attention_7}
"""Variant -> (config, layer) -> tensors of its attention."""
MARKS = {"spatial_decay": "v4", "time_maa_x": "v6", "r_k": "v7"}
"""A tensor of the first block's attention -> the variant that has it."""


def recognise(shapes: Shapes) -> bool:
    return "patch_embed.projection.weight" in shapes and any(f"layers.0.att.{mark}" in shapes for mark in MARKS)


def config_from_shapes(shapes: Shapes) -> VisionRWKVConfig:
    """Sizes and variant from the tensors. Layer scale and norms after the mixers go together in published models."""
    variant = next(found for mark, found in MARKS.items() if f"layers.0.att.{mark}" in shapes)
    try:
        width, in_channels, patch_size, _ = shapes["patch_embed.projection.weight"]
        tokens = shapes["pos_embed"][-2]
        sizes = {"intermediate_size": shapes["layers.0.ffn.key.weight"][0], **_ranks(shapes, variant)}
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole Vision-RWKV checkpoint: {missing} is missing") from None
    grid = isqrt(tokens)
    if grid**2 != tokens:
        raise BadCheckpoint(f"pos_embed is for {tokens} tokens, which are no square")
    last = next((shapes[name] for name in ("head.fc.weight", "head.2.weight") if name in shapes), (0, 0))
    scaled = "layers.0.gamma1" in shapes
    return VisionRWKVConfig(
        variant=variant,
        num_classes=last[0],
        head_hidden_size=last[1] if "head.2.weight" in shapes else 0,
        image_size=grid * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=width,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
        post_norm=scaled,
        layer_scale=1e-5 if scaled else None,
        key_norm="layers.0.att.key_norm.weight" in shapes,
        **sizes,
    )


def _ranks(shapes: Shapes, variant: str) -> dict[str, int | float]:
    """Sizes that one variant has; KeyError names a tensor that is missing."""
    at = "layers.0.att."
    if variant == "v6":
        factors, decay = shapes[at + "time_maa_w1"], shapes[at + "time_decay_w1"]
        return {"mix_rank": factors[1] // 5, "decay_rank": decay[1], "head_dim": shapes[at + "time_faaaa"][-1]}
    if variant == "v7":
        ranks = {f"{name}_rank": shapes[f"{at}{letter}1"][1] for name, letter in zip(("decay", "rate", "gate"), "wag")}
        if "layers.1.att.v1" in shapes:
            ranks["value_rank"] = shapes["layers.1.att.v1"][1]
        return ranks | {"head_dim": shapes[at + "r_k"][1], "group_norm_eps": 64e-5}
    return {}


def _size(width: int, **given) -> VisionRWKVConfig:
    return create(hidden_size=width, **given)


POST = {"post_norm": True, "layer_scale": 1e-5}
_TEST = {
    "num_classes": 10,
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "head_dim": 16,
    "mix_rank": 4,
    "decay_rank": 6,
    "rate_rank": 5,
    "value_rank": 4,
    "gate_rank": 7,
}
PRESETS = {
    "tiny": _size(192),
    "small": _size(384, post_norm=True, layer_scale=1.0, drop_path=0.3),
    "base": _size(768, **POST, drop_path=0.5),
    "large": _size(
        1024, num_hidden_layers=24, **POST, drop_path=0.1, key_norm=True, head_hidden_size=3072, image_size=192
    ),
    "v6-tiny": _size(192, variant="v6"),
    "v6-small": _size(384, variant="v6", **POST, drop_path=0.3),
    "v6-base": _size(768, variant="v6", **POST, drop_path=0.5),
    "v7-tiny": _size(192, variant="v7"),
    "v7-small": _size(384, variant="v7", **POST, drop_path=0.3),
    "v7-base": _size(768, variant="v7", **POST, drop_path=0.5),
    "test": VisionRWKVConfig(**_TEST, **POST, key_norm=True),
    "pre-test": VisionRWKVConfig(**_TEST),
    "v6-test": VisionRWKVConfig(**_TEST, **POST, variant="v6", head_hidden_size=24),
    "v7-test": VisionRWKVConfig(**_TEST, variant="v7", group_norm_eps=64e-5),
}


def _templates() -> list[str]:
    """Names of all tensors that a published model may have, `{layer}` for the number of the block."""
    names: dict[str, None] = {}
    for config in PRESETS.values():
        for name in tensor_shapes(config):
            first, *rest = name.split(".")
            names[".".join([first, "{layer}", *rest[1:]]) if first == "layers" else name] = None
    return [name for name in names if not name.startswith("head.")]


OPENMMLAB = Layout(rules=tuple(Rule(f"backbone.{name}", name) for name in _templates()))
"""The published files: a backbone beside a head."""

FAMILY = Family(
    name="vision-rwkv",
    kind="image",
    config=VisionRWKVConfig,
    builder="rookery.models.vision:VisionRWKV",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    layouts={"openmmlab": OPENMMLAB},
    fingerprinted=("patch_embed.projection.weight", "ln1.weight"),
)
