"""Diffusion-RWKV (arXiv 2404.04478): images out of noise with Vision-RWKV's blocks. Sizes and names; no torch.

`DiffusionConfig` is what every diffusion model says of itself, the noise it was trained on included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.rwkv7 import suggested_ranks
from rookery.families.vision_rwkv import ATTENTION, MARKS

TIME_FEATURES = 256
"""Sines and cosines that a noise level is described with."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Sizes and choices that diffusion models share."""

    in_channels: int = 4
    """Numbers of a pixel; 4 for the latents of Stable Diffusion's autoencoder."""
    image_size: int = 32
    """Height and width for which positions are learned; other sizes resize them."""
    patch_size: int = 2
    """Pixels of a token's side."""
    hidden_size: int = 384
    """Width of the residual stream."""
    num_hidden_layers: int = 13
    """Blocks."""
    intermediate_size: int = 1536
    """Hidden units of the channel mix."""
    head_dim: int = 64
    """Channels per head, where the attention has heads."""
    learn_sigma: bool = False
    """Whether the variance of a step is predicted, too: twice the outputs."""
    prediction: Literal["eps", "v", "flow"] = "eps"
    """What the outputs are: the noise; α·noise − σ·image; or noise − image along a straight line (rectified flow)."""
    noise_steps: int = 1000
    """Noise levels in training; t runs from 0 (least) to noise_steps − 1."""
    beta_first: float = 1e-4
    """Variance that the first step adds; it rises in a line."""
    beta_last: float = 0.02
    """Variance that the last step adds."""
    shift: Literal["q", "1d", "none"] = "q"
    """Neighbours that tokens are mixed with: the four on the grid, the one before, or none."""
    decay_rank: int = 64
    """Rank of the data-dependent decay, of RWKV-7."""
    rate_rank: int = 32
    """Rank of the rate of removal, of RWKV-7."""
    value_rank: int = 32
    """Rank of the value residual, of RWKV-7."""
    gate_rank: int = 64
    """Rank of the gate, of RWKV-7."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm but the last, which has 1e-6."""
    group_norm_eps: float = 64e-5
    """Epsilon of the norm after RWKV-7's recurrence."""

    # what the pieces of Vision-RWKV ask of a config
    key_norm = False
    init = "fancy"
    compat = "exact"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of 4, for positions in two dimensions"
            )
        if self.prediction == "flow" and self.learn_sigma:
            raise ValueError("a flow has no variance to learn: leave learn_sigma off")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(f"0 < beta_first ≤ beta_last < 1 is needed, got {self.beta_first} and {self.beta_last}")

    @property
    def grid(self) -> int:
        """Tokens along a side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Numbers that are predicted for each pixel."""
        return self.in_channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True, kw_only=True)
class DiffusionRWKVConfig(DiffusionConfig):
    """One Diffusion-RWKV model."""

    variant: Literal["v4", "v7"] = "v4"
    """v4: averages over all tokens, in both directions at once; v7: RWKV-7's state, the direction changing with the
    block."""
    num_classes: int = 1000
    """Labels to draw; 0 for a model that is told nothing."""
    class_dropout: float = 0.1
    """Share of training labels that become the null label, which guidance needs."""
    drop_path: float = 0.1
    """Chance that the last block's mixers are left out of a training sample; it rises from 0 in the first block."""
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_hidden_layers % 2 == 0:
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) must be odd: the second half reads what the first wrote"
            )
        if self.variant == "v7" and self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of head_dim ({self.head_dim})")

    @property
    def num_heads(self) -> int:
        return 1 if self.variant == "v4" else self.hidden_size // self.head_dim


def create(*, hidden_size: int = 384, variant: str = "v4", **given: Any) -> DiffusionRWKVConfig:
    """A config with a channel mix of 4 widths and, for RWKV-7's state, heads and ranks by its formula, unless given."""
    sizes: dict[str, Any] = {"intermediate_size": 4 * hidden_size}
    if variant == "v7":
        sizes |= {"head_dim": min(64, hidden_size), **suggested_ranks(hidden_size)}
    return DiffusionRWKVConfig(hidden_size=hidden_size, variant=variant, **{**sizes, **given})


def block_names(config: DiffusionRWKVConfig) -> list[str]:
    """Where block 0, 1, … lies: the first half writes, the middle one and the second half reads."""
    half = config.num_hidden_layers // 2
    return [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))]


def tensor_shapes(config: DiffusionRWKVConfig) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    shapes = stem_shapes(config)
    if config.num_classes:
        shapes["label_emb.embedding_table.weight"] = (config.num_classes + 1, width)
    for i, name in enumerate(block_names(config)):
        block = mixer_shapes(config, i) | norms(width, *(["ln0"] if i == 0 else []), "ln1", "ln2")
        block |= linear("adaLN_modulation.1", 6 * width, width)
        if name.startswith("out"):
            block |= linear("skip_linear", width, 2 * width)
        shapes |= {f"{name}.{part}": shape for part, shape in block.items()}
    return shapes | head_shapes(config)


def stem_shapes(config: DiffusionConfig) -> dict[str, tuple[int, ...]]:
    """Tensors before the blocks: positions, patches, time."""
    width, patch = config.hidden_size, config.patch_size
    return {
        "pos_embed": (1, config.grid**2, width),
        "patch_embed.proj.weight": (width, config.in_channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        **linear("time_embed.mlp.0", width, TIME_FEATURES),
        **linear("time_embed.mlp.2", width, width),
    }


def mixer_shapes(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the spatial mix and of the channel mix of block `layer`."""
    width, hidden = config.hidden_size, config.intermediate_size
    return {
        **{f"att.{name}": shape for name, shape in ATTENTION[config.variant](config, layer).items()},
        "ffn.spatial_mix_k": (1, 1, width),
        "ffn.spatial_mix_r": (1, 1, width),
        "ffn.key.weight": (hidden, width),
        "ffn.receptance.weight": (width, width),
        "ffn.value.weight": (width, hidden),
    }


def head_shapes(config: DiffusionConfig) -> dict[str, tuple[int, ...]]:
    """Tensors after the blocks."""
    width = config.hidden_size
    return {
        **norms(width, "norm_f"),
        **linear("final_layer.linear", config.patch_size**2 * config.out_channels, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }


def norms(width: int, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (width,) for name in names for part in ("weight", "bias")}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def recognise(shapes: Shapes) -> bool:
    return {"mid_block.adaLN_modulation.1.weight", "final_layer.linear.weight"} <= shapes.keys()


def stem_sizes(shapes: Shapes, what: str) -> dict[str, Any]:
    """Config fields that every diffusion model's tensors tell; BadCheckpoint names what is missing."""
    try:
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        outputs, tokens = shapes["final_layer.linear.weight"][0], shapes["pos_embed"][-2]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole {what} checkpoint: {missing} is missing") from None
    grid = isqrt(tokens)
    if grid**2 != tokens:
        raise BadCheckpoint(f"pos_embed is for {tokens} tokens, which are no square")
    sizes = {"in_channels": channels, "patch_size": patch, "image_size": grid * patch, "hidden_size": width}
    return sizes | {"learn_sigma": outputs == 2 * channels * patch**2}


def ranks(shapes: Mapping[str, tuple[int, ...]], first: str, second: str) -> dict[str, int]:
    """Ranks and head size of RWKV-7's mixer at `first`; that of the value residual from the next one."""
    found = {f"{name}_rank": shapes[f"{first}{letter}1"][1] for name, letter in zip(("decay", "rate", "gate"), "wag")}
    if f"{second}v1" in shapes:
        found["value_rank"] = shapes[f"{second}v1"][1]
    return found | {"head_dim": shapes[f"{first}r_k"][1]}


def config_from_shapes(shapes: Shapes) -> DiffusionRWKVConfig:
    sizes = stem_sizes(shapes, "Diffusion-RWKV")
    half = len({name.split(".")[1] for name in shapes if name.startswith("in_blocks.")})
    first, second = ("in_blocks.0.att.", "in_blocks.1.att." if half > 1 else "mid_block.att.")
    if not half:
        first = second = "mid_block.att."
    try:
        variant = next(found for mark, found in MARKS.items() if first + mark in shapes)
        sizes["intermediate_size"] = shapes["mid_block.ffn.key.weight"][0]
        sizes |= ranks(shapes, first, second) if variant == "v7" else {}
    except (KeyError, StopIteration) as missing:
        raise BadCheckpoint(f"not a whole Diffusion-RWKV checkpoint: {missing or 'the attention'} is missing") from None
    labels = shapes.get("label_emb.embedding_table.weight", (1,))[0]
    return DiffusionRWKVConfig(variant=variant, num_hidden_layers=2 * half + 1, num_classes=labels - 1, **sizes)


_TEST = {
    "in_channels": 1,
    "image_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "noise_steps": 50,
    "beta_last": 0.2,
    "num_classes": 10,
}
_RANKS = {"head_dim": 16, "decay_rank": 6, "rate_rank": 5, "value_rank": 4, "gate_rank": 7}
SIZES = {"small": (384, 13), "base": (384, 25), "medium": (512, 25), "large": (768, 37), "huge": (1024, 37)}
"""Name -> width and blocks, as published."""
PRESETS = {
    **{name: create(hidden_size=c, num_hidden_layers=layers) for name, (c, layers) in SIZES.items()},
    **{f"{name}-4": create(hidden_size=c, num_hidden_layers=n, patch_size=4) for name, (c, n) in SIZES.items()},
    "test": DiffusionRWKVConfig(**_TEST),
    "v7-test": DiffusionRWKVConfig(**_TEST, **_RANKS, variant="v7"),
}

FAMILY = Family(
    name="diffusion-rwkv",
    kind="diffusion",
    config=DiffusionRWKVConfig,
    builder="rookery.models.diffusion:DiffusionRWKV",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    fingerprinted=("patch_embed.proj.weight", "norm_f.weight"),
)
