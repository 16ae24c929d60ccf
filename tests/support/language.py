"""What the contract of language models needs: models away from their initial weights, and comparisons of states."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rookery.models import create_model
from rookery.nn.language_model import LanguageModel
from rookery.registry import families, list_models
from rookery.state import State

LENGTH = 70
"""Tokens of a row: every mechanism of a -test preset is active within 64."""
CUTS = (1, 2, 7, 31, 33, 64, 69)
"""Places to cut a row of LENGTH: the first and last token, and both sides of likely chunk borders."""

ROUNDING_ISAS = ("avx512", "amx-int8", "amx", "amx-imitated")
"""Instruction sets of the compiled runtime that round inputs of bfloat16 matrices, too."""


def names() -> list[str]:
    """The -test presets of every registered family of language models, hybrid ones among them."""
    language = [family.name for family in families().values() if family.kind == "language"]
    return [name for family in language for end in ("test", "*-test") for name in list_models(f"{family}-{end}")]


def randomised(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 1, **overrides) -> LanguageModel:
    """A model far from its initial weights.

    Published initial values set whole matrices to zero, so that an untouched model would hide what these compute.
    """
    return randomise(create_model(name, dtype=dtype, **overrides), seed)


@torch.no_grad()
def randomise(model: LanguageModel, seed: int = 1) -> LanguageModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # matrices keep the scale of their input; vectors (norms, mixes, decays) move by less than their usual size
        std = parameter.shape[-1] ** -0.5 if parameter.squeeze().dim() > 1 else 0.3
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(std * noise.to(parameter.dtype))
    return model


def some_tokens(model: LanguageModel, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def some_state(model: LanguageModel, rows: int, tokens: int = 5) -> State:
    """The state after a few tokens, different in every row."""
    return model(some_tokens(model, rows, tokens, seed=3))[1]


def assert_same_state(actual: State, expected: State, what: str = "", exactly: bool = False) -> None:
    """Equal tensors, dtypes and counts, up to the rounding of float64 or `exactly`."""
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-9, "atol": 1e-10}
    got, want = actual.tensors(), expected.tensors()
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerance, msg=lambda m, n=name: f"{what} state {n}: {m}")
    assert actual.tokens_seen.dtype == torch.int64
    assert actual.tokens_seen.tolist() == expected.tokens_seen.tolist(), what


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


class RoundedInputs(TorchFunctionMode):
    """Rounds what goes into linear layers and into the first factors of low-rank maps to bfloat16."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.factors = {id(p) for name, p in model.named_parameters() if name.endswith(("w1", "a1", "v1", "g1"))}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_factor = func in (Tensor.matmul, Tensor.__matmul__, torch.matmul) and id(args[1]) in self.factors
        if is_factor or func is torch.nn.functional.linear:
            args = (args[0].bfloat16().float(), *args[1:])
        return func(*args, **(kwargs or {}))


def as_runtime(model: LanguageModel, ids: list[int], dtype: torch.dtype, isa: str) -> tuple[Tensor, State, float]:
    """Logits [t, vocab] and state of a torch model as the runtime computes them with weights of that type, in float32.

    Where bfloat16 numbers are multiplied in pairs, what goes into a matrix is rounded to bfloat16, too. The last number
    is how far both may be apart, as a share of the largest: a number near the middle between two of those goes either
    way, and moves what follows.
    """
    model, rounds = model.float(), dtype == torch.bfloat16 and isa in ROUNDING_ISAS
    with torch.no_grad(), RoundedInputs(model) if rounds else nullcontext():
        logits, state = model(torch.tensor([ids]))
    return logits[0], state, 3e-2 if rounds else 1e-4
