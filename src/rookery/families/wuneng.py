"""WuNeng (arXiv 2504.19191): attention heads, RWKV-7 state heads and heads between them, in every block.

The paper is known from its abstract, its introduction and a review of it; there is no code and there are no weights.
Names, sizes and everything that these sources leave open are ours.
"""

from dataclasses import dataclass
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Headed, Shapes, sizes_from
from rookery.families.rwkv7 import suggested_ranks


@dataclass(frozen=True, kw_only=True)
class WuNengConfig(Headed):
    """Sizes and choices of one WuNeng model."""

    vocab_size: int = 65536
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    head_dim: int = 64
    """Channels per head of every kind."""
    intermediate_size: int = 3072
    """Hidden units of the channel mix or of the gated MLP."""
    base: Literal["rwkv7", "transformer"] = "rwkv7"
    """Whose block it is: token shifts, layer norms and a channel mix; or no shifts, RMS norms and a gated MLP."""
    middle: Literal["gated", "additive", "concat", "none"] = "gated"
    """How a middle head mixes an attention head with a state head."""
    out_mode: Literal["concat", "sum"] = "concat"
    """The output projection reads the three kinds side by side, or their sum, with a third of the parameters."""
    state_read: Literal["single", "double"] = "single"
    """S q, or the paper's literal Sᵀ (S q), which is computed token by token."""
    value_source: Literal["x", "attn"] = "x"
    """What the state stores: the attention's values, or a projection of its output (the paper's literal coupling)."""
    state_window: int = 1
    """Tokens whose queries read the state together; 1 is the token's own alone."""
    attn_norm: bool = True
    """A norm over each attention head, as over each state head."""
    iclr_scale: float = 1.0
    """Factor of what the state removes: 2 allows eigenvalues down to −1, see state tracking."""
    decay_rank: int = 64
    """Rank of the decay's low-rank map (w1, w2)."""
    rate_rank: int = 64
    """Rank of the in-context learning rate's low-rank map (a1, a2)."""
    rope_theta: float | None = 10000.0
    """Base of the rotary positions of the attention heads; None leaves positions out. State heads have none."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every norm over the width."""
    group_norm_eps: float = 64e-5
    """Epsilon of the norms over heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")
        if self.state_window < 1:
            raise ValueError(f"state_window ({self.state_window}) must be at least 1, the token itself")

    @property
    def shift_width(self) -> int:
        """Channels of the last input that either mix remembers; a transformer's block shifts nothing."""
        return self.hidden_size if self.base == "rwkv7" else 0

    @property
    def rms_norm_eps(self) -> float:
        return self.layer_norm_eps

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the state: keys and values of every token; matrices, shifts and queries whose size stays."""
        plain = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        width, shifts = self.hidden_size, 2 * (self.shift_width - self.hidden_size)
        grown = 2 * width * tokens_seen + (self.state_window - 1) * width + shifts
        return plain + self.num_hidden_layers * batch * grown * itemsize


def create(*, hidden_size: int = 768, base: str = "rwkv7", **given: Any) -> WuNengConfig:
    """A config whose unnamed sizes are RWKV-7's for this width, or for a transformer's block Llama's."""
    ranks = {name: size for name, size in suggested_ranks(hidden_size).items() if name in ("decay_rank", "rate_rank")}
    ffn = 4 * hidden_size if base == "rwkv7" else -(-8 * hidden_size // 3 // 32) * 32
    sizes = {"intermediate_size": ffn, **ranks, **given}
    if hidden_size < 64:
        sizes.setdefault("head_dim", hidden_size)
    return WuNengConfig(hidden_size=hidden_size, base=base, **sizes)


def tensor_shapes(config: WuNengConfig) -> dict[str, tuple[int, ...]]:
    width, vocab, shifted = config.hidden_size, config.vocab_size, config.base == "rwkv7"
    parts = ("weight", "bias") if shifted else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (vocab, width)}
    for i in range(config.num_hidden_layers):
        norms = ("ln0", "ln1", "ln2") if i == 0 and shifted else ("ln1", "ln2")
        shapes |= {f"blocks.{i}.{norm}.{part}": (width,) for norm in norms for part in parts}
        shapes |= {f"blocks.{i}.att.{name}": shape for name, shape in _heads(config).items()}
        shapes |= {f"blocks.{i}.ffn.{name}": shape for name, shape in _ffn(config).items()}
    return shapes | {f"ln_out.{part}": (width,) for part in parts} | {"head.weight": (vocab, width)}


def _heads(config: WuNengConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one block's heads."""
    width, heads, n = config.hidden_size, config.num_heads, config.head_dim
    vector, kinds = (1, 1, width), 1 if config.out_mode == "sum" else 2 if config.middle == "none" else 3
    shapes: dict[str, tuple[int, ...]] = {}
    if config.base == "rwkv7":
        shapes |= {f"x_{name}": vector for name in "qkvhwa"}
    shapes |= {f"{name}.weight": (width, width) for name in ("query", "key", "value")}
    if config.attn_norm:
        shapes |= {"ln_a.weight": (width,), "ln_a.bias": (width,)}
    shapes |= {"state.alpha": (heads,), "state.r_k": (heads, n), "state.k_k": vector, "state.k_a": vector}
    for name, rank in (("w", config.decay_rank), ("a", config.rate_rank)):
        own = {f"{name}0": vector, f"{name}1": (width, rank), f"{name}2": (rank, width)}
        shapes |= {f"state.{key}": shape for key, shape in own.items()}
    if config.state_window > 1:
        shapes["state.recency"] = (heads, config.state_window)
    shapes["state.query.weight"] = (width, width)
    if config.value_source == "attn":
        shapes["state.coupling.weight"] = (width, width)
    shapes |= {"state.ln_x.weight": (width,), "state.ln_x.bias": (width,)}
    middles = {
        "gated": {"gate.weight": (n, 2 * n), "gate.bias": (n,)},
        "additive": {"beta": (heads, n), "lift": (heads, n, n)},
        "concat": {"join": (heads, n, 2 * n)},
        "none": {},
    }
    shapes |= {f"fusion.middle.{key}": shape for key, shape in middles[config.middle].items()}
    return shapes | {"fusion.output.weight": (width, kinds * width)}


def _ffn(config: WuNengConfig) -> dict[str, tuple[int, ...]]:
    width, ffn = config.hidden_size, config.intermediate_size
    if config.base == "rwkv7":
        return {"x_k": (1, 1, width), "key.weight": (ffn, width), "value.weight": (width, ffn)}
    return {**{f"{name}_proj.weight": (ffn, width) for name in ("gate", "up")}, "down_proj.weight": (width, ffn)}


STATE = "blocks.0.att.state."
MIDDLES = {"gate.weight": "gated", "beta": "additive", "join": "concat"}
"""A tensor of the middle heads -> their kind."""


def recognise(shapes: Shapes) -> bool:
    return STATE + "r_k" in shapes


def config_from_shapes(shapes: Shapes, **told: Any) -> WuNengConfig:
    """Sizes and choices from the tensors; `told` are those that leave none behind."""
    vocab_size, width, layers = sizes_from(shapes, "WuNeng")
    base = "rwkv7" if "blocks.0.ln0.weight" in shapes else "transformer"
    try:
        _, head_dim = shapes[STATE + "r_k"]
        ffn = shapes["blocks.0.ffn.key.weight" if base == "rwkv7" else "blocks.0.ffn.gate_proj.weight"][0]
        sizes = {"decay_rank": shapes[STATE + "w1"][1], "rate_rank": shapes[STATE + "a1"][1]}
        outputs = shapes["blocks.0.att.fusion.output.weight"][1]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole WuNeng checkpoint: {missing} is missing") from None
    middle = [kind for name, kind in MIDDLES.items() if f"blocks.0.att.fusion.middle.{name}" in shapes]
    return WuNengConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        head_dim=head_dim,
        intermediate_size=ffn,
        base=base,
        middle=middle[0] if middle else "none",
        out_mode="sum" if outputs == width else "concat",
        value_source="attn" if STATE + "coupling.weight" in shapes else "x",
        state_window=shapes.get(STATE + "recency", (0, 1))[1],
        attn_norm="blocks.0.att.ln_a.weight" in shapes,
        **sizes,
        **told,
    )


UNSEEN = ("state_read", "iclr_scale", "rope_theta")
TEST = WuNengConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    head_dim=16,
    intermediate_size=48,
    state_window=3,
    decay_rank=8,
    rate_rank=6,
)

FAMILY = Family(
    name="wuneng",
    kind="language",
    config=WuNengConfig,
    builder="rookery.models.wuneng:WuNeng",
    presets={"0.1b": create(), "lite": create(out_mode="sum"), "test": TEST},
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=UNSEEN,
    tensor_shapes=tensor_shapes,
)
