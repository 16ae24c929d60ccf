"""RWKV-CLIP (arXiv 2406.06973): a tower for images and one for texts that meet in one space. Sizes and names."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families import vision_rwkv
from rookery.families.base import Family, Shapes
from rookery.families.vision_rwkv import VisionRWKVConfig

IMAGE, TEXT = "image_model.", "text_model."


@dataclass(frozen=True, kw_only=True)
class RWKVCLIPConfig:
    """Sizes of both towers. The width is that of the common space: neither tower has a projection after it."""

    hidden_size: int = 640
    """Width of both residual streams, and of the features."""
    image_size: int = 224
    """Height and width for which positions are learned; other sizes resize them."""
    patch_size: int = 32
    """Pixels of a token's side."""
    in_channels: int = 3
    """Numbers of a pixel."""
    num_hidden_layers: int = 12
    """Blocks of the image tower."""
    image_head_dim: int = 80
    """Channels per head of the image tower."""
    image_intermediate_size: int = 3200
    """Hidden units of its channel mix."""
    drop_path: float = 0.0
    """Chance that the last block's mixers are left out of a training sample; it rises from 0 in the first block."""
    vocab_size: int = 49408
    """Tokens; the last but one begins a text, the last one ends it, 0 fills it up."""
    context_length: int = 77
    """Tokens of a text at most, its beginning and end included."""
    text_layers: int = 6
    """Blocks of the text tower."""
    text_head_dim: int = 64
    """Channels per head of the text tower."""
    text_intermediate_size: int = 2240
    """Hidden units of its channel mix."""
    pad_mode: Literal["clip77", "masked"] = "masked"
    """masked: what fills a text up has no effect; clip77: it is read and averaged like words, as published."""
    mix_rank: int = 32
    """Rank of the data-dependent interpolations."""
    decay_rank: int = 64
    """Rank of the data-dependent decay."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""

    def __post_init__(self) -> None:
        for name in ("image_head_dim", "text_head_dim"):
            if self.hidden_size % (dim := getattr(self, name)):
                raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of {name} ({dim})")
        if self.context_length < 2 or self.vocab_size < 3:
            raise ValueError("a text needs two tokens at least (context_length) and a vocabulary three (vocab_size)")
        if self.pad_mode not in ("clip77", "masked"):
            raise ValueError(f'pad_mode must be "clip77" or "masked", got {self.pad_mode!r}')

    def image(self) -> VisionRWKVConfig:
        """The image tower as a model of its own."""
        same = ("hidden_size", "image_size", "patch_size", "in_channels", "num_hidden_layers", "drop_path", "mix_rank")
        return VisionRWKVConfig(
            variant="v6",
            num_classes=0,
            head_dim=self.image_head_dim,
            intermediate_size=self.image_intermediate_size,
            decay_rank=self.decay_rank,
            layer_norm_eps=self.layer_norm_eps,
            **{name: getattr(self, name) for name in same},
        )

    def text(self) -> "TextTowerConfig":
        """What the blocks of the text tower are made from."""
        return TextTowerConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.text_layers,
            head_dim=self.text_head_dim,
            intermediate_size=self.text_intermediate_size,
            mix_rank=self.mix_rank,
            decay_rank=self.decay_rank,
            layer_norm_eps=self.layer_norm_eps,
        )


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Sizes of the text tower's blocks, under the names that their parts know."""

    hidden_size: int
    num_hidden_layers: int
    head_dim: int
    intermediate_size: int
    mix_rank: int
    decay_rank: int
    layer_norm_eps: float
    group_norm_eps: float = 64e-5
    key_norm: bool = False
    signals: str = "wkvrg"

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim


def create(*, hidden_size: int = 640, **given) -> RWKVCLIPConfig:
    """A config with the published proportions: heads of an eighth and a tenth of the width where these divide it."""
    sizes: dict[str, Any] = {
        "image_intermediate_size": 5 * hidden_size,
        "text_intermediate_size": max(32, int(3.5 * hidden_size) // 32 * 32),
    }
    if hidden_size % 80:
        sizes |= {"image_head_dim": min(hidden_size, 32), "text_head_dim": min(hidden_size, 32)}
    return RWKVCLIPConfig(hidden_size=hidden_size, **{**sizes, **given})


def tensor_shapes(config: RWKVCLIPConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    shapes |= {IMAGE + name: shape for name, shape in vision_rwkv.tensor_shapes(config.image()).items()}
    width, text = config.hidden_size, config.text()
    shapes[TEXT + "emb.weight"] = (config.vocab_size, width)
    for i in range(config.text_layers):
        at = f"{TEXT}blocks.{i}."
        for norm in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            shapes |= {f"{at}{norm}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"{at}att.{name}": shape for name, shape in vision_rwkv.ATTENTION["v6"](text, i).items()}
        shapes |= {f"{at}ffn.time_maa_{name}": (1, 1, width) for name in "kr"}
        hidden = text.intermediate_size
        sides = {"key": (hidden, width), "receptance": (width, width), "value": (width, hidden)}
        shapes |= {f"{at}ffn.{name}.weight": shape for name, shape in sides.items()}
    return shapes | {f"{TEXT}ln_out.{part}": (width,) for part in ("weight", "bias")}


def recognise(shapes: Shapes) -> bool:
    return IMAGE + "patch_embed.projection.weight" in shapes and TEXT + "emb.weight" in shapes


def config_from_shapes(shapes: Shapes) -> RWKVCLIPConfig:
    """Sizes from the tensors. Files that are not ours are of the published recipe, which reads what fills texts up."""
    image = {name.removeprefix(IMAGE): shape for name, shape in shapes.items() if name.startswith(IMAGE)}
    if not vision_rwkv.recognise(image):
        raise BadCheckpoint("not a whole RWKV-CLIP checkpoint: its image tower has no block of Vision-RWKV's")
    tower = vision_rwkv.config_from_shapes(image)
    try:
        vocab_size, width = shapes[TEXT + "emb.weight"]
        head_dim = shapes[TEXT + "blocks.0.att.time_faaaa"][-1]
        hidden = shapes[TEXT + "blocks.0.ffn.key.weight"][0]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RWKV-CLIP checkpoint: {missing} is missing") from None
    layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith(TEXT + "blocks."))
    same = ("image_size", "patch_size", "in_channels", "num_hidden_layers", "mix_rank", "decay_rank")
    return RWKVCLIPConfig(
        hidden_size=width,
        image_head_dim=tower.head_dim,
        image_intermediate_size=tower.intermediate_size,
        vocab_size=vocab_size,
        text_layers=layers,
        text_head_dim=head_dim,
        text_intermediate_size=hidden,
        pad_mode="clip77",
        **{name: getattr(tower, name) for name in same},
    )


_TEST = RWKVCLIPConfig(
    hidden_size=32,
    image_size=16,
    patch_size=4,
    num_hidden_layers=2,
    image_head_dim=16,
    image_intermediate_size=64,
    vocab_size=60,
    context_length=9,
    text_layers=2,
    text_head_dim=8,
    text_intermediate_size=48,
    mix_rank=4,
    decay_rank=6,
)
PRESETS = {
    "b32": RWKVCLIPConfig(pad_mode="clip77"),
    "b16": RWKVCLIPConfig(pad_mode="clip77", patch_size=16),
    "nano": create(hidden_size=96, image_size=32, patch_size=4, num_hidden_layers=4, text_layers=2, context_length=16),
    "test": _TEST,
    "clip77-test": replace(_TEST, pad_mode="clip77"),
}

FAMILY = Family(
    name="rwkv-clip",
    kind="pair",
    config=RWKVCLIPConfig,
    builder="rookery.models.clip:RWKVCLIP",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    fingerprinted=(TEXT + "emb.weight", TEXT + "ln_out.weight"),
)
