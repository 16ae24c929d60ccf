"""RWKV-5 "Eagle" (arXiv 2404.05892), 5.0 to 5.2: sizes, official tensor names, presets. Code: RWKV-LM, RWKV-v5."""

from dataclasses import dataclass
from typing import Literal

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Headed, Shapes, sizes_from, skeleton_shapes
from rookery.families.layout import Layout, Rule
from rookery.families.published import HF_4_5, WEB_5
from rookery.families.rwkv4 import refuse_unsupported


@dataclass(frozen=True, kw_only=True)
class RWKV5Config(Headed):
    """Sizes and choices of one RWKV-5 model; the defaults are those of 5.2."""

    vocab_size: int = 65536
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    head_dim: int = 64
    """Channels per head."""
    intermediate_size: int = 2688
    """Hidden units of the channel mix."""
    has_gate: bool = True
    """SiLU gate on the output; 5.0 has none."""
    decay: Literal["channel", "head"] = "channel"
    """What has a decay and a bonus of its own: every channel (5.2) or every head (5.0, 5.1)."""
    bonus: Literal["time_faaaa", "time_first"] = "time_faaaa"
    """Name of the bonus; the older one holds its logarithm."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""
    group_norm_eps: float = 64e-5
    """Epsilon of the per-head norm: 1e-5 after a division by 8 (core.md 1.3); files of rwkv.cpp mean 1e-5 without."""
    rescale_every: int = 0
    """Blocks after which the residual stream is halved, so that it fits into float16; 0 for never (nn.rwkv.rescale)."""


def create(*, hidden_size: int = 768, **given) -> RWKV5Config:
    """A config whose channel mix is 3.5 times as wide as the model, rounded down to 32, unless given."""
    sizes = {"intermediate_size": 7 * hidden_size // 2 // 32 * 32, **given}
    if hidden_size < 64:
        sizes.setdefault("head_dim", hidden_size)
    return RWKV5Config(hidden_size=hidden_size, **sizes)


def tensor_shapes(config: RWKV5Config) -> dict[str, tuple[int, ...]]:
    width, ffn = config.hidden_size, config.intermediate_size
    per_head = (config.num_heads, config.head_dim) if config.decay == "channel" else (config.num_heads,)
    matrices = ("receptance", "key", "value", "output", *(["gate"] if config.has_gate else []))
    mixers: dict[str, tuple[int, ...]] = {
        **{f"att.time_mix_{name}": (1, 1, width) for name in ("kvrg" if config.has_gate else "kvr")},
        "att.time_decay": per_head,
        f"att.{config.bonus}": per_head,
        **{f"att.{name}.weight": (width, width) for name in matrices},
        "att.ln_x.weight": (width,),
        "att.ln_x.bias": (width,),
        **{f"ffn.time_mix_{name}": (1, 1, width) for name in "kr"},
        "ffn.key.weight": (ffn, width),
        "ffn.receptance.weight": (width, width),
        "ffn.value.weight": (width, ffn),
    }
    return skeleton_shapes(config, lambda layer: mixers)


def recognise(shapes: Shapes) -> bool:
    # a bonus of its own for every channel came after the name time_faaaa: web-rwkv gives it the older one again
    first = shapes.get("blocks.0.att.time_first", ())
    renamed = len(first) > 1 and first[1] > 1
    has = shapes.keys()
    other = {"embed.weight", "convert3.weight"}  # series, temporal perspectives
    return {"blocks.0.att.time_mix_k", "blocks.0.att.ln_x.weight"} <= has and not other & has and not renamed


def config_from_shapes(shapes: Shapes) -> RWKV5Config:
    """Sizes and version from the tensors alone."""
    refuse_unsupported(shapes, "RWKV-5")
    vocab_size, hidden_size, layers = sizes_from(shapes, "RWKV-5")
    for name in ("att.time_decay", "ffn.key.weight"):
        if f"blocks.0.{name}" not in shapes:
            raise BadCheckpoint(f"not a whole RWKV-5 checkpoint: 'blocks.0.{name}' is missing")
    decay = [n for n in shapes["blocks.0.att.time_decay"] if n != 1] or [1]
    per_channel = len(decay) > 1
    return RWKV5Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        head_dim=decay[1] if per_channel else hidden_size // decay[0],
        intermediate_size=shapes["blocks.0.ffn.key.weight"][0],
        has_gate="blocks.0.att.gate.weight" in shapes,
        decay="channel" if per_channel else "head",
        bonus="time_faaaa" if "blocks.0.att.time_faaaa" in shapes else "time_first",
    )


AT = "blocks.{layer}.att."
GGMF = Layout(
    rules=(
        Rule(AT + "time_decay", AT + "time_decay", ("exp_negative_exp", "column")),
        Rule(AT + "time_faaaa", AT + "time_faaaa", ("column",)),
        Rule(AT + "time_first", AT + "time_first", ("exp", "column")),
    ),
    config={"group_norm_eps": 1e-5},
)
"""rwkv.cpp (core.md 2.4), which leaves out the division by 8 before the norm."""


def _size(layers: int, width: int) -> RWKV5Config:
    return create(hidden_size=width, num_hidden_layers=layers)


_TEST = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 16, "intermediate_size": 96}
PRESETS = {
    "0.1b": _size(12, 768),
    "0.4b": _size(24, 1024),
    "1.5b": _size(24, 2048),
    "3b": _size(32, 2560),
    "7b": _size(32, 4096),
    "test": RWKV5Config(**_TEST),
    "5.1-test": RWKV5Config(**_TEST, decay="head"),
    "5.0-test": RWKV5Config(**_TEST, decay="head", has_gate=False, bonus="time_first"),
}

FAMILY = Family(
    name="rwkv5",
    kind="language",
    config=RWKV5Config,
    builder="rookery.models.rwkv5:RWKV5",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    layouts={"ggmf": GGMF, "hf": HF_4_5, "web-rwkv": WEB_5},
)
