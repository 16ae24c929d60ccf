"""State tuning: only the state that every text begins from is trained; the weights stay as they are.

(RWKV-LM's README, "state tuning"; state_methods.md 1.2.) Costs nothing when the model runs: a tuned state is a file of
one state, which `rookery generate --state` starts from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rookery.checkpoints.tuned_state import UPSCALED, find_tuned_state, read_tuned_state, save_tuned_state
from rookery.errors import BadState
from rookery.nn.language_model import LanguageModel
from rookery.state import State, from_numpy

SHIFTS = ("att_shift", "ffn_shift")


class StartState(nn.Module):
    """The state before the first token as parameters: `start(rows)` gives it to so many texts.

    Of every layer of an RWKV-5, 6 or 7 the recurrent matrices `wkv.i` [head, value, key], all zeros at first, which is
    the model as it was. RWKV-4 has two sums per channel [2, width] in the frame of exponent 0 (start: no first token);
    the second, the weight of an imaginary token, must not be negative: call `project` after every step. `shifts` adds
    the vectors [width] that stand for the token before the first. The model is not changed and is no part of this
    module. ValueError for a model whose state is another (a transformer's keys and values, a hybrid's).
    """

    field = "wkv"
    """The field of a layer's state that is trained."""

    def __init__(self, model: LanguageModel, *, shifts: bool = False) -> None:
        super().__init__()
        with torch.no_grad():
            fresh = model.init_state(1)
        fields = {name.rpartition(".")[2] for name in fresh.tensors()}
        if not fields <= {"wkv", *SHIFTS, *UPSCALED} or self.field not in fields:
            raise ValueError(
                f"a {model.family} model has no recurrent state to tune; it keeps {', '.join(sorted(fields))}"
            )
        self.model = [model]  # in lists, so that nothing takes them for parts of this module
        self.fresh = [fresh]
        self.is_sums = len(model.config.wkv_shape) == 2
        self.wkv = nn.ParameterList()
        for layer in fresh.layers:
            zeros = torch.zeros_like(getattr(layer, self.field)[0])
            self.wkv.append(nn.Parameter(zeros[:2].clone() if self.is_sums else zeros))
        self.factors: list[Tensor] | None = None
        """R of every layer [head, key, key] where the state is `wkv` R, see `rookery.adapt.decorrelate`."""
        self.shifts = nn.ParameterDict()
        if shifts:
            for i, layer in enumerate(fresh.layers):
                for name in SHIFTS:
                    # as wide as the matrices: small steps would be lost in the numbers of a bfloat16 model
                    self.shifts[f"{i}_{name}"] = nn.Parameter(getattr(layer, name)[0].to(layer.wkv.dtype, copy=True))

    def forward(self, rows: int = 1) -> State:
        """The state of `rows` texts before their first token; gradients of all rows add up in the parameters."""
        fresh = self.fresh[0].to(self.wkv[0].device)  # which this module may have been moved to
        tensors = {}
        for name, tensor in fresh.tensors().items():
            _, layer, field = name.split(".")
            if field == self.field:
                tensor = self.value(int(layer))
            elif (key := f"{layer}_{field}") in self.shifts:
                tensor = self.shifts[key].to(tensor.dtype)
            else:
                tensor = self.constant(int(layer), field, tensor[0])
            tensors[name] = tensor.expand(rows, *tensor.shape)
        return fresh.with_tensors(tensors, fresh.tokens_seen.expand(rows))

    def constant(self, layer: int, field: str, fresh: Tensor) -> Tensor:
        """What is not trained of a layer's state; `fresh` is what a fresh one has."""
        return fresh

    def value(self, layer: int) -> Tensor:
        """What of the layer's state is trained, as the model starts with it."""
        wkv = self.wkv[layer]
        if not self.is_sums:
            return wkv if self.factors is None else wkv @ self.factors[layer].to(wkv)
        # exponent 0 also where nothing has been read: from an exponent of −1e38 no gradient would come back, so this is
        # the fresh model but for rounding (state_methods.md 1.2)
        # not clamped here: a clamp has no gradient below zero, and `project` sees to the sign
        return torch.cat([wkv, torch.zeros_like(wkv[:1])])

    @torch.no_grad()
    def fold(self) -> None:
        """Puts the factors R into the parameters: the same states, trained plainly from here on."""
        for layer, wkv in enumerate(self.wkv if self.factors is not None else ()):
            wkv.copy_(self.value(layer))
        self.factors = None

    @torch.no_grad()
    def project(self) -> None:
        """Puts RWKV-4's weights of an imaginary token back to 0 where a step made them negative."""
        if self.is_sums:
            for wkv in self.wkv:
                wkv[1].clamp_(min=0)

    @torch.no_grad()
    def begin_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a state's values ("layers.0.wkv", …, without the row); shifts only where these are trained."""
        self.factors = None
        for i, wkv in enumerate(self.wkv):
            given = tensors[f"layers.{i}.{self.field}"].to(wkv)
            if self.is_sums:
                given = given[:2] * given[2].exp()
            wkv.copy_(given)
        for key, shift in self.shifts.items():
            layer, _, field = key.partition("_")
            if f"layers.{layer}.{field}" in tensors:
                shift.copy_(tensors[f"layers.{layer}.{field}"])


def save_start(start: StartState, path: str | os.PathLike[str], model: LanguageModel) -> None:
    """Writes the state as a small file that `generate --state`, `Session` and `load_start` read.

    `.safetensors` says which model it belongs to, `.pth` is for RWKV-PEFT and other programs, `.st` for web-rwkv.
    """
    with torch.no_grad():
        arrays = start(1).arrays()
    if start.field != "wkv" and "layers.0.rule" not in arrays:
        raise ValueError("the literal form of a kernel state is for study and has no file; use KernelStart")
    if start.field != "wkv":  # the model's own state stays zero
        arrays = {name: array for name, array in arrays.items() if not name.endswith(".wkv")}
    save_tuned_state(path, arrays, getattr(model, "base", [model])[0].config, model=model.fingerprint())


def load_start(path: str | os.PathLike[str], model: LanguageModel, *, shifts: bool = False) -> StartState:
    """The start state in a file of any format that holds tuned states; BadState for another model's.

    It is a `KernelStart` where the file has a kernel-upscaled state: what then runs is its own `model[0]`.
    """
    tuned = read_tuned_state(path)
    if tuned.is_upscaled:
        from rookery.adapt.kernel_state import load_kernel_start  # which builds on this file

        return load_kernel_start(tuned, model, shifts=shifts)
    start = StartState(model, shifts=shifts)
    fresh = start.fresh[0].arrays()
    arrays = tuned.onto(fresh, family=model.family, config=model.config, model=model.fingerprint())
    start.begin_from({name: from_numpy(arrays[name])[0] for name in start.fresh[0].tensors()})
    return start


def started_from(path: str | os.PathLike[str], model: LanguageModel, *, shifts: bool = False) -> StartState:
    """As `load_start`, but for any file with a state: what a session saved after a prompt is a place to begin, too."""
    if find_tuned_state(path) is not None:
        return load_start(path, model, shifts=shifts)
    start, state = StartState(model, shifts=shifts), State.load(path, model)
    if state.batch != 1:
        raise BadState(f"{os.fspath(path)!r} holds {state.batch} rows; a text begins from one")
    start.begin_from({name: tensor[0] for name, tensor in state.tensors().items()})
    return start
