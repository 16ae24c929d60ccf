"""RWKV-6 "Finch" (arXiv 2404.05892), x060 and its variants a, b, c: sizes, official tensor names, presets."""

from dataclasses import dataclass
from typing import Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Headed, Shapes, sizes_from, skeleton_shapes
from rookery.families.layout import Layout, Rule
from rookery.families.published import FLA_6, GGUF_6, HF_6, WEB_6


@dataclass(frozen=True, kw_only=True)
class RWKV6Config(Headed):
    """Sizes and choices of one RWKV-6 model."""

    vocab_size: int = 65536
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 2048
    """Width of the residual stream."""
    num_hidden_layers: int = 24
    """Blocks."""
    head_dim: int = 64
    """Channels per head."""
    intermediate_size: int = 7168
    """Hidden units of the channel mix."""
    mix_rank: int = 32
    """Rank of the data-dependent interpolations."""
    decay_rank: int = 64
    """Rank of the data-dependent decay."""
    gate_rank: int = 64
    """Rank of the gate, in variant a."""
    variant: Literal["x060", "x060a", "x060b", "x060c"] = "x060"
    """a: the gate is a low-rank tanh. b: no gate, one norm over all heads. c: b, and keys fade with their decay."""
    damp_keys: bool = False
    """Keys are multiplied by exp(min(raw decay, 0)): advice for new runs, not stored in files (core.md 1.4)."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""
    group_norm_eps: float = 64e-5
    """Epsilon of the norm after the recurrence; variants b and c normalise all heads together, with 1e-5."""
    rescale_every: int = 0
    """Blocks after which the residual stream is halved, so that it fits into float16; 0 for never (nn.rwkv.rescale)."""

    @property
    def signals(self) -> str:
        """Letters of the interpolated inputs, in the order in which the low-rank factors hold them."""
        return "rkvw" if self.variant in ("x060b", "x060c") else "wkvrg"


def create(*, hidden_size: int = 2048, **given) -> RWKV6Config:
    """A config with the official ranks (doubled at width 4096) and a channel mix of 3.5 widths, unless given."""
    wide = hidden_size >= 4096
    sizes = {
        "intermediate_size": 7 * hidden_size // 2 // 32 * 32,
        "mix_rank": 64 if wide else 32,
        "decay_rank": 128 if wide else 64,
        **given,
    }
    if hidden_size < 64:
        sizes.setdefault("head_dim", hidden_size)
    if sizes.get("variant") in ("x060b", "x060c"):
        sizes.setdefault("group_norm_eps", 1e-5)
    return RWKV6Config(hidden_size=hidden_size, **sizes)


def mix_factors(config: RWKV6Config) -> str:
    """Official name of the interpolations' low-rank factors, without the 1 or 2 at its end."""
    return "time_maa_rkvw_w" if len(config.signals) == 4 else "time_maa_w"


def tensor_shapes(config: RWKV6Config) -> dict[str, tuple[int, ...]]:
    width, ffn, count = config.hidden_size, config.intermediate_size, len(config.signals)
    vector, per_head = (1, 1, width), (config.num_heads, config.head_dim)
    factors = mix_factors(config)
    matrices = ("receptance", "key", "value", "output", *(["gate"] if config.variant == "x060" else []))
    mixers: dict[str, tuple[int, ...]] = {
        "att.time_maa_x": vector,
        **{f"att.time_maa_{name}": vector for name in config.signals},
        f"att.{factors}1": (width, count * config.mix_rank),
        f"att.{factors}2": (count, config.mix_rank, width),
        "att.time_decay": vector,
        "att.time_decay_w1": (width, config.decay_rank),
        "att.time_decay_w2": (config.decay_rank, width),
        "att.time_faaaa": per_head,
        **{f"att.{name}.weight": (width, width) for name in matrices},
    }
    if config.variant == "x060a":
        mixers |= {"att.gate_w1": (width, config.gate_rank), "att.gate_w2": (config.gate_rank, width)}
    mixers |= {
        "att.ln_x.weight": (width,),
        "att.ln_x.bias": (width,),
        **{f"ffn.time_maa_{name}": vector for name in "kr"},
        "ffn.key.weight": (ffn, width),
        "ffn.receptance.weight": (width, width),
        "ffn.value.weight": (width, ffn),
    }
    return skeleton_shapes(config, lambda layer: mixers)


def recognise(shapes: Shapes) -> bool:
    other = {"w_kv_cache_a.weight", "convert3.weight"}  # GoldFinch, temporal perspectives
    return "blocks.0.att.time_maa_x" in shapes and not other & shapes.keys()


def config_from_shapes(shapes: Shapes) -> RWKV6Config:
    """Sizes and variant from the tensors alone; b and c have the same tensors, b is assumed."""
    vocab_size, hidden_size, layers = sizes_from(shapes, "RWKV-6")
    at = "blocks.0.att."
    try:
        heads, head_dim = (n for n in shapes[at + "time_faaaa"] if n != 1 or len(shapes[at + "time_faaaa"]) == 2)
        sizes = {
            "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
            "decay_rank": shapes[at + "time_decay_w1"][1],
        }
        if at + "time_maa_rkvw_w1" in shapes:
            sizes |= {"mix_rank": shapes[at + "time_maa_rkvw_w1"][1] // 4, "variant": "x060b", "group_norm_eps": 1e-5}
        else:
            sizes["mix_rank"] = shapes[at + "time_maa_w1"][1] // 5
        if at + "gate_w1" in shapes:
            sizes |= {"gate_rank": shapes[at + "gate_w1"][1], "variant": "x060a"}
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RWKV-6 checkpoint: {missing} is missing") from None
    if heads * head_dim != hidden_size:
        raise BadCheckpoint(
            f"{at}time_faaaa is {heads} × {head_dim}, which does not make the width {hidden_size} of emb.weight"
        )
    return RWKV6Config(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, head_dim=head_dim, **sizes
    )


AT = "blocks.{layer}.att."
GGMF = Layout(
    rules=(
        Rule(AT + "time_faaaa", AT + "time_faaaa", ("column",)),
        Rule(AT + "time_decay", AT + "time_decay", ("flat",)),
        *(
            Rule(AT + name, AT + name, ("transpose",))
            for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
        ),
    )
)
"""rwkv.cpp (core.md 2.4); shapes that differ by ones alone need no rule."""


def _size(layers: int, width: int) -> RWKV6Config:
    return create(hidden_size=width, num_hidden_layers=layers)


_TEST = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "intermediate_size": 96,
    "mix_rank": 4,
    "decay_rank": 6,
    "gate_rank": 5,
}
PRESETS = {
    "1.6b": _size(24, 2048),
    "3b": _size(32, 2560),
    "7b": _size(32, 4096),
    "14b": _size(61, 4096),
    "test": RWKV6Config(**_TEST),
    "a-test": RWKV6Config(**_TEST, variant="x060a"),
    "b-test": RWKV6Config(**_TEST, variant="x060b", group_norm_eps=1e-5),
    "c-test": RWKV6Config(**_TEST, variant="x060c", group_norm_eps=1e-5),
}

FAMILY = Family(
    name="rwkv6",
    kind="language",
    config=RWKV6Config,
    builder="rookery.models.rwkv6:RWKV6",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    layouts={"ggmf": GGMF, "gguf": GGUF_6, "hf": HF_6, "fla": FLA_6, "web-rwkv": WEB_6},
)
