"""RWKV-7 with a ROSA branch (RWKV-8 experiments of 2025, core.md 1.8 and 4.2): the layout of the published toy models.

Code: BlinkDL/RWKV-LM, RWKV-v8/251024_rosaQKV_run.py and 251105_reverse_run.py.
"""

from dataclasses import dataclass

from rookery.errors import BadCheckpoint
from rookery.families import rwkv7
from rookery.families.base import Family, Shapes
from rookery.families.rosa import mix_shapes


@dataclass(frozen=True, kw_only=True)
class RWKV7RosaConfig(rwkv7.RWKV7Config):
    """Sizes and choices of one RWKV-7 + ROSA model: those of RWKV-7."""

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of RWKV-7's state, and per block a third shift and queries, keys and values of every token."""
        history = self.num_hidden_layers * batch * self.hidden_size * (1 + 3 * tokens_seen) * itemsize
        return super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize) + history


def create(**given) -> RWKV7RosaConfig:
    """A config whose unnamed sizes follow RWKV-7's formulas."""
    return rwkv7.widened(rwkv7.create(**given), RWKV7RosaConfig)


def tensor_shapes(config: RWKV7RosaConfig) -> dict[str, tuple[int, ...]]:
    width, vocab = config.hidden_size, config.vocab_size
    mixers = {k: shape for k, shape in rwkv7.tensor_shapes(config).items() if ".att." in k or ".ffn." in k}
    shapes: dict[str, tuple[int, ...]] = {"e.weight": (vocab, width)}
    for i in range(1, config.num_hidden_layers + 1):
        shapes |= {f"ln{i}{which}.{part}": (width,) for which in "abc" for part in ("weight", "bias")}
        for official, here in (("att", "rwkv"), ("ffn", "ffn")):
            prefix = f"blocks.{i - 1}.{official}."
            shapes |= {f"{here}{i}.{k.removeprefix(prefix)}": v for k, v in mixers.items() if k.startswith(prefix)}
        shapes |= {f"rosa{i}.{name}": shape for name, shape in mix_shapes(width).items()}
    shapes |= {"lno.weight": (width,), "lno.bias": (width,)}
    return shapes | {"o.weight": (vocab, width), "o.bias": (vocab,)}


def recognise(shapes: Shapes) -> bool:
    return "rwkv1.r_k" in shapes and "rosa1.rosa_qkv.emb" in shapes


def config_from_shapes(shapes: Shapes) -> RWKV7RosaConfig:
    """Sizes from the tensors alone."""
    if "e.weight" not in shapes:
        raise BadCheckpoint("not a whole RWKV-7 + ROSA checkpoint: 'e.weight' is missing")
    official = {"emb.weight": shapes["e.weight"]}
    for name, shape in shapes.items():
        for here, there in (("rwkv", "att"), ("ffn", "ffn")):
            number, _, rest = name.removeprefix(here).partition(".")
            if name.startswith(here) and number.isdecimal():
                official[f"blocks.{int(number) - 1}.{there}.{rest}"] = shape
    plain = rwkv7.config_from_shapes(official)
    return rwkv7.widened(plain, RWKV7RosaConfig)


def is_unused(name: str) -> bool:
    """The first block has no earlier value to mix with."""
    return name in {"rwkv1.v0", "rwkv1.v1", "rwkv1.v2"}


RANKS = ("decay_rank", "rate_rank", "value_rank", "gate_rank")


def _size(vocab_size: int, width: int, rank: int) -> RWKV7RosaConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 4 * width}
    return RWKV7RosaConfig(vocab_size=vocab_size, **sizes, **dict.fromkeys(RANKS, rank))


PRESETS = {"digit20": _size(13, 128, 16), "reverse": _size(12, 32, 8), "test": _size(64, 32, 6)}

FAMILY = Family(
    name="rwkv7-rosa",
    kind="language",
    config=RWKV7RosaConfig,
    builder="rookery.models.rwkv7_rosa:RWKV7Rosa",
    presets=PRESETS,
    create=create,
    recognise=recognise,
    config_from_shapes=config_from_shapes,
    tensor_shapes=tensor_shapes,
    is_unused=is_unused,
    fingerprinted=("e.weight", "lno.weight"),
)
