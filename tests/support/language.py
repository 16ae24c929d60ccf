"""What the contract of language models needs: models away from their initial weights, and comparisons of states."""

import torch
from torch import Tensor

from rookery.models import create_model
from rookery.nn.language_model import LanguageModel
from rookery.registry import families, list_models
from rookery.state import State

LENGTH = 70
"""Tokens of a row: every mechanism of a -test preset is active within 64."""
CUTS = (1, 2, 7, 31, 33, 64, 69)
"""Places to cut a row of LENGTH: the first and last token, and both sides of likely chunk borders."""


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
