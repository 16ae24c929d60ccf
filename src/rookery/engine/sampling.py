"""From logits to the next token: the official RWKV pipeline (ChatRWKV, rwkv_pip_package, utils.py), made reproducible.

    bias, grammar, penalties → softmax → top_p (ties at the cut survive) → top_k → min_p → typical → temperature → draw

The temperature comes after the truncation: it flattens what is left and brings nothing back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rookery.engine.grammar import Constraint

DIGITS_AND_SPACE = b" \t0123456789"
"""A token whose bytes stand in this string costs no frequency penalty: numbers and indents repeat with good reason."""
GOLDEN_GAMMA, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults suit chat models; temperature 0 always takes the likeliest token."""

    temperature: float = 1.0
    """Flattens (> 1) or sharpens (< 1) what the cuts leave; 0 takes the likeliest token, the lowest id on a tie."""
    top_p: float = 0.5
    """Keep the likeliest tokens until their probabilities sum to this: 0 keeps the likeliest alone, 1 keeps all."""
    top_k: int = 0
    """Keep at most so many tokens, lower ids first on a tie; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens whose information is nearest to what is expected (the entropy) until their probabilities sum to
    this; 1 keeps all (arXiv 2202.00666)."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that has occurred."""
    frequency_penalty: float = 0.0
    """Taken off the logit once for each occurrence (digits and spaces count zero times)."""
    penalty_decay: float = 0.996
    """Old occurrences count this much less with every new token."""
    banned: tuple[int, ...] = ()
    """Ids of tokens that are never chosen."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0, float("inf")),
            "top_p": (0, 1),
            "top_k": (0, float("inf")),
            "min_p": (0, 1),
            "typical_p": (0, 1),
            "penalty_decay": (0, 1),
        }
        for name, (low, high) in allowed.items():
            value = getattr(self, name)
            if not low <= value <= high:  # false for NaN, too
                limits = f"{low} or more" if high == float("inf") else f"between {low} and {high}"
                raise ValueError(f"{name} must be {limits}, got {value}")
        for token, bias in self.logit_bias.items():
            if not bias < float("inf"):  # minus infinity bans a token
                raise ValueError(f"the logit bias of token {token} must be a number, got {bias}")

    @property
    def penalises(self) -> bool:
        """True if what has occurred changes what comes."""
        return bool(self.presence_penalty or self.frequency_penalty)


class TokenLogprobs(NamedTuple):
    """How likely the model thought a token: logarithms of probabilities before penalties, cuts and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, falling."""


def logprobs_of(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    """What `TokenLogprobs` says of `token` and the `count` likeliest, for float32 logits [vocab]."""
    logprobs = log_softmax(logits)
    likeliest = _likeliest(logprobs, min(count, len(logprobs))) if count else np.empty(0, np.int64)
    top = sorted(((int(i), float(logprobs[i])) for i in likeliest), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(token, float(logprobs[token]), tuple(top))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 logarithms of probabilities [..., vocab]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class Sampler:
    """Chooses the tokens of one request: its own random stream and its own counts of what has occurred.

    The number drawn for the n-th token depends on `seed` and n alone, so a request gives the same tokens alone, in a
    batch, and after a pause. `token_bytes` gives the bytes of a token for the exception of `DIGITS_AND_SPACE`; without
    it every token counts.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        token_bytes: Callable[[int], bytes] | None = None,
        step: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        self.constraint = constraint
        """What the text must look like."""
        self.sampling = sampling
        self.seed = seed
        self.step = step
        self._token_bytes = token_bytes
        self._occurred = self._counts = None  # made at the first occurrence, where penalties are asked for

    def next(self, logits: np.ndarray, number: float | None = None) -> int:
        """The next token for float32 logits [vocab], which are left unchanged. `accept` it to make it count.

        `number` in [0, 1) takes the place of the seed's.
        """
        number = uniform(self.seed, self.step) if number is None else number
        self.step += 1
        logits = self._adjusted(logits)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
            _check_finite(logits[token])
            return token
        tokens, probabilities = distribution(logits, self.sampling)
        return int(tokens[draw(probabilities, number)])

    @property
    def complete(self) -> bool:
        """True if no token can follow."""
        return self.constraint is not None and self.constraint.complete

    def accept(self, token: int) -> None:
        """Counts a token that became part of the text; a token that ended it is not counted."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._counts is None:
            return
        self._counts *= self.sampling.penalty_decay
        self._occurred[token] = True
        if self._token_bytes is None or self._token_bytes(token) not in DIGITS_AND_SPACE:
            self._counts[token] += 1

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        sampling = self.sampling
        if sampling.penalises and self._counts is None:
            self._occurred, self._counts = np.zeros(len(logits), bool), np.zeros(len(logits), np.float32)
        if not (sampling.penalises or sampling.banned or sampling.logit_bias or self.constraint):
            return logits
        logits = logits.copy()
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        logits[list(sampling.banned)] = -np.inf
        if self.constraint is not None:
            logits[~self.constraint.allowed()] = -np.inf
        if sampling.penalises:
            logits -= sampling.presence_penalty * self._occurred + sampling.frequency_penalty * self._counts
        return logits


def distribution(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, ids rising, and their probabilities (float64, summing to 1), for logits [vocab].

    Penalties are not applied here. Temperature 0 gives one token.
    """
    best = logits.max()
    _check_finite(best)
    if sampling.temperature == 0:
        return np.array([logits.argmax()]), np.ones(1)
    weights = np.exp(logits - best)  # softmax without its divisor: every cut is relative to the sum
    cut = max(_nucleus(weights, sampling.top_p), sampling.min_p)
    # nothing of weight 0 is drawn, not even where every cut is off
    tokens = np.flatnonzero((weights >= cut) & (weights > 0))
    if 0 < sampling.top_k < len(tokens):
        tokens = tokens[_likeliest(weights[tokens], sampling.top_k)]
    if sampling.typical_p < 1:
        typical = _typical(weights, sampling.typical_p)
        # what every cut together would leave empty keeps its likeliest token
        tokens = kept if len(kept := tokens[typical[tokens]]) else tokens[[weights[tokens].argmax()]]
    kept = weights[tokens].astype(np.float64)
    if sampling.temperature != 1:
        # exp(logit / T) is p^(1/T) up to a factor, without its underflow at low temperatures
        kept = np.exp((logits[tokens].astype(np.float64) - float(best)) / sampling.temperature)
    return tokens, kept / kept.sum()


def _nucleus(weights: np.ndarray, top_p: float) -> float:
    """The smallest weight that top_p keeps: where the falling weights, summed up, first reach top_p of their sum."""
    if top_p >= 1:
        return 0.0  # said outright: whether a rounded sum reaches 1 must not decide
    mass = float(weights.sum())
    wanted = top_p * mass
    kept, rest = 0.0, weights  # the sum of what is surely kept, and the weights among which the cut falls
    # quickselect by mass, the mean as pivot: sorting all 65,536 weights would take up to a hundred times as long
    while len(rest) > 1024:
        larger = rest > mass / len(rest)
        upper = rest[larger]
        if len(upper) in (0, len(rest)):
            break  # all equal, but for the mean's rounding
        above = float(upper.sum())
        if kept + above >= wanted:
            rest, mass = upper, above
        else:
            kept, rest = kept + above, rest[~larger]
            mass = float(rest.sum())
    rest = np.sort(rest)[::-1]
    reached = np.cumsum(rest, dtype=np.float64) >= wanted - kept
    # rounding may leave the sum a hair below: then all stay, and not the first alone (core.md 3.5 c)
    return float(rest[reached.argmax()] if reached.any() else rest[-1])


def _typical(weights: np.ndarray, typical_p: float) -> np.ndarray:
    """bool [vocab]: the tokens with the most expected information that together have the probability `typical_p`."""
    probabilities = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    information = np.full(len(weights), np.inf)
    possible = probabilities > 0
    information[possible] = -np.log(probabilities[possible])
    entropy = (probabilities[possible] * information[possible]).sum()
    apart = np.abs(information - entropy)
    kept, count = np.zeros(len(weights), bool), 1024
    while True:  # sorting all 65,536 takes far longer than finding the few that are wanted
        some = np.arange(len(apart))
        if count < len(apart):
            some = np.flatnonzero(apart <= np.partition(apart, count)[count])
        if count >= len(apart) or probabilities[some].sum() >= typical_p:
            break
        count *= 8
    order = some[np.argsort(apart[some], kind="stable")]
    kept[order[: int(np.searchsorted(np.cumsum(probabilities[order]), typical_p)) + 1]] = True
    return kept


def _likeliest(weights: np.ndarray, count: int) -> np.ndarray:
    """Indices, rising, of the `count` largest weights; among equals the first ones."""
    least = np.partition(weights, -count)[-count]
    larger, equal = np.flatnonzero(weights > least), np.flatnonzero(weights == least)
    return np.sort(np.concatenate([larger, equal[: count - len(larger)]]))


def draw(probabilities: np.ndarray, number: float) -> int:
    """Index into `probabilities` that a uniform `number` in [0, 1) falls on."""
    sums = np.cumsum(probabilities)
    return min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(sums) - 1)


def uniform(seed: int, step: int) -> float:
    """The `step`-th number in [0, 1) of a seed's stream: SplitMix64 (Steele, Lea & Flood 2014), its state computed.

    Any integer is a seed. numpy's generators would do as well, but importing them takes longer than a short answer.
    """
    start = _mixed(seed & MASK)
    return (_mixed((start + (step + 1) * GOLDEN_GAMMA) & MASK) >> 11) * 2.0**-53


def _mixed(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def _check_finite(best: np.floating) -> None:
    if not np.isfinite(best):
        raise ValueError(
            f"no token can be chosen: the largest logit is {best}; either every token is banned, or the model's "
            "weights or state are damaged"
        )
