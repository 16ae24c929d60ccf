"""Rimer as its authors released it (arXiv 2503.06121, github.com/Alic-Li/BlackGoose_Rimer): one block, one token.

Here for its files. The block is RWKV-7's time mix and one linear layer; over the one patch that the released
configuration reads, a recurrence never runs (timeseries.md 3.5). `rimer` is the model to use.
"""

from dataclasses import dataclass
from typing import Any

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7
from rookery.families.base import Family, Headed, Shapes
from rookery.families.forecast import ForecastConfig, predicted_patches
from rookery.families.layout import Layout, Rule


@dataclass(frozen=True, kw_only=True)
class RimerReleasedConfig(Headed, ForecastConfig):
    """Sizes of the released model."""

    hidden_size: int = 512
    num_hidden_layers: int = 1
    patch_length: int = 32
    context_length: int = 32
    head_dim: int = 64
    """Channels per head."""
    decay_rank: int = 64
    """Ranks of RWKV-7's low-rank maps: decay, in-context learning rate, gate."""
    rate_rank: int = 64
    gate_rank: int = 128

    def __post_init__(self) -> None:
        ForecastConfig.__post_init__(self)
        Headed.__post_init__(self)
        if self.num_hidden_layers != 1 or self.levels:
            raise ValueError("the released Rimer has one block and predicts one value a point; `rimer` has more")

    @property
    def blocks(self) -> rwkv7.RWKV7Config:
        """The same sizes as RWKV-7's time mix takes them."""
        names = ("hidden_size", "num_hidden_layers", "head_dim", "decay_rank", "rate_rank", "gate_rank")
        return rwkv7.RWKV7Config(vocab_size=1, **{name: getattr(self, name) for name in names})


def create(**given: Any) -> RimerReleasedConfig:
    return RimerReleasedConfig(**given)


NAMES = {
    "patch_embedding.value_embedding": "embed",
    "decoder.norm1": "norm1",
    "decoder.norm2": "norm2",
    "decoder.mlp.value": "mlp",
    "proj": "head",
}
"""Published modules and ours."""


def tensor_shapes(config: RimerReleasedConfig) -> dict[str, tuple[int, ...]]:
    width, patch = config.hidden_size, config.patch_length
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (width, patch)}
    shapes |= {f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    official = rwkv7.tensor_shapes(config.blocks)
    shapes |= {n.removeprefix("blocks.0."): official[n] for n in official if n.startswith("blocks.0.att.")}
    rows = config.output_patches * patch
    return shapes | {
        "mlp.weight": (width, width),
        "mlp.bias": (width,),
        "head.weight": (rows, width),
        "head.bias": (rows,),
    }


def recognise(shapes: Shapes) -> bool:
    return {"embed.weight", "att.r_k", "mlp.weight", "head.bias"} <= shapes.keys()


def config_from_shapes(shapes: Shapes) -> RimerReleasedConfig:
    """Sizes from the tensors alone."""
    try:
        width, patch = shapes["embed.weight"]
        return RimerReleasedConfig(
            hidden_size=width,
            patch_length=patch,
            context_length=patch,
            head_dim=shapes["att.r_k"][1],
            decay_rank=shapes["att.w1"][1],
            rate_rank=shapes["att.a1"][1],
            gate_rank=shapes["att.g1"][1],
            output_patches=predicted_patches(shapes["head.weight"][0], patch),
        )
    except KeyError as missing:
        raise BadCheckpoint(f"not a whole file of the released Rimer: {missing} is missing") from None


def _rules(mixer: str, modules: dict[str, str]) -> tuple[Rule, ...]:
    """Rules for one of the two spellings that a published file has; `mixer` is the prefix of the time mix."""
    return (
        *(
            Rule(f"{foreign}.{part}", f"{ours}.{part}")
            for foreign, ours in {**modules, f"{mixer}.g_norm": "att.ln_x"}.items()
            for part in ("weight", "bias")
        ),
        *(Rule(f"{mixer}.{p[0]}_proj.weight", f"att.{p}.weight") for p in ("receptance", "key", "value", "output")),
        *(Rule(f"{mixer}.{n}_lora.lora.0.weight", f"att.{n}1", ("transpose",)) for n in "wag"),
        *(Rule(f"{mixer}.{n}_lora.lora.2.weight", f"att.{n}2", ("transpose",)) for n in "wag"),
        *(Rule(f"{mixer}.{n}_lora.lora.2.bias", f"att.{n}0", ("squeeze",)) for n in "wa"),
        *(Rule(f"{mixer}.{n}", f"att.{n}", ("squeeze",)) for n in ("k_k", "k_a")),
        Rule(f"{mixer}.r_k", "att.r_k"),
        Rule(f"{mixer}.x_x", tuple(f"att.x_{n}" for n in "rwkvag"), ("squeeze",)),
        # newer releases of flash-linear-attention keep the six mixes apart
        *(Rule(f"{mixer}.x_{n}", f"att.x_{n}") for n in "rwkvag"),
    )


ALIASES = {"enc_embedding.value_embedding": "embed"} | {k: v for k, v in NAMES.items() if not k.startswith("patch")}
PUBLISHED = Layout(
    rules=(
        *_rules("backbone.decoder.attn.rwkv7", {f"backbone.{k}": v for k, v in NAMES.items()} | {"proj": "head"}),
        *_rules("decoder.attn.rwkv7", ALIASES),
    )
)
"""`model.pth` as published: every tensor under two names, of which a file may have either or both."""


def is_unused(name: str) -> bool:
    """Fixed sine waves, which every file carries once or twice."""
    return name.endswith("position_embedding.pe")


FAMILY = Family(
    name="rimer-released",
    kind="series",
    config=RimerReleasedConfig,
    builder="rookery.models.forecast:RimerReleased",
    presets={
        "test": RimerReleasedConfig(
            hidden_size=32, head_dim=16, decay_rank=8, rate_rank=8, gate_rank=8, patch_length=4, context_length=8
        )
    },
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
    layouts={"published": PUBLISHED},
    fingerprinted=("embed.weight", "norm2.weight"),
)
