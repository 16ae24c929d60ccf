"""Adapters that stay beside a model's weights, to be swapped from request to request: what runners need of them."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from rookery.checkpoints import adapter_rules as rules
from rookery.checkpoints.adapter import SHARED, Adapter
from rookery.errors import BackendUnavailable

T = TypeVar("T")
Change = Callable[[str, rules.Shape, rules.Factors], T]
"""Module, shape [out, in] of its weight, float32 factors -> what a runner keeps; Misfit where they do not fit."""


def changes_of(adapter: Adapter, shapes: Mapping[str, rules.Shape], family: str, change: Change[T]) -> dict[str, T]:
    """What `change` makes of each module's factors. `shapes` are those of the matrices that can be changed.

    BadCheckpoint where the adapter does not fit the model, or has weights that were trained whole, which hold for all
    requests. Modules have their official names.
    """
    if adapter.whole:
        raise adapter.fail("it has weights that were trained whole, which cannot be swapped: merge it")
    changes = {}
    for module, factors in adapter.factors.items():
        if module not in shapes:
            raise adapter.fail(f"this {family} model has no matrix {module!r}")
        values = {name: tensor.read().astype(np.float32) for name, tensor in factors.items()}
        try:
            changes[module] = change(module, shapes[module], values)
        except rules.Misfit as misfit:
            raise adapter.fail(f"{module}: {misfit}") from None
    return changes


def low_rank_pairs(
    adapter: Adapter, shapes: Mapping[str, rules.Shape], family: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module -> A [r, in] and B [out, r], float32: the layer gives W x + B (A x).

    LoRA, rsLoRA, PiSSA, MiSS and mini are such pairs. BackendUnavailable for DoRA and BAT, which are not.
    """

    def pair(module: str, shape: rules.Shape, values: rules.Factors) -> tuple[np.ndarray, np.ndarray]:
        shared = shared_factor(values)
        if shared is not None and values[shared].ndim == 2:
            return rules.shard_pair(shape, rules.shared_rows(shape, values[shared], shared))
        forms = {"lora_magnitude_vector": "DoRA", "bone_A": "Bone-AB", shared: "BAT"}
        if form := next((form for name, form in forms.items() if name in values), None):
            raise BackendUnavailable(
                f"{adapter.path!r}: {form} changes the weights that it finds, the compiled runtime keeps adapters "
                'beside them; swap it with torch (device="cpu", --device cpu), or merge it (adapter=, --adapter)'
            )
        return low_rank_pair(adapter, module, shape, values)

    return changes_of(adapter, shapes, family, pair)


def low_rank_pair(
    adapter: Adapter, module: str, shape: rules.Shape, values: rules.Factors
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of LoRA, rsLoRA or PiSSA, with their scale in B; Misfit where they are none of these."""
    rules.check_low_rank(shape, {name: array.shape for name, array in values.items()})
    return rules.pair(values, strength(adapter, module, values))


def strength(adapter: Adapter, module: str, values: rules.Factors) -> float:
    """What B·A is multiplied by; of PiSSA 1."""
    return 1.0 if "init_lora_A" in values else adapter.scale(module, values["lora_A"].shape[0])


def shared_factor(values: rules.Factors) -> str | None:
    """Name of the one factor of MiSS or BAT, None for other adapters."""
    names = [name for name in values if name in SHARED]
    return names[0] if names and len(values) == 1 else None
