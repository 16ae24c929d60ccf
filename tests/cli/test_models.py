import json

import pytest

from rookery.cli.models import short
from rookery.models import create_model
from rookery.registry import list_models


def test_every_name_is_listed(cli):
    code, out, _ = cli("models")
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert (code, names) == (0, list_models())


def test_a_pattern_chooses(cli):
    out = cli("models", "*-test")[1]
    assert [line.split()[0] for line in out.splitlines()[1:]] == list_models("*-test")


@pytest.mark.parametrize("name", list_models("*-test"))
def test_parameters_are_counted_as_torch_counts_them(cli, name):
    (row,) = json.loads(cli("models", "--json", name)[1])
    model = create_model(name, device="meta")
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (row["name"], row["config"]["hidden_size"]) == (name, model.config.hidden_size)


def test_a_pattern_without_a_match_is_a_failure(cli):
    code, _, err = cli("models", "gpt*")
    assert code == 1
    assert "no model's name matches 'gpt*'" in err
    assert cli("models", "--json", "gpt*")[:2] == (0, "[]\n")


def test_counts_are_short():
    counts = {7: "7", 1000: "1.0K", 41_900: "41.9K", 191_000_000: "191.0M", 13_200_000_000: "13.2B"}
    assert [short(count) for count in counts] == list(counts.values())
