"""What the converted transformers share: a Llama or Qwen2 body whose attention has become an RWKV time mix.

Published files have the names of their Hugging Face models; the mixers' own names are in the families' files. Some
blocks may keep the attention that they had, under its own names: a hybrid, whose cache grows.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families.base import Shapes
from rookery.families.layout import Rule
from rookery.families.transformer import TransformerConfig, attention_shapes

LAYER = "model.layers.{layer}."


@dataclass(frozen=True, kw_only=True)
class ConvertedConfig:
    """Sizes of the body."""

    vocab_size: int = 151936
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 896
    """Width of the residual stream."""
    num_hidden_layers: int = 24
    """Blocks."""
    head_dim: int = 64
    """Channels per head of the time mix."""
    intermediate_size: int = 4864
    """Hidden units of the gated MLP."""
    tie_word_embeddings: bool = False
    """The head uses the embedding matrix."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    attention_layers: tuple[int, ...] = ()
    """Blocks that keep softmax attention, counted from 0."""
    attention_rope_theta: float | None = 1e6
    """Base of the rotary position embedding in these blocks; None leaves positions out."""

    def __post_init__(self) -> None:
        kept = sorted(set(self.attention_layers))
        if kept and kept[0] < 0:
            raise ValueError(f"attention_layers must name blocks, counted from 0; got {kept[0]}")
        # a tuple, though JSON knows lists only, of the blocks that there are: presets are made with fewer
        object.__setattr__(self, "attention_layers", tuple(i for i in kept if i < self.num_hidden_layers))
        if not self.attention_layers:  # what a config file says of attention means nothing here
            object.__setattr__(self, "attention_rope_theta", 1e6)

    @property
    def first_mixer(self) -> int:
        """The first block with a time mix, whose values the later ones mix with theirs; −1 where all keep attention."""
        mixers = [i for i in range(self.num_hidden_layers) if i not in self.attention_layers]
        return mixers[0] if mixers else -1

    @property
    def attention(self) -> TransformerConfig:
        """The kept attention as a transformer's."""
        return TransformerConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            rope_theta=self.attention_rope_theta,
            **self.attention_sizes(),
        )

    def attention_sizes(self) -> dict[str, int | bool]:
        """num_attention_heads, num_key_value_heads, head_dim and qkv_bias of the attention that was there."""
        raise NotImplementedError

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def wkv_shape(self) -> tuple[int, int, int]:
        """One block's recurrent state of one row: head, value, key."""
        return self.num_heads, self.head_dim, self.head_dim

    @property
    def shift_width(self) -> int:
        """Channels of the last input that a block remembers; 0 where it shifts nothing."""
        return self.hidden_size

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the recurrent state, the same after any number of tokens, and of the caches of kept attention.

        `itemsize` bytes a number of a shift or a cache; caches are as long as the longest row.
        """
        kept = len(self.attention_layers)
        wkv = math.prod(self.wkv_shape) * max(4, itemsize)
        recurrent = (self.num_hidden_layers - kept) * batch * (self.shift_width * itemsize + wkv)
        if not kept:
            return recurrent
        per_token = 2 * kept * self.attention.num_key_value_heads * self.attention.head_dim * itemsize
        return recurrent + per_token * tokens_seen * batch


def body_shapes(
    config: ConvertedConfig, mixer: Callable[[int], dict[str, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """Tensors in the published order; `mixer(i)` gives those below "self_attn." of a block that has a time mix."""
    width, ffn = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        at = LAYER.format(layer=i)
        shapes[at + "input_layernorm.weight"] = (width,)
        own = attention_shapes(config.attention) if i in config.attention_layers else mixer(i)
        shapes |= {f"{at}self_attn.{name}": shape for name, shape in own.items()}
        shapes[at + "post_attention_layernorm.weight"] = (width,)
        shapes |= {f"{at}mlp.{name}_proj.weight": (ffn, width) for name in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (width, ffn)
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def body_sizes(shapes: Shapes, family: str) -> dict[str, int | bool]:
    """Config fields that the body's tensors tell; BadCheckpoint names what is missing."""
    try:
        vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
        layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers."))
        ffn = shapes["model.layers.0.mlp.gate_proj.weight"][0]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole {family} checkpoint: {missing} is missing") from None
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def mixers_of(shapes: Shapes, tensor: str) -> list[int]:
    """Blocks that have `tensor` below "self_attn.", which every time mix of the family has."""
    found = (re.fullmatch(rf"model\.layers\.(\d+)\.self_attn\.{re.escape(tensor)}", name) for name in shapes)
    return sorted(int(match[1]) for match in found if match)


def kept_layers(shapes: Shapes, mixers: list[int]) -> tuple[int, ...]:
    """The other blocks, which keep attention."""
    layers = {int(name.split(".")[2]) for name in shapes if name.endswith(".input_layernorm.weight")}
    return tuple(sorted(layers - set(mixers)))


def lora_rank(width: int, exponent: float, factor: float) -> int:
    """Low-rank width of the conversions: 32 · max(1, round(factor · widthᵉ / 32)) (adaptation.md 0)."""
    return 32 * max(1, round(factor * width**exponent / 32))


GGUF_BODY = (
    Rule("token_embd.weight", "model.embed_tokens.weight"),
    Rule("output.weight", "lm_head.weight"),
    Rule("output_norm.weight", "model.norm.weight"),
    *(
        Rule(f"blk.{{layer}}.{new}.weight", f"{LAYER}{old}.weight")
        for new, old in {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        }.items()
    ),
)
"""The body's names in llama.cpp."""
