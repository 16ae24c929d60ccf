"""DIR-7 (arXiv 2504.14260): images out of noise and a text, read by RWKV-7's recurrence. Sizes and names; no torch.

Nothing that is published is complete: sizes, names and the block are ours (see `docs/how-it-works/diffusion.md`).
"""

from dataclasses import dataclass
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.diffusion import (
    DiffusionConfig,
    head_shapes,
    linear,
    mixer_shapes,
    norms,
    ranks,
    stem_shapes,
    stem_sizes,
)
from rookery.families.rwkv7 import suggested_ranks
from rookery.families.vision_rwkv import ATTENTION

Cross = Literal["text_kv", "text_read", "text_r", "softmax", "none"]


@dataclass(frozen=True, kw_only=True)
class DIR7Config(DiffusionConfig):
    """One DIR-7 model."""

    num_hidden_layers: int = 12
    text_size: int = 512
    """Numbers that describe a token of the text."""
    text_buckets: int = 0
    """Rows of the model's own table of words, into which words are hashed; 0 for a model that is given features."""
    cross: Cross = "text_kv"
    """How images read texts. text_kv: the text writes a state, then the image goes on reading and writing it;
    text_read: the image only reads it; text_r: the paper's form, the text reads what the image writes; softmax:
    cross-attention; none: not at all."""
    align: Literal["left_pad", "interpolate"] = "left_pad"
    """text_r: the text lies at the end of the image's tokens, or is stretched over all of them."""
    text_decay: bool = True
    """Whether the state forgets while a text is read."""
    pooled_text: bool = True
    """Whether the mean of the text is also added to the noise level, which modulates every block."""
    null: Literal["learned", "empty"] = "learned"
    """What stands for no text: a token that is learned, or no token."""
    removal: float = 1.0
    """Factor of what is removed from a state: 2 lets one block follow permutations; published RWKV-7 has 1."""
    directions: Literal["cycle", "both"] = "cycle"
    """Ways of the image's scans: one for each block, in turns, or forwards and backwards in every block, added."""
    skips: bool = False
    """Whether the second half of the blocks also reads what the first half wrote, as in Diffusion-RWKV."""

    # what the pieces of Vision-RWKV and of RWKV-7 ask of a config
    variant = "v7"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of head_dim ({self.head_dim})")
        if self.removal not in (1.0, 2.0):
            raise ValueError(f"removal must be 1 or 2, got {self.removal}")

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def first_reader(self) -> int:
        """The first block that reads a skip; as many blocks as there are for a model without."""
        return (self.num_hidden_layers + 1) // 2 if self.skips else self.num_hidden_layers


def create(*, hidden_size: int = 384, num_hidden_layers: int = 12, **given: Any) -> DIR7Config:
    """A config with a channel mix of 4 widths, RWKV-7's ranks and, from 12 blocks on, skips, unless given."""
    sizes = {"intermediate_size": 4 * hidden_size, "head_dim": min(64, hidden_size), **suggested_ranks(hidden_size)}
    sizes["skips"] = num_hidden_layers >= 12
    return DIR7Config(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, **{**sizes, **given})


def cross_shapes(config: DIR7Config, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of what reads the text in block `layer`; those that the modes share have the same names."""
    width, text = config.hidden_size, config.text_size
    if config.cross == "none":
        return {}
    if config.cross == "softmax":
        inputs = {"query": width, "key": text, "value": text, "output": width}
        return {f"{name}.weight": (width, inputs[name]) for name in inputs}
    shapes = dict(ATTENTION["v7"](config, layer))
    if config.cross == "text_r":
        del shapes["x_r"]
        return shapes | {"receptance.weight": (width, text)}
    shapes["text.weight"] = (width, text)
    if config.cross == "text_read":
        image_only = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "r_k", "v0", "v1", "v2")
        decay = () if config.text_decay else ("w0", "w1", "w2")
        shapes = {name: shape for name, shape in shapes.items() if name not in image_only + decay}
    return shapes


def tensor_shapes(config: DIR7Config) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    shapes = stem_shapes(config)
    if config.text_buckets:
        shapes["text_embed.weight"] = (config.text_buckets, config.text_size)
    if config.null == "learned":
        shapes["text_null"] = (config.text_size,)
    if config.pooled_text:
        shapes |= linear("text_pool", width, config.text_size)
    crosses = config.cross != "none"
    for i in range(config.num_hidden_layers):
        block = mixer_shapes(config, i) | norms(width, "ln1", "ln2", *(["ln_cross"] if crosses else []))
        block |= {f"cross.{name}": shape for name, shape in cross_shapes(config, i).items()}
        block |= linear("adaLN_modulation.1", 6 * width, width)
        if i >= config.first_reader:
            block |= linear("skip_linear", width, 2 * width)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | head_shapes(config)


def recognise(shapes: Shapes) -> bool:
    return {"blocks.0.adaLN_modulation.1.weight", "blocks.0.att.r_k", "final_layer.linear.weight"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> DIR7Config:
    """Sizes and the way of reading from the tensors; our own files say themselves what tensors do not show."""
    sizes = stem_sizes(shapes, "DIR-7")
    first = "blocks.0."
    try:
        sizes |= ranks(shapes, "blocks.0.att.", "blocks.1.att.")
        sizes["intermediate_size"] = shapes[first + "ffn.key.weight"][0]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole DIR-7 checkpoint: {missing} is missing") from None
    cross, source = "none", None
    if first + "cross.query.weight" in shapes:
        cross, source = "softmax", "key.weight"
    elif first + "cross.text.weight" in shapes:
        cross, source = "text_kv" if first + "cross.x_r" in shapes else "text_read", "text.weight"
    elif first + "cross.receptance.weight" in shapes:
        cross, source = "text_r", "receptance.weight"
    if source:
        sizes["text_size"] = shapes[f"{first}cross.{source}"][1]
    elif "text_null" in shapes or "text_pool.weight" in shapes:
        sizes["text_size"] = shapes.get("text_null", shapes.get("text_pool.weight", ()))[-1]
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    return DIR7Config(
        num_hidden_layers=layers,
        cross=cross,
        text_buckets=shapes.get("text_embed.weight", (0,))[0],
        text_decay=cross != "text_read" or first + "cross.w0" in shapes,
        null="learned" if "text_null" in shapes else "empty",
        pooled_text="text_pool.weight" in shapes,
        skips=f"blocks.{layers - 1}.skip_linear.weight" in shapes,
        **sizes,
    )


_TEST = {
    "in_channels": 1,
    "image_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "head_dim": 16,
    "text_size": 12,
    "noise_steps": 50,
    "beta_last": 0.2,
    "decay_rank": 6,
    "rate_rank": 5,
    "value_rank": 4,
    "gate_rank": 7,
}
DIGITS = create(
    hidden_size=64,
    num_hidden_layers=3,
    head_dim=32,
    in_channels=1,
    image_size=8,
    text_size=32,
    text_buckets=512,
    pooled_text=False,
    noise_steps=200,
    beta_first=5e-4,
    beta_last=0.1,
)
"""Digits of 8 × 8 pixels; texts act through the cross layers alone."""
PRESETS = {
    "digits": DIGITS,
    "nano": create(hidden_size=64, num_hidden_layers=3, head_dim=32),
    "tiny": create(hidden_size=192, num_hidden_layers=6),
    "small": create(hidden_size=384, num_hidden_layers=12),
    "base": create(hidden_size=768, num_hidden_layers=12),
    "large": create(hidden_size=1024, num_hidden_layers=24),
    "xl": create(hidden_size=1152, num_hidden_layers=28),
    "test": DIR7Config(**_TEST, text_buckets=40, skips=True),
    "read-test": DIR7Config(**_TEST, cross="text_read", text_decay=False, null="empty", directions="both"),
    "r-test": DIR7Config(**_TEST, cross="text_r", removal=2.0, learn_sigma=True),
    "softmax-test": DIR7Config(**_TEST, cross="softmax", pooled_text=False, prediction="flow"),
    "none-test": DIR7Config(**_TEST, cross="none", prediction="v"),
}

FAMILY = Family(
    name="dir-7",
    kind="diffusion",
    config=DIR7Config,
    builder="rookery.models.dir7:DIR7",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    fingerprinted=("patch_embed.proj.weight", "norm_f.weight"),
)
