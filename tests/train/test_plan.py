"""Estimates of runs: it is true that …"""

import dataclasses

import pytest

from rookery.adapt.peft import attach
from rookery.adapt.state_tuning import StartState
from rookery.cli.main import main
from rookery.engine.llm import EMBEDDED
from rookery.models import create_model, load
from rookery.recipes import recipe
from rookery.train.config import overlay
from rookery.train.plan import plan


def test_parameters_and_tokens_are_those_of_the_run():
    config = recipe("tiny-test")
    model = create_model(config.model, vocab_size=256, **config.overrides)
    found = plan(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.tokens == 50 * 8 * 64


def test_the_demonstration_of_rwkv_lm_has_its_size():
    found = plan(recipe("minipile"))
    assert found.parameters == 191_025_408
    assert found.tokens == pytest.approx(1_498_226_207, rel=1e-4)


@pytest.mark.parametrize(
    "change", [{"recompute": True}, {"accumulate": 4}, {"data": {"sequence_length": 32}}, {"piece_length": 16}]
)
def test_what_saves_memory_is_seen_to(change):
    config = recipe("tiny-test")
    assert plan(overlay(config, change)).activations < 0.6 * plan(config).activations


def test_eight_bits_for_the_moments_are_counted():
    config = recipe("tiny-test")
    small = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="adamw-8bit", eps=1e-8))
    assert plan(small).weights == plan(config).weights - 6 * plan(config).parameters


def test_a_dry_run_prints_them(capsys):
    assert main(["train", "tiny-test", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "optim.lr = 0.004" in said
    assert "parameters: 162,368" in said
    assert "tokens: 25,600" in said
    assert "memory: about" in said
    assert "time: about" in said


def test_a_dry_run_says_why_it_cannot_estimate(capsys):
    assert main(["train", "digits", "--dry-run"]) == 0
    assert "no estimate: estimates are made of language models" in capsys.readouterr().err
    assert main(["finetune", "lora", "--dry-run"]) == 0
    assert "no estimate: no model to fine-tune" in capsys.readouterr().err
    assert main(["finetune", "state", "--dry-run", "--set", "base=embedded", "--set", "adapt.features=8"]) == 0
    assert "the memory of a kernel state is not estimated" in capsys.readouterr().err
    assert main(["train", "tiny-test", "--dry-run", "--set", "initial=model.pth"]) == 0
    assert "model.pth" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss", "state"])
def test_what_learns_beside_a_model_is_counted(method):
    pytest.importorskip("peft")
    config = overlay(recipe("lora"), {"base": "embedded", "adapt": {"method": method, "rank": 8}, "batch_size": 1})
    found = plan(config)
    model = load(EMBEDDED)
    if method == "state":
        assert found.trained == sum(p.numel() for p in StartState(model).parameters())
    else:
        attach(model, config.adapt)
        assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.weights == 4 * found.parameters + 16 * found.trained


def test_a_rounded_base_is_smaller():
    pytest.importorskip("peft")
    config = overlay(recipe("lora"), {"base": "embedded", "dtype": "bfloat16", "batch_size": 1})
    plain, int8, int4 = (plan(overlay(config, {"adapt": {"base": base}})).weights for base in ("", "int8", "int4"))
    assert plain > int8 > int4
