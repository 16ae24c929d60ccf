"""What multiplies a start state: x_t, so that the recurrence's output is y_t(0) + S₀ x_t (state_methods.md 0.3).

x_t = T_1 ⋯ T_t r_t is what the recurrence itself puts out for values of zero and a start state of the identity, in
RWKV-5, 6 and 7 alike. The gradient with respect to S₀ is Σ_t g_t x_tᵀ, g_t that of y_t.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rookery.adapt.state_tuning import StartState
from rookery.nn.language_model import LanguageModel

# b rows, t time, h heads, n channels of a head, m key channels of the start state


class Recorded(NamedTuple):
    """One call of a recurrence."""

    run: Callable
    """What ran."""
    call: dict[str, Tensor]
    """Its arguments."""
    y: Tensor
    """[b, t, h, n], its output before the norm"""


@contextmanager
def recorded(model: LanguageModel) -> Iterator[list[Recorded]]:
    """Within, every layer's call of the recurrence that reads the tuned state is kept, in the order of the layers.

    ValueError for models of which that is not known (RWKV-5, 6 and 7 and what hosts kernel states).
    """
    readers = [block if hasattr(block, "recurrence") else block.att for block in getattr(model, "blocks", ())]
    if not readers or not all(hasattr(reader, "recurrence") for reader in readers):
        raise ValueError(f"the recurrence of a {model.family} model cannot be looked at; RWKV-5, 6 and 7 can")
    kept: list[Recorded] = []

    def recording(run: Callable) -> Callable:
        def call(**given: Tensor) -> tuple[Tensor, Tensor]:
            y, state = run(**given)
            kept.append(Recorded(run, given, y))
            return y, state

        return call

    before = [vars(reader).get("recurrence") for reader in readers]
    for reader in readers:
        reader.recurrence = recording(reader.recurrence)
    try:
        yield kept
    finally:
        for reader, own in zip(readers, before):
            del reader.recurrence
            if own is not None:
                reader.recurrence = own


def features_of(recorded: Recorded) -> Tensor:
    """x of every token, [b, t, h, m], in the dtype of the state."""
    call = dict(recorded.call)
    rows, heads, _, size = call["state"].shape
    wide = call["state"].dtype
    call["state"] = torch.eye(size, dtype=wide, device=call["r"].device).expand(rows, heads, size, size)
    call["v"] = call["r"].new_zeros(1, dtype=wide).expand(*call["r"].shape[:3], size)
    y, _ = recorded.run(**{name: x.to(wide) if _floats(x) else x for name, x in call.items()})
    return y


@torch.no_grad()
def read_features(
    start: StartState,
    tokens: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    positions: int | None = 256,
    seed: int = 0,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Per layer the x [positions, h, m] of random positions of `tokens` [b, t], or of all (`positions=None`).

    `mask` [b, t] says which positions count, as those that the loss is taken at; `cu_seqlens` where documents begin
    that are packed in one row.
    """
    with recorded(start.model[0]) as kept:
        rows = tokens.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        start.model[0].features(tokens, start(rows), cu_seqlens)
    chosen = torch.arange(tokens.numel()) if mask is None else mask.flatten().nonzero()[:, 0].cpu()
    if positions is not None and positions < len(chosen):
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:positions]]
    return [features_of(one).flatten(0, 1)[chosen.to(tokens.device)] for one in kept]


def _floats(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
