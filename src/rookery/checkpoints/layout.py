"""Applies the key maps of `rookery.families.layout`, lazily and in both directions."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from rookery.checkpoints.source import Stored
from rookery.errors import BadCheckpoint
from rookery.families.layout import Layout, Rule

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Step:
    """One change on the way from official to foreign, and its inverse."""

    outward: Change
    inward: Change
    moves: bool = True
    """True if numbers only change places (a view); False if they change value and keep their places."""


def _blocks(x: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    return x.reshape(len(order), -1, *x.shape[1:])[list(order)].reshape(x.shape)


STEPS = {
    "transpose": Step(lambda x: x.swapaxes(-1, -2), lambda x: x.swapaxes(-1, -2)),
    # whoever reads compares shapes without their ones, so there is nothing to undo
    "squeeze": Step(np.squeeze, lambda x: x),
    "drop_axis_1": Step(lambda x: x[:, 0], lambda x: x[:, None]),
    "column": Step(lambda x: x[..., None], lambda x: x[..., 0]),
    "flat": Step(lambda x: x.reshape(-1), lambda x: x.reshape(-1)),
    # only the reader of the file knows how large a head is: it has cut them apart already
    "join_heads": Step(lambda x: x.reshape(-1), lambda x: x),
    "join_five": Step(lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(5, -1, x.shape[-1])),
    # five blocks of rows, w k v r g outside fla and r w k v g in it
    # and r k v w g in rwkv6qwen2, w k v r g in its GGUF
    "w_first": Step(partial(_blocks, order=(3, 1, 2, 0, 4)), partial(_blocks, order=(3, 1, 2, 0, 4))),
    "r_first": Step(partial(_blocks, order=(3, 0, 1, 2, 4)), partial(_blocks, order=(1, 2, 3, 0, 4))),
    "exp": Step(np.exp, np.log, moves=False),
    "negative_exp": Step(lambda x: -np.exp(x), lambda x: np.log(-x), moves=False),
    "exp_negative_exp": Step(lambda x: np.exp(-np.exp(x)), lambda x: np.log(-np.log(x)), moves=False),
}
"""Step name in a rule -> what it does."""


def from_foreign(layout: Layout, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """`tensors` under official names and with official values; nothing is read yet."""
    patterns = [(_pattern(rule.foreign), rule) for rule in layout.rules]
    official: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        rule, layer = _match(patterns, name)
        if rule is None:
            official[name] = tensor
        elif isinstance(rule.official, str):
            _put(official, _named(rule.official, layer), _changed(tensor, _inward(rule)))
        else:
            parts = min(len(rule.official), tensor.shape[0]) if rule.shorter else len(rule.official)
            for i, part in enumerate(rule.official[:parts]):
                changes = [*_inward(rule), (True, partial(_row, i=i, of=parts))]
                _put(official, _named(part, layer), _changed(tensor, changes, share=parts))
    return official


def _put(official: dict[str, Stored], name: str, tensor: Stored) -> None:
    """Adds a tensor; one that is there already, under another foreign name, must hold the same numbers."""
    first = official.get(name)
    if first is None:
        official[name] = tensor
        return

    def read() -> np.ndarray:
        one, other = first.read(), tensor.read()
        if not np.array_equal(one.reshape(-1), other.reshape(-1), equal_nan=True):
            raise BadCheckpoint(f"{name} is stored twice, under names of which one is an alias, with different numbers")
        return one

    official[name] = replace(first, read=read)


def to_foreign(layout: Layout, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Official `tensors` under the names, shapes and values of the format; nothing is read yet."""
    rules: dict[str, Rule] = {}
    for rule in layout.rules:
        for official in (rule.official,) if isinstance(rule.official, str) else rule.official:
            rules.setdefault(official, rule)  # later rules for the same tensor are old spellings, for reading only
    patterns = [(_pattern(official), rule) for official, rule in rules.items()]
    foreign: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        rule, layer = _match(patterns, name)
        if rule is None:
            foreign[name] = tensor
        elif isinstance(rule.official, str):
            foreign[_named(rule.foreign, layer)] = _changed(tensor, _outward(rule))
        elif name == _named(rule.official[0], layer):
            names = [_named(part, layer) for part in rule.official]
            stack = _stacked([tensors[part] for part in names if part in tensors or not rule.shorter])
            foreign[_named(rule.foreign, layer)] = _changed(stack, _outward(rule))
    return foreign


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{layer\}", "([0-9]+)"))


def _match(patterns: list[tuple[re.Pattern[str], Rule]], name: str) -> tuple[Rule | None, str]:
    for pattern, rule in patterns:
        if found := pattern.fullmatch(name):
            return rule, (found.groups() or ("",))[0]
    return None, ""


def _named(template: str, layer: str) -> str:
    return template.replace("{layer}", layer)


def _inward(rule: Rule) -> list[tuple[bool, Change]]:
    return [(STEPS[step].moves, STEPS[step].inward) for step in reversed(rule.steps)]


def _outward(rule: Rule) -> list[tuple[bool, Change]]:
    return [(STEPS[step].moves, STEPS[step].outward) for step in rule.steps]


def _row(stack: np.ndarray, i: int, of: int) -> np.ndarray:
    if len(stack) != of:
        raise IndexError(f"a stack of {of} tensors has {len(stack)}")
    return stack[i]


def _changed(tensor: Stored, changes: list[tuple[bool, Change]], share: int = 1) -> Stored:
    """`tensor` with `changes` to be made when it is read; `share` says of how many tensors this is one."""
    shape = np.broadcast_to(np.zeros((), np.bool_), tensor.shape)  # a view of one number: moving it costs nothing
    for moves, change in changes:
        shape = change(shape) if moves else shape

    def read() -> np.ndarray:
        values = tensor.read()
        with np.errstate(all="ignore"):  # damaged numbers give NaN, which is for the reader to judge
            for moves, change in changes:
                # exponentials of exponentials need the digits: float64 in between
                values = change(values) if moves else change(values.astype(np.float64)).astype(tensor.dtype)
        return values

    packed = tensor.packed if not changes else None  # bytes of the whole tensor as it was
    return replace(tensor, shape=shape.shape, read=read, nbytes=tensor.nbytes // share, packed=packed)


def _stacked(parts: list[Stored]) -> Stored:
    first = parts[0]
    return replace(
        first,
        shape=(len(parts), *first.shape),
        read=lambda: np.stack([part.read() for part in parts]),
        nbytes=sum(part.nbytes for part in parts),
        packed=None,
    )
