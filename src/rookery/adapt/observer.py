"""A start state that makes a small model follow the state dynamics of a larger one (State Tuning, arXiv 2504.05097).

The paper gives the idea alone; how it is done here is an interpretation, without public code or tables to compare with
(state_methods.md 1.3). What is followed is what each layer reads from its state, before the norm; how well it is
followed is a number, `Observer.r2`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from rookery.adapt.read_features import recorded
from rookery.adapt.state_tuning import StartState
from rookery.nn.language_model import LanguageModel
from rookery.state import State

# b rows, t time, s width of the student, c width of the observed model


class ObserverLoss(NamedTuple):
    """The loss and its parts, each without its weight."""

    loss: Tensor
    ce: Tensor
    """Cross-entropy of the next token, nats."""
    kl: Tensor
    """KL(observed ‖ student) of the next token, nats; 0 where it is not asked for."""
    obs: Tensor
    """Mean squared distance of the mapped read-outs, each of size 1."""


class Observer:
    """Holds the observed model and, per layer of the student, the linear map O_l from its read-outs to those observed.

    The maps are fitted once, by ridge regression with the student as it was, and then frozen: nothing is trained but
    the start state. Student layer l looks at layer round(l (L_T − 1) / max(L_S − 1, 1)). KL needs one vocabulary;
    models of different ones are compared by text positions alone, with `kl_weight=0`. ValueError otherwise.
    """

    def __init__(
        self,
        student: LanguageModel,
        observed: LanguageModel,
        tokens: Tensor,
        *,
        kl_weight: float = 0.5,
        obs_weight: float = 0.1,
        ridge: float = 1e-3,
    ) -> None:
        theirs, ours = observed.config.vocab_size, student.config.vocab_size
        if kl_weight and theirs != ours:
            raise ValueError(
                f"the observed model has {theirs} tokens, the student {ours}: probabilities cannot be compared; "
                "give kl_weight=0"
            )
        self.student, self.observed = student, observed.eval().requires_grad_(False)
        self.kl_weight, self.obs_weight = kl_weight, obs_weight
        with torch.no_grad():
            seen, wanted = self._read(student, tokens, None)[1], self._watched(tokens)[1]
            self.maps = [_fitted(y, z, ridge) for y, z in zip(seen, wanted)]

    def loss(self, tokens: Tensor, start: Callable[[int], State] | StartState) -> ObserverLoss:
        """The loss on texts [b, t + 1] that begin in `start`."""
        logits, seen = self._read(self._student(start), tokens[:, :-1], start)
        with torch.no_grad():
            taught, wanted = self._watched(tokens[:, :-1])
        ce = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        obs = torch.stack([_distance(y, o, z) for y, o, z in zip(seen, self.maps, wanted)]).mean()
        kl = ce.new_zeros(())
        if self.kl_weight:
            student, teacher = logits.flatten(0, 1).log_softmax(-1), taught.flatten(0, 1).log_softmax(-1)
            kl = kl_div(student, teacher, reduction="batchmean", log_target=True)
        return ObserverLoss(ce + self.kl_weight * kl + self.obs_weight * obs, ce, kl, obs)

    @torch.no_grad()
    def r2(self, tokens: Tensor, start: Callable[[int], State] | StartState | None = None) -> list[float]:
        """Per layer of the student the share of the observed read-outs' variance that the maps explain, at most 1."""
        seen, wanted = self._read(self._student(start), tokens, start)[1], self._watched(tokens)[1]
        found = []
        for y, o, z in zip(seen, self.maps, wanted):
            spread = (z - z.mean((0, 1))).square().sum()
            found.append(float(1 - (y @ o - z).square().sum() / spread))
        return found

    def _student(self, start: object) -> LanguageModel:
        return start.model[0] if isinstance(start, StartState) else self.student

    def _read(self, model: LanguageModel, tokens: Tensor, start: Callable | None) -> tuple[Tensor, list[Tensor]]:
        """Logits, and every layer's read-outs [b, t, width], of size 1 at each token."""
        with read_outs(model) as kept:
            logits, _ = model(tokens, None if start is None else start(tokens.shape[0]))
        # complete now: for some families only when the block above has ended
        return logits, [_sized(y.flatten(2)) for y in kept]

    def _watched(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, read = self._read(self.observed, tokens, None)
        here, there = len(self.student.blocks), len(read)
        return logits, [read[round(layer * (there - 1) / max(here - 1, 1))] for layer in range(here)]


@contextmanager
def read_outs(model: LanguageModel) -> Iterator[list[Tensor]]:
    """Within, what every layer reads from its states, before the norm, [b, t, h, n], is kept."""
    mixers = [getattr(block, "base", block).att for block in model.blocks]
    if not all(hasattr(mixer, "finish") for mixer in mixers):  # RWKV-5 and 6 have one state, and one recurrence
        with recorded(model) as calls:
            outputs: list[Tensor] = []
            yield outputs
            outputs += [one.y for one in calls]
        return
    kept: list[Tensor] = []
    for mixer in mixers:
        mixer.finish = _keeping(mixer.finish, kept)
    try:
        yield kept
    finally:
        for mixer in mixers:
            del mixer.finish


def _keeping(run: Callable, kept: list[Tensor]) -> Callable:
    def finish(y: Tensor, signals: object) -> Tensor:
        kept.append(y)
        return run(y, signals)

    return finish


def _sized(y: Tensor) -> Tensor:
    """Vectors of root mean square 1."""
    return y * (y.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def _distance(y: Tensor, o: Tensor, z: Tensor) -> Tensor:
    return (_sized(y @ o) - z).square().mean()


def _fitted(y: Tensor, z: Tensor, ridge: float) -> Tensor:
    """argmin |Y O − Z|² + μ |O|², [s, c], with μ = ridge · trace(YᵀY) / s."""
    dtype, y, z = y.dtype, y.flatten(0, 1).double(), z.flatten(0, 1).double()
    gram = y.T @ y
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, y.T @ z).to(dtype)
