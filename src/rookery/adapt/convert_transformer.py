"""Turn a transformer into an RWKV: ARWKV (arXiv 2501.15570) and RADLADS (arXiv 2505.03005).

A student has its teacher's embeddings, norms, MLPs and head; a recurrence stands where attention stood, except in
blocks that keep it. RADLADS' students take the attention's projections, too; ARWKV's start anew. Training follows: the
mixers learn to answer as the attention did (`align`), then the whole model what the teacher says
(`rookery.adapt.distillation`).

Nothing here changes a model's file or code: the teacher is watched by hooks while it computes as always.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rookery.checkpoints.checkpoint import Checkpoint, open_checkpoint
from rookery.errors import unknown
from rookery.families.converted import ConvertedConfig
from rookery.families.transformer import TransformerConfig
from rookery.models import build, load
from rookery.models.arwkv import Converted
from rookery.models.transformer import Transformer
from rookery.nn.packing import row_mask
from rookery.registry import Family, find

# b batch, t time, c width

STUDENTS = ("arwkv", "rad-rwkv6", "rad-rwkv7")
"""Families that a transformer can become."""


def load_teacher(path: str, *, dtype: torch.dtype | None = None) -> Transformer:
    """The transformer in a file, a folder of Hugging Face's shape or on the Hub, with no gradients.

    ValueError for a model of another family, and for positions that our transformer does not compute.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.family.name != "transformer":
        raise ValueError(f"{path!r} is of family {checkpoint.family.name}; a teacher is a transformer (Llama, Qwen2)")
    _check_positions(checkpoint)
    teacher = load(checkpoint, dtype=dtype)
    return teacher.requires_grad_(False).eval()


def _check_positions(checkpoint: Checkpoint) -> None:
    file = Path(checkpoint.path) / "config.json"
    if not file.is_file():
        return
    settings = json.loads(file.read_bytes())
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{checkpoint.path!r} scales its rotary positions ({kind}), which the transformer here does not compute: "
            "its logits would be wrong; take a model without rope_scaling"
        )
    if settings.get("use_sliding_window"):
        raise ValueError(f"{checkpoint.path!r} uses a sliding window, which the transformer here does not have")


def kept_attention(text: str, layers: int) -> tuple[int, ...]:
    """Blocks named by "last:4", "first:2" or "0,3-5" of `layers` blocks; none for an empty text."""
    try:
        if text.startswith(("last:", "first:")):
            count = int(text.split(":")[1])
            kept = range(layers - count, layers) if text.startswith("last:") else range(count)
        else:
            ranges = [part.split("-") for part in text.split(",") if part]
            kept = [i for ends in ranges for i in range(int(ends[0]), int(ends[-1]) + 1)]
    except ValueError:
        raise ValueError(f'keep_attention takes "last:4", "first:2" or blocks such as "0,3-5"; got {text!r}') from None
    if any(not 0 <= i < layers for i in kept):
        raise ValueError(f"keep_attention={text!r} names blocks that the teacher, which has {layers}, does not have")
    if len({*kept}) == layers:
        raise ValueError(f"keep_attention={text!r} keeps all {layers} blocks: there is nothing to convert")
    return tuple(sorted({*kept}))


def student_config(
    teacher: TransformerConfig, to: str, *, keep_attention: str = "", untie: bool = True, **settings: Any
) -> tuple[Family, ConvertedConfig]:
    """Family and config of the student of a teacher; `settings` replace fields of the config.

    `untie` gives the student a head of its own where the teacher's is its embedding. ValueError where the widths do not
    divide, UnknownName for a family or a setting that does not exist.
    """
    if to not in STUDENTS:
        raise unknown("student", to, STUDENTS, "`rookery models`")
    family = find(to)[0]
    known = [f.name for f in fields(family.config)]
    for name in settings:
        if name not in known:
            raise unknown("setting", name, known, family.config.__name__)
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps")
    given: dict[str, Any] = {name: getattr(teacher, name) for name in same}
    given |= {
        "attention_layers": kept_attention(keep_attention, teacher.num_hidden_layers),
        "attention_rope_theta": teacher.rope_theta,
        "tie_word_embeddings": teacher.tie_word_embeddings and not untie,
    }
    if to == "arwkv":
        given |= {
            "attention_heads": teacher.num_attention_heads,
            "attention_kv_heads": teacher.num_key_value_heads,
            "attention_head_dim": teacher.head_dim,
            "attention_bias": teacher.qkv_bias,
        }
    else:
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "qkv_bias")
        given |= {name: getattr(teacher, name) for name in heads}
    if to == "rad-rwkv7":
        given["rope_theta"] = teacher.rope_theta
    return family, family.create(**{**given, **settings})


def convert(
    teacher: Transformer, to: str, *, keep_attention: str = "", untie: bool = True, seed: int = 0, **settings: Any
) -> Converted:
    """A student of `teacher`, float32: what both have is copied, the rest has its family's initial values.

    See `student_config`. The teacher stays as it is.
    """
    family, config = student_config(teacher.config, to, keep_attention=keep_attention, untie=untie, **settings)
    student = build(family, config)
    student.init_weights(seed)
    source = teacher.state_dict()
    with torch.no_grad():
        for name, weight in student.state_dict().items():
            if name in source:
                if weight.shape != source[name].shape:
                    have, want = list(source[name].shape), list(weight.shape)
                    raise ValueError(f"{name} is {have} in the teacher and {want} in a student of these settings")
                weight.copy_(source[name])
            else:
                assert ".self_attn." in name, name  # everything but mixers has the teacher's names
    return student


def mixers(student: Converted) -> dict[int, nn.Module]:
    """The time mixes by block; blocks that keep attention have none."""
    layers = enumerate(student.model.layers)
    return {i: block.self_attn for i, block in layers if i not in student.config.attention_layers}


@dataclass(frozen=True)
class Alignment:
    """How far each time mix is from the attention it stands for, given the same inputs."""

    layers: tuple[int, ...]
    """Blocks with a time mix."""
    errors: Tensor
    """[layers]: the distance of a token's outputs, by the root of the width (or its mean square), mean over tokens"""
    scales: Tensor
    """[layers]: root mean square of the attention's outputs"""

    @property
    def loss(self) -> Tensor:
        """Mean error over the layers (adaptation.md A.2.2, B.2.4)."""
        return self.errors.mean()


def attention_io(teacher: Transformer, tokens: Tensor, cu_seqlens: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Input and output [b, t, c] of every block's attention on `tokens`; as `forward` takes them."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.self_attn.register_forward_hook(lambda _, given, found: seen.append((given[0], found[0])))
        for block in teacher.model.layers
    ]
    try:
        with torch.no_grad():
            teacher.features(tokens, None, cu_seqlens)
    finally:
        for hook in hooks:
            hook.remove()
    if cu_seqlens is None:
        return seen
    real = row_mask(cu_seqlens)  # the teacher gave each document a row
    return [(x[real][None], y[real][None]) for x, y in seen]


def align(
    teacher: Transformer,
    student: Converted,
    tokens: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    square: bool = False,
) -> Alignment:
    """Every time mix of `student` on what the teacher's attention reads, against what that answers.

    Blocks learn independently of each other (but for the first one's values), so one reading trains all. `square` takes
    mean squares in place of norms. ValueError where the student was not made from a teacher of this shape.
    """
    mine, theirs = student.config, teacher.config
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    pairs = {name: (getattr(mine, name), getattr(theirs, name)) for name in sizes}
    apart = [f"{name} {own} against {other}" for name, (own, other) in pairs.items() if own != other]
    if apart:
        raise ValueError(f"outputs are aligned with the model that the student was made from; {', '.join(apart)}")
    state = student.init_state(tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    call = student.call(tokens, state, cu_seqlens)
    seen, v_first, errors, scales = attention_io(teacher, tokens, cu_seqlens), None, [], []
    for i, mixer in mixers(student).items():
        x, wanted = seen[i]
        y, _, v_first = mixer(x, state.layers[i], v_first, call)
        # float32: many small numbers are squared and summed
        difference, wanted = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (y - wanted, wanted))
        error = difference.square() if square else difference.norm(dim=-1) * wanted.shape[-1] ** -0.5
        errors.append(error.mean())
        scales.append(wanted.square().mean().sqrt())
    return Alignment(tuple(mixers(student)), torch.stack(errors), torch.stack(scales))


def detach_first_values(student: Converted) -> None:
    """Lets no gradient flow into the first time mix through its values, as ARWKV's trainer (adaptation.md A.2.1)."""
    first = student.model.layers[student.config.first_mixer].self_attn
    first.register_forward_hook(lambda _, __, found: (*found[:2], found[2] if found[2] is None else found[2].detach()))
