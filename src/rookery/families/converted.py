"""What the converted transformers share: a Llama or Qwen2 body whose attention has become an RWKV time mix.

Published files have the names of their Hugging Face models; the mixers' own names are in the families' files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families.base import Shapes
from rookery.families.layout import Rule

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
        """Bytes of the recurrent state: the same after any number of tokens; `itemsize` bytes a shift number."""
        wkv = math.prod(self.wkv_shape) * max(4, itemsize)
        return self.num_hidden_layers * batch * (self.shift_width * itemsize + wkv)


def body_shapes(
    config: ConvertedConfig, mixer: Callable[[int], dict[str, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """Tensors in the published order; `mixer(i)` gives those below "self_attn."."""
    width, ffn = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        at = LAYER.format(layer=i)
        shapes[at + "input_layernorm.weight"] = (width,)
        shapes |= {f"{at}self_attn.{name}": shape for name, shape in mixer(i).items()}
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
