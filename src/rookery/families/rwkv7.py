"""RWKV-7 "Goose" (arXiv 2503.14456): sizes, official tensor names, presets. Code: BlinkDL/RWKV-LM, RWKV-v7."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Headed, Shapes, sizes_from, skeleton_shapes
from rookery.families.layout import Layout, Rule
from rookery.families.published import GGUF_7, WEB_7


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(Headed):
    """Sizes and choices of one RWKV-7 model."""

    vocab_size: int = 65536
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    head_dim: int = 64
    """Channels per head."""
    intermediate_size: int = 3072
    """Hidden units of the channel mix."""
    decay_rank: int = 64
    """Rank of the decay's low-rank map (w1, w2)."""
    rate_rank: int = 64
    """Rank of the in-context learning rate's low-rank map (a1, a2)."""
    value_rank: int = 32
    """Rank of the value residual's low-rank map (v1, v2); absent in the first block."""
    gate_rank: int = 128
    """Rank of the output gate's low-rank map (g1, g2)."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""
    group_norm_eps: float = 64e-5
    """Epsilon of the per-head norm after the recurrence; 64e-5 whatever the head size (core.md 1.5)."""
    init: Literal["v7-2025-05", "v7-2024"] = "v7-2025-05"
    """Which published initialisation `init_weights` applies."""


def suggested_ranks(hidden_size: int) -> dict[str, int]:
    """Low-rank widths of the newest official formula, max(32, 32·round(c·√C/32)) (RWKV-LM train_temp, 2025-07-06)."""
    factors = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}
    return {name: max(32, 32 * round(c * hidden_size**0.5 / 32)) for name, c in factors.items()}


def create(*, hidden_size: int = 768, **given) -> RWKV7Config:
    """A config whose unnamed sizes follow the official formulas for this width."""
    sizes = {"intermediate_size": 4 * hidden_size, **suggested_ranks(hidden_size), **given}
    if hidden_size < 64:
        sizes.setdefault("head_dim", hidden_size)
    return RWKV7Config(hidden_size=hidden_size, **sizes)


def tensor_shapes(config: RWKV7Config) -> dict[str, tuple[int, ...]]:
    width, ffn = config.hidden_size, config.intermediate_size
    inner = config.num_heads * config.head_dim  # the width, but for models that have grown heads
    vector = (1, 1, width)
    ranks = {"w": config.decay_rank, "a": config.rate_rank, "v": config.value_rank, "g": config.gate_rank}

    def block(i: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"att.x_{name}": vector for name in "rwkvag"}
        for name in "wavg" if i else "wag":
            shapes[f"att.{name}1"] = (width, ranks[name])
            shapes[f"att.{name}2"] = (ranks[name], inner)
            if name != "g":
                shapes[f"att.{name}0"] = (1, 1, inner)
        heads = (config.num_heads, config.head_dim)
        shapes |= {"att.k_k": (1, 1, inner), "att.k_a": (1, 1, inner), "att.r_k": heads}
        shapes |= {f"att.{name}.weight": (inner, width) for name in ("receptance", "key", "value")}
        shapes["att.output.weight"] = (width, inner)
        shapes |= {"att.ln_x.weight": (inner,), "att.ln_x.bias": (inner,), "ffn.x_k": vector}
        return shapes | {"ffn.key.weight": (ffn, width), "ffn.value.weight": (width, ffn)}

    return skeleton_shapes(config, block)


def recognise(shapes: Shapes) -> bool:
    # 7a, 7b, the RWKV-8 previews and Meta-State carry these tensors too, plus some that plain RWKV-7 has no place for
    extra = ("ffn.s_emb.weight", "qkv.qq.weight", "ffn.enn.weight", "ffn.sse_eta")
    # web-rwkv transposes the low-rank factors: [rank, width]
    width, rows = shapes.get("emb.weight", (0,))[-1], shapes.get("blocks.0.att.w1", (0,))[0]
    transposed = rows != width == shapes.get("blocks.0.att.w1", (0,))[-1]
    return (
        "blocks.0.att.r_k" in shapes
        and not {"embed.weight", "final_layer.linear.weight", "convert3.weight"} & shapes.keys()  # other kinds
        and not transposed
        and not any(name.endswith(extra) for name in shapes)
    )


def config_from_shapes(shapes: Shapes) -> RWKV7Config:
    """Sizes from the tensors alone."""
    vocab_size, hidden_size, layers = sizes_from(shapes, "RWKV-7")
    try:
        heads, head_dim = shapes["blocks.0.att.r_k"]
        sizes = {
            "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
            "decay_rank": shapes["blocks.0.att.w1"][1],
            "rate_rank": shapes["blocks.0.att.a1"][1],
            "gate_rank": shapes["blocks.0.att.g1"][1],
        }
        if layers > 1:  # the first block has no value residual
            sizes["value_rank"] = shapes["blocks.1.att.v1"][1]
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole RWKV-7 checkpoint: {missing} is missing") from None
    if heads * head_dim != hidden_size:
        raise BadCheckpoint(
            f"blocks.0.att.r_k is {heads} × {head_dim}, which does not make the width {hidden_size} of emb.weight"
        )
    return RWKV7Config(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, head_dim=head_dim, **sizes
    )


def widened(config: RWKV7Config, kind: type, **more: int) -> Any:
    """The same sizes as a config of a variant, `kind`, with what it has `more`."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(config)}, **more)


def is_unused(name: str) -> bool:
    """The first block has no earlier value to mix with; many published files carry its v0, v1, v2 all the same."""
    return name in {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


AT = "blocks.{layer}.att."
GGMF = Layout(
    rules=(
        Rule(f"{AT}x_rwkvag", tuple(f"{AT}x_{name}" for name in "rwkvag"), ("drop_axis_1",)),
        *(Rule(f"{AT}{name}{i}", f"{AT}{name}{i}", ("transpose",)) for name in "wavg" for i in "12"),
    )
)
"""rwkv.cpp files (core.md 2.4): the six mixes in one tensor [6, 1, width], low-rank factors transposed."""

LAYER = "model.layers.{layer}."
FLA = Layout(
    rules=(
        Rule("model.embeddings.weight", "emb.weight"),
        *(
            Rule(f"{foreign}.{part}", f"{official}.{part}")
            for part in ("weight", "bias")
            for foreign, official in {
                "model.layers.0.pre_norm": "blocks.0.ln0",
                f"{LAYER}attn_norm": "blocks.{layer}.ln1",
                f"{LAYER}ffn_norm": "blocks.{layer}.ln2",
                f"{LAYER}attn.g_norm": f"{AT}ln_x",
                "model.norm": "ln_out",
            }.items()
        ),
        *(Rule(f"{LAYER}attn.x_{name}", f"{AT}x_{name}") for name in "rwkvag"),
        *(Rule(f"{LAYER}attn.{name}_lora.lora.0.weight", f"{AT}{name}1", ("transpose",)) for name in "wavg"),
        *(Rule(f"{LAYER}attn.{name}_lora.lora.2.weight", f"{AT}{name}2", ("transpose",)) for name in "wavg"),
        *(Rule(f"{LAYER}attn.{name}_lora.lora.2.bias", f"{AT}{name}0", ("squeeze",)) for name in "wav"),
        *(Rule(f"{LAYER}attn.{name}", f"{AT}{name}", ("squeeze",)) for name in ("k_k", "k_a")),
        Rule(f"{LAYER}attn.r_k", f"{AT}r_k"),
        *(
            Rule(f"{LAYER}attn.{name[0]}_proj.weight", f"{AT}{name}.weight")
            for name in ("receptance", "key", "value", "output")
        ),
        Rule(f"{LAYER}ffn.x_k", "blocks.{layer}.ffn.x_k", ("squeeze",)),
        *(Rule(f"{LAYER}ffn.{name}.weight", f"blocks.{{layer}}.ffn.{name}.weight") for name in ("key", "value")),
        Rule("lm_head.weight", "head.weight"),
        # the first fla versions kept the mixes in one tensor; never written
        Rule(f"{LAYER}attn.x_x", tuple(f"{AT}x_{name}" for name in "rwkvag"), ("squeeze",)),
    )
)
"""flash-linear-attention and its Hugging Face models (core.md 2.2)."""


def _size(layers: int, width: int, ranks: tuple[int, int, int, int], vocab_size: int = 65536) -> RWKV7Config:
    decay, rate, value, gate = ranks
    return RWKV7Config(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        decay_rank=decay,
        rate_rank=rate,
        value_rank=value,
        gate_rank=gate,
    )


PRESETS = {
    "0.1b": _size(12, 768, (64, 64, 32, 128)),
    "0.4b": _size(24, 1024, (64, 64, 32, 128)),
    "1.5b": _size(24, 2048, (96, 96, 64, 256)),
    "2.9b": _size(32, 2560, (96, 96, 64, 320)),
    "7.2b": _size(32, 4096, (128, 128, 96, 480)),
    # no ranks are published for this size: those of the 7.2B model stand in, files bring their own
    "13.3b": _size(61, 4096, (128, 128, 96, 480)),
    "pile-0.1b": _size(12, 768, (64, 64, 32, 128), vocab_size=50304),
    "pile-0.4b": _size(24, 1024, (64, 64, 32, 128), vocab_size=50304),
    "pile-1.4b": _size(24, 2048, (96, 96, 64, 256), vocab_size=50304),
    "test": RWKV7Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=96,
        decay_rank=8,
        rate_rank=6,
        value_rank=4,
        gate_rank=10,
    ),
}

FAMILY = Family(
    name="rwkv7",
    kind="language",
    config=RWKV7Config,
    builder="rookery.models.rwkv7:RWKV7",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
    layouts={"ggmf": GGMF, "gguf": GGUF_7, "fla": FLA, "web-rwkv": WEB_7},
)
