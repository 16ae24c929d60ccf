"""BASED (arXiv 2402.18668): Taylor linear attention, a sliding window of softmax attention, gated short convolutions.

Names are those of the released models (hazyresearch/based-360m, -1b, -1b-50b; code: HazyResearch/based, Apache-2.0)
after their prefix "model.", which a layout takes away. Such files say the head and the embedding twice.
"""

from dataclasses import dataclass
from typing import Any

from rookery.errors import BadCheckpoint
from rookery.families.base import Family, Shapes
from rookery.families.layout import Layout, Rule


@dataclass(frozen=True, kw_only=True)
class BasedConfig:
    """Sizes and choices of one BASED model."""

    vocab_size: int = 50264
    """Rows of the embedding, padding included."""
    padding_rows: int = 7
    """Last rows of the embedding that are no tokens: they are never sampled."""
    hidden_size: int = 1024
    """Width of the residual stream."""
    num_hidden_layers: int = 27
    """Blocks."""
    linear_layers: tuple[int, ...] = ()
    """Blocks, counted from 0, whose mixer is Taylor linear attention."""
    window_layers: tuple[int, ...] = ()
    """Blocks with softmax attention over the window; all others are gated convolutions."""
    num_heads: int = 16
    """Heads of both attentions."""
    feature_dim: int = 16
    """Channels of a query or key of the linear attention, before the features are made."""
    window: int = 129
    """Keys that a query of the window attention sees, its own among them (published code: window_size // 2 + 1)."""
    conv_width: int = 3
    """Tokens that the convolution sees, the present one among them."""
    intermediate_size: int = 2048
    """Hidden units of the gated MLP; 0 leaves the MLPs out, as small models of recall do (Zoology)."""
    rope_theta: float = 10000.0
    """Base of the rotary positions, which only the window attention has."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMS norm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial matrices; narrow models learn sooner with 0.02 · √(1024 / hidden_size)."""

    def __post_init__(self) -> None:
        for name in ("linear_layers", "window_layers"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if both := sorted({*self.linear_layers} & {*self.window_layers}):
            raise ValueError(f"layers {both} are in linear_layers and in window_layers; a block has one mixer")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice num_heads ({self.num_heads}): "
                "rotary positions turn pairs of a head's channels"
            )
        for name, least in (("window", 1), ("conv_width", 2), ("feature_dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")

    @property
    def head_dim(self) -> int:
        """Channels of a value head, and of every head of the window attention."""
        return self.hidden_size // self.num_heads

    @property
    def num_features(self) -> int:
        """Features of a query or key: 1, its channels, and the products of two of them."""
        return 1 + self.feature_dim + self.feature_dim * (self.feature_dim + 1) // 2

    def mixer(self, layer: int) -> str:
        """What mixes tokens in block `layer`: "linear", "window" or "conv"."""
        return "linear" if layer in self.linear_layers else "window" if layer in self.window_layers else "conv"

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the state: the same after any number of tokens; `itemsize` bytes a number outside the sums."""
        width = self.hidden_size
        each = {
            "linear": self.num_features * (width + self.num_heads) * max(4, itemsize),
            "window": 2 * width * self.window * itemsize,
            "conv": (self.conv_width - 1) * 2 * width * itemsize,
        }
        return batch * sum(each[self.mixer(layer)] for layer in range(self.num_hidden_layers))


def create(*, hidden_size: int = 1024, num_hidden_layers: int = 27, **given: Any) -> BasedConfig:
    """A config with the published mix of layers: of every five, the second is linear, the third a window.

    Heads of 64 value channels, and an MLP of twice the width, unless given. All rows of the embedding are tokens.
    """
    given.setdefault("linear_layers", tuple(range(1, num_hidden_layers, 5)))
    given.setdefault("window_layers", tuple(range(2, num_hidden_layers, 5)))
    given.setdefault("num_heads", max(1, hidden_size // 64))
    given.setdefault("intermediate_size", 2 * hidden_size)
    if "vocab_size" in given:
        given.setdefault("padding_rows", 0)
    return BasedConfig(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, **given)


EMBEDDING = "transformer.embeddings.word_embeddings.weight"
LAYER = "transformer.layers.{layer}."


def tensor_shapes(config: BasedConfig) -> dict[str, tuple[int, ...]]:
    width, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.feature_dim
    mixers = {
        "conv": {
            "in_proj.weight": (4 * width, width),
            "in_proj.bias": (4 * width,),
            "conv.conv.weight": (2 * width, 1, config.conv_width),
            "out_proj.weight": (width, 2 * width),
            "out_proj.bias": (width,),
        },
        "linear": {
            "proj_q.weight": (queries, width),
            "proj_k.weight": (queries, width),
            "proj_v.weight": (width, width),
            "out_proj.weight": (width, width),
        },
        "window": {"Wqkv.weight": (3 * width, width), "out_proj.weight": (width, width)},
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        at = LAYER.format(layer=i)
        shapes[at + "norm1.weight"] = (width,)
        shapes |= {f"{at}mixer.{name}": shape for name, shape in mixers[config.mixer(i)].items()}
        if ffn:
            shapes[at + "norm2.weight"] = (width,)
            shapes |= {at + "mlp.fc1.weight": (2 * ffn, width), at + "mlp.fc2.weight": (width, ffn)}
    return shapes | {"transformer.ln_f.weight": (width,)}


def recognise(shapes: Shapes) -> bool:
    # attn-360m and -1b have the same names and softmax attention in every block; what is tied is held once here
    own = any(name.endswith(("mixer.conv.conv.weight", "mixer.proj_q.weight")) for name in shapes)
    return EMBEDDING in shapes and "lm_head.weight" not in shapes and own


def config_from_shapes(shapes: Shapes, num_heads: int | None = None, window: int | None = None) -> BasedConfig:
    """Sizes from the tensors. Where the number of heads is not given it is the published 16, or 1 if that cannot be.

    A window that is not given has the published 129 keys.
    """
    try:
        vocab_size, width = shapes[EMBEDDING]
        layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("transformer.layers."))
    except (KeyError, ValueError) as missing:
        raise BadCheckpoint(f"not a whole BASED checkpoint: {missing}") from None

    def having(tensor: str) -> tuple[int, ...]:
        return tuple(i for i in range(layers) if LAYER.format(layer=i) + tensor in shapes)

    sizes: dict[str, Any] = {
        "linear_layers": having("mixer.proj_q.weight"),
        "window_layers": having("mixer.Wqkv.weight"),
    }
    queries = 16 * BasedConfig.feature_dim
    if sizes["linear_layers"]:
        queries = shapes[LAYER.format(layer=sizes["linear_layers"][0]) + "mixer.proj_q.weight"][0]
    heads = num_heads or (1 if queries % 16 or width % 32 else 16)
    if queries % heads:
        raise BadCheckpoint(f"{heads} heads cannot share {queries} query channels; is num_heads right?")
    if sizes["linear_layers"]:
        sizes["feature_dim"] = queries // heads
    if convolutions := having("mixer.conv.conv.weight"):
        sizes["conv_width"] = shapes[LAYER.format(layer=convolutions[0]) + "mixer.conv.conv.weight"][-1]
    mlp = shapes.get("transformer.layers.0.mlp.fc2.weight", (width, 0))
    return BasedConfig(
        vocab_size=vocab_size,
        padding_rows=7 if vocab_size == 50264 else 0,
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=heads,
        window=window or 129,
        intermediate_size=mlp[1],
        **sizes,
    )


def is_unused(name: str) -> bool:
    """Counters of the trainer, a decay that the code no longer applies, and what is told by other tensors."""
    return "metrics" in name or name.endswith(("transformer.decay.decay", "rotary_emb.inv_freq", "lm_head.weight"))


def hints(settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of our config that the config.json of a released model tells."""
    told = {}
    linear, window = settings.get("alt_mixer"), settings.get("alt_mixer_2")
    if isinstance(linear, dict) and type(linear.get("num_heads")) is int:
        told["num_heads"] = linear["num_heads"]
    if isinstance(window, dict) and type(window.get("window_size")) is int:
        # their attention sees window_size // 2 keys to the left of the query's own
        told["window"] = window["window_size"] // 2 + 1
    return told


MIXERS = ("in_proj.weight", "in_proj.bias", "conv.conv.weight", "out_proj.weight", "out_proj.bias")
MIXERS += ("proj_q.weight", "proj_k.weight", "proj_v.weight", "Wqkv.weight")
PUBLISHED = Layout(
    rules=(
        *(
            Rule("model." + name, name)
            for name in (
                EMBEDDING,
                "transformer.ln_f.weight",
                *(LAYER + name for name in ("norm1.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight")),
                *(f"{LAYER}mixer.{name}" for name in MIXERS),
            )
        ),
        Rule("model.transformer.decay.decay", "transformer.decay.decay"),
        Rule("model.lm_head.weight", EMBEDDING),
        Rule("lm_head.weight", EMBEDDING),
    )
)
"""The released files: a trainer's prefix, and the head beside the embedding that it is tied to."""


def _size(width: int, layers: int, linear: tuple[int, ...]) -> BasedConfig:
    return BasedConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        linear_layers=linear,
        window_layers=tuple(i + 1 for i in linear),
        intermediate_size=2 * width,
    )


FAMILY = Family(
    name="based",
    kind="language",
    config=BasedConfig,
    builder="rookery.models.based:Based",
    presets={
        "360m": _size(1024, 27, (1, 6, 11, 16, 21)),
        "1b": _size(1792, 36, (1, 6, 11, 16, 21, 27, 33)),
        "test": BasedConfig(
            vocab_size=64,
            padding_rows=0,
            hidden_size=32,
            num_hidden_layers=3,
            linear_layers=(1,),
            window_layers=(2,),
            num_heads=2,
            feature_dim=4,
            window=9,
            intermediate_size=48,
        ),
    },
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    not_in_shapes=("num_heads", "window"),
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
    layouts={"published": PUBLISHED},
    fingerprinted=(EMBEDDING, "transformer.ln_f.weight"),
)
