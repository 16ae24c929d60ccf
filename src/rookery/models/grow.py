"""Growth of a Meta-State model: parameter tokens, heads, encoders and blocks are added, and nothing changes by that.

What is new answers with zeros (`att.output`, `ffn.value`, `sse_eta`) and asks with fresh random weights. The other way
round, keys of zero and random values as TokenFormer (arXiv 2410.23168) suggests, is a dead start under relu²: relu(0)²
has neither a value nor a slope, and no gradient ever comes (state_methods.md 2.4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rookery.nn.initial import WithoutInit

if TYPE_CHECKING:
    from rookery.models.meta_state import MetaState


@dataclass
class Grown:
    """What growth has done."""

    before: int
    """Parameters."""
    after: int
    changed: list[str] = field(default_factory=list)
    """Names of parameters that have become larger."""
    added: list[str] = field(default_factory=list)
    """Names of parameters that were not there."""


@torch.no_grad()
def grow(
    model: MetaState,
    *,
    tokens: int = 0,
    heads: int = 0,
    encoders: int = 0,
    layers: Sequence[int] = (),
    optimizer: torch.optim.Optimizer | None = None,
    old_rate: float = 1.0,
    freeze_old: bool = False,
    seed: int = 0,
) -> Grown:
    """Adds `tokens` parameter tokens and `heads` heads to every block, `encoders` of the heads to those that are read,
    and new blocks before the present blocks `layers` (their number: at the end).

    `optimizer` goes on with the moments that it has; those of what is new begin at zero. It moves what was there before
    by `old_rate` of its steps (0.3 suits a long training). With `freeze_old` nothing of that has a gradient any more;
    an optimiser made afterwards must not decay weights. States from before belong to another model. ValueError where
    an axis cannot grow so.
    """
    if tokens < 0 or heads < 0 or encoders < 0:
        raise ValueError(f"growth only adds: tokens, heads, encoders are 0 or more, not {tokens}, {heads}, {encoders}")
    if optimizer is None and old_rate != 1:
        raise ValueError("old_rate is kept by the optimiser: give it, too")
    depth = model.config.num_hidden_layers
    if any(not 1 <= place <= depth for place in layers):
        raise ValueError(f"blocks can be put before blocks 1 to {depth}, got {list(layers)}; block 0 stays the first")
    config = _larger(model.config, tokens, heads, encoders, layers)
    old = dict(model.named_parameters())
    weight = model.emb.weight
    with WithoutInit():
        new = type(model)(config)
    new.init_weights(seed)
    new.to(device=weight.device, dtype=weight.dtype)
    report = Grown(before=sum(p.numel() for p in old.values()), after=0)
    places = [i + sum(place <= i for place in layers) for i in range(depth)]
    kept: dict[str, nn.Parameter] = {_moved(name, places): parameter for name, parameter in old.items()}
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(new.named_parameters()):
        before = kept.get(name)
        if before is None:
            report.added.append(name)
            if name.endswith("sse_eta"):
                parameter.zero_()
            continue
        if before.shape != parameter.shape:
            _take_over(parameter, before, name)
            parameter.requires_grad_(before.requires_grad)
            replaced[before] = parameter
            report.changed.append(name)
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(owner), leaf, before)
    model.blocks, model.config = new.blocks, config
    model.train(model.training)
    report.after = sum(p.numel() for p in model.parameters())
    if freeze_old:
        _freeze(model, kept, report)
    if optimizer is not None:
        _carry(optimizer, replaced, [model.get_parameter(name) for name in report.added])
        if old_rate != 1:
            old_parts = {model.get_parameter(name): _front(before) for name, before in kept.items()}
            _slow_down(optimizer, old_parts, old_rate)
    return report


def _larger(config, tokens: int, heads: int, encoders: int, layers: Sequence[int]):
    """The config after growth; new encoders read the last heads that nobody reads, into the first free channels."""
    total = config.num_heads + heads
    free = [head for head in reversed(range(total)) if head not in config.encoder_heads]
    blocks = config.hidden_size // config.head_dim
    room = [block for block in range(blocks) if block not in config.encoder_blocks]
    if encoders > min(len(free), len(room)):
        raise ValueError(
            f"{encoders} encoders cannot be added: {len(free)} heads are not read yet, and of the residual stream's "
            f"{blocks} blocks of channels {len(room)} are free"
        )
    added = {"tokens": tokens, "heads": heads, "encoders": encoders, "layers": len(layers)}
    log = "+".join(f"{count} {name}" for name, count in added.items() if count) or "nothing"
    return replace(
        config,
        intermediate_size=config.intermediate_size + tokens,
        num_heads=total,
        num_hidden_layers=config.num_hidden_layers + len(layers),
        encoder_heads=(*config.encoder_heads, *free[:encoders]),
        encoder_blocks=(*config.encoder_blocks, *room[:encoders]),
        growth=(*config.growth, log),
    )


def _moved(name: str, places: list[int]) -> str:
    """A parameter's name after blocks were put between."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return name if found is None else f"blocks.{places[int(found[1])]}.{name[found.end() :]}"


ANSWERS = ("att.output.weight", "ffn.value.weight", "ffn.sse_eta")
"""What is zero in the new part."""


def _take_over(new: Tensor, old: Tensor, name: str) -> None:
    """Old numbers in front, in every dimension."""
    if name.endswith(ANSWERS):
        new.zero_()
    new[_front(old)] = old


def _front(old: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in old.shape)


def _freeze(model: MetaState, kept: dict[str, nn.Parameter], report: Grown) -> None:
    """Lets gradients through to what is new only."""
    for name, parameter in model.named_parameters():
        if name in report.changed:
            mask = torch.ones_like(parameter)
            mask[_front(kept[name])] = 0
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
        elif name not in report.added:
            parameter.requires_grad_(False)


def _carry(
    optimizer: torch.optim.Optimizer, replaced: dict[nn.Parameter, nn.Parameter], added: list[nn.Parameter]
) -> None:
    """Puts the larger parameters into the optimiser's groups, with its moments padded by zeros."""
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for old, new in replaced.items():
        state = optimizer.state.pop(old, None)
        if state is None:
            continue
        optimizer.state[new] = {
            key: _padded(value, old, new) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }
    if added:
        optimizer.add_param_group({**_settings(optimizer.param_groups[0]), "params": added})


def _padded(moment: Tensor, old: Tensor, new: Tensor) -> Tensor:
    wide = moment.new_zeros(new.shape)
    wide[_front(old)] = moment
    return wide


def _settings(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in ("params", "name")}


def _slow_down(optimizer: torch.optim.Optimizer, parts: dict[nn.Parameter, tuple[slice, ...]], rate: float) -> None:
    """Lets the optimiser move these parts of parameters by `rate` of what it would."""
    before: dict[nn.Parameter, Tensor] = {}

    def remember(*_: object) -> None:
        before.update({parameter: parameter[part].detach().clone() for parameter, part in parts.items()})

    @torch.no_grad()
    def take_back(*_: object) -> None:
        for parameter, part in parts.items():
            parameter[part] = torch.lerp(before[parameter], parameter[part], rate)
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(take_back)
