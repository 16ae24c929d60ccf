"""Exceptions: one base to catch, builtin kinds beside it, and suggestions for misspelt names."""

import pytest

from rookery import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.UnknownName, ValueError),
        (errors.BadCheckpoint, ValueError),
        (errors.BadState, ValueError),
        (errors.BackendUnavailable, RuntimeError),
        (errors.MissingDependency, ImportError),
    ],
)
def test_errors_can_be_caught_by_either_name(error, builtin):
    assert issubclass(error, errors.RookeryError)
    assert issubclass(error, builtin)


def test_a_misspelt_name_gets_the_nearest_known_one():
    error = errors.unknown("model", "rwkv7-tst", ["rwkv7-test", "transformer"], "`rookery models`")
    assert isinstance(error, errors.UnknownName)
    assert str(error) == "no model named 'rwkv7-tst'. Did you mean 'rwkv7-test'? `rookery models` shows all 2."


def test_a_name_near_nothing_gets_no_suggestion():
    error = errors.unknown("recipe", "xyz", iter(["tiny-test"]), "`rookery recipes`")
    assert str(error) == "no recipe named 'xyz'. `rookery recipes` shows all 1."
