"""RWKV-4 (arXiv 2305.13048): sizes, official tensor names, presets. Code: BlinkDL/RWKV-LM, RWKV-v4neo."""

from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Recurrent, Shapes, sizes_from, skeleton_shapes
from rookery.families.layout import Layout, Rule
from rookery.families.published import HF_4_5


@dataclass(frozen=True, kw_only=True)
class RWKV4Config(Recurrent):
    """Sizes of one RWKV-4 model."""

    vocab_size: int = 50277
    """Tokens in the vocabulary, padding included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    intermediate_size: int = 3072
    """Hidden units of the channel mix."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""
    rescale_every: int = 0
    """Blocks after which the residual stream is halved, so that it fits into float16; 0 for never (nn.rwkv.rescale)."""

    @property
    def wkv_shape(self) -> tuple[int, int]:
        """One block's recurrent state of one row: two sums and their exponent, per channel."""
        return 3, self.hidden_size


def create(*, hidden_size: int = 768, **given) -> RWKV4Config:
    """A config whose channel mix is four times as wide as the model unless given."""
    return RWKV4Config(hidden_size=hidden_size, **{"intermediate_size": 4 * hidden_size, **given})


def tensor_shapes(config: RWKV4Config) -> dict[str, tuple[int, ...]]:
    width, ffn = config.hidden_size, config.intermediate_size
    mixers: dict[str, tuple[int, ...]] = {
        "att.time_decay": (width,),
        "att.time_first": (width,),
        **{f"att.time_mix_{name}": (1, 1, width) for name in "kvr"},
        **{f"att.{name}.weight": (width, width) for name in ("key", "value", "receptance", "output")},
        **{f"ffn.time_mix_{name}": (1, 1, width) for name in "kr"},
        "ffn.key.weight": (ffn, width),
        "ffn.receptance.weight": (width, width),
        "ffn.value.weight": (width, ffn),
    }
    return skeleton_shapes(config, lambda layer: mixers)


def recognise(shapes: Shapes) -> bool:
    # experiments and forerunners are recognised in order to be refused by name
    first = ("att.time_mix_k", "ffnPre.time_mix_k", "att.time_mix")
    other = {"blocks.0.att.ln_x.weight", "convert3.weight", "blocks.0.att.rr_um"}  # RWKV-5, perspectives, RRWKV
    return any(f"blocks.0.{name}" in shapes for name in first) and not other & shapes.keys()


UNSUPPORTED = {
    "ffnPre": "a channel mix in the place of the first time mix",
    "tiny_ln": "a small attention beside a channel mix (tiny_att)",
    "tiny_q": "a small attention beside a channel mix (tiny_att)",
    "head_q": "a head that copies earlier tokens",
    "head_k": "a head that copies earlier tokens",
    "pos_emb_x": "position embeddings of images",
    "pos_emb_y": "position embeddings of images",
    **{
        prefix + name: "an attention inside the time mix" for prefix in ("time_mix_", "") for name in ("qq", "kk", "vv")
    },
    "time_mix": "one mix for all of r, k and v, which is RWKV-2",
}
"""Part of a tensor's name -> the experiment of RWKV-v4neo, or the older version, that it belongs to (core.md 1.2)."""


def refuse_unsupported(shapes: Shapes, family: str) -> None:
    """BadCheckpoint naming the first tensor of an experiment that no model here computes."""
    for name in shapes:
        for part in name.split("."):
            if part in UNSUPPORTED:
                raise BadCheckpoint(
                    f"a variant of {family} that is not supported: {name!r} belongs to {UNSUPPORTED[part]}. "
                    f"Released {family} models have no such tensor"
                )


def config_from_shapes(shapes: Shapes) -> RWKV4Config:
    """Sizes from the tensors alone."""
    refuse_unsupported(shapes, "RWKV-4")
    vocab_size, hidden_size, layers = sizes_from(shapes, "RWKV-4")
    if "blocks.0.ffn.key.weight" not in shapes:
        raise BadCheckpoint("not a whole RWKV-4 checkpoint: 'blocks.0.ffn.key.weight' is missing")
    return RWKV4Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        intermediate_size=shapes["blocks.0.ffn.key.weight"][0],
    )


GGMF = Layout(rules=(Rule("blocks.{layer}.att.time_decay", "blocks.{layer}.att.time_decay", ("negative_exp",)),))
"""rwkv.cpp (core.md 2.4)."""


def _size(layers: int, width: int, vocab_size: int = 50277) -> RWKV4Config:
    return create(hidden_size=width, num_hidden_layers=layers, vocab_size=vocab_size)


PRESETS = {
    "169m": _size(12, 768),
    "430m": _size(24, 1024),
    "1.5b": _size(24, 2048),
    "3b": _size(32, 2560),
    "7b": _size(32, 4096),
    "14b": _size(40, 5120),
    "world-0.1b": _size(12, 768, 65536),
    "world-0.4b": _size(24, 1024, 65536),
    "world-1.5b": _size(24, 2048, 65536),
    "world-3b": _size(32, 2560, 65536),
    "world-7b": _size(32, 4096, 65536),
    "test": RWKV4Config(vocab_size=64, hidden_size=32, num_hidden_layers=3, intermediate_size=96),
}

FAMILY = Family(
    name="rwkv4",
    kind="language",
    config=RWKV4Config,
    builder="rookery.models.rwkv4:RWKV4",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    layouts={"ggmf": GGMF, "hf": HF_4_5},
)
