"""The transformer that is everybody's baseline and teacher: Llama/Qwen2 shapes under their Hugging Face names."""

from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and choices of one transformer."""

    vocab_size: int = 50304
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    num_attention_heads: int = 12
    """Query heads."""
    num_key_value_heads: int = 12
    """Key and value heads; fewer than query heads means grouped queries."""
    head_dim: int = 64
    """Channels per head; even where RoPE is used."""
    intermediate_size: int = 2048
    """Hidden units of the gated MLP."""
    rope_theta: float | None = 10000.0
    """Base of the rotary position embedding; None leaves positions out."""
    qkv_bias: bool = False
    """Biases on query, key and value projections (Qwen2)."""
    tie_word_embeddings: bool = False
    """The head uses the embedding matrix."""
    is_causal: bool = True
    """False lets every token see the whole row (encoders); such a model has no state to carry."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMS norm."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the key/value cache after `tokens_seen` tokens (of the longest row); `itemsize` bytes a number."""
        per_token = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return per_token * tokens_seen * batch * itemsize


def create(
    *, hidden_size: int = 768, num_attention_heads: int | None = None, head_dim: int | None = None, **given
) -> TransformerConfig:
    """A Llama-shaped config: heads of 64 channels and an MLP of 8/3 of the width (rounded up to 32) unless given."""
    head_dim = head_dim or (hidden_size // num_attention_heads if num_attention_heads else min(64, hidden_size))
    num_attention_heads = num_attention_heads or hidden_size // head_dim
    given.setdefault("num_key_value_heads", num_attention_heads)
    given.setdefault("intermediate_size", -(-8 * hidden_size // 3 // 32) * 32)
    return TransformerConfig(
        hidden_size=hidden_size, num_attention_heads=num_attention_heads, head_dim=head_dim, **given
    )


def attention_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Tensors below "self_attn."."""
    width = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"{name}_proj.weight"] = (rows, width)
        if config.qkv_bias:
            shapes[f"{name}_proj.bias"] = (rows,)
    return shapes | {"o_proj.weight": (width, queries)}


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    width, ffn = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        shapes[at + "input_layernorm.weight"] = (width,)
        shapes |= {f"{at}self_attn.{name}": shape for name, shape in attention_shapes(config).items()}
        shapes[at + "post_attention_layernorm.weight"] = (width,)
        shapes[at + "mlp.gate_proj.weight"] = (ffn, width)
        shapes[at + "mlp.up_proj.weight"] = (ffn, width)
        shapes[at + "mlp.down_proj.weight"] = (width, ffn)
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def recognise(shapes: Shapes) -> bool:
    # RADLADS' students keep the projections and have a recurrence between them; hybrids have it in some blocks
    if any(name.endswith(RECURRENT) for name in shapes):
        return False
    return "model.layers.0.self_attn.q_proj.weight" in shapes and "model.layers.0.mlp.gate_proj.weight" in shapes


RECURRENT = (".self_attn.w0", ".self_attn.time_maa_w1", ".self_attn.time_mixer.r_k")
"""Tensors that some block of a converted transformer has."""


def config_from_shapes(shapes: Shapes, head_dim: int | None = None) -> TransformerConfig:
    """Sizes from the tensors. The head size, if not given, is 64, or 128 where the width is at least 2048."""
    try:
        vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
        layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers."))
        queries = shapes["model.layers.0.self_attn.q_proj.weight"][0]
        keys = shapes["model.layers.0.self_attn.k_proj.weight"][0]
        ffn = shapes["model.layers.0.mlp.gate_proj.weight"][0]
    except KeyError as missing:
        raise BadCheckpoint(f"not a transformer of Llama or Qwen2 shape: {missing} is missing") from None
    head_dim = head_dim or (128 if hidden_size >= 2048 else 64)
    if queries % head_dim or keys % head_dim:
        raise BadCheckpoint(
            f"the head size is not in the tensors, and {head_dim} does not divide the {queries} query and {keys} key "
            "channels; build the model from its config instead"
        )
    return TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=queries // head_dim,
        num_key_value_heads=keys // head_dim,
        head_dim=head_dim,
        intermediate_size=ffn,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
        tie_word_embeddings="lm_head.weight" not in shapes,
    )


def is_unused(name: str) -> bool:
    """Older files carry the rotary frequencies, which follow from rope_theta."""
    return name.endswith("rotary_emb.inv_freq")


FAMILY = Family(
    name="transformer",
    kind="language",
    config=TransformerConfig,
    builder="rookery.models.transformer:Transformer",
    presets={
        "test": TransformerConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
        )
    },
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    not_in_shapes=("head_dim",),
    is_unused=is_unused,
    fingerprinted=("model.embed_tokens.weight", "model.norm.weight"),
)
