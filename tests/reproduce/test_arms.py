"""Contenders are of equal size and see equal data: it is true that …"""

import pytest
import torch

from rookery.data.generated import UNLABELLED
from rookery.data.recall import Recall
from rookery.models import create_model
from rookery.reproduce.arms import Arm, Fit, accuracy, fit, labelled_loss, matched, parameters, searched, smooth
from rookery.reproduce.base import Work
from rookery.reproduce.state_tracking import wide

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 32}


def test_parameters_are_those_of_the_model():
    model = create_model("rwkv7", **SIZES)
    assert parameters("rwkv7", SIZES) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["rwkv6", "rwkv5", "transformer"])
def test_a_model_is_widened_to_the_budget(name):
    chosen = matched(name, SIZES, budget=300_000)
    assert abs(parameters(name, chosen) - 300_000) < 6_000
    assert chosen["intermediate_size"] % 8 == 0


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="rwkv7 cannot have 1000 parameters by its intermediate_size: 8 makes"):
        matched("rwkv7", SIZES, budget=1000)


def test_only_labelled_positions_count():
    model = create_model("rwkv7-test")
    tokens = torch.arange(12).view(2, 6)
    labels = torch.full_like(tokens, UNLABELLED)
    labels[0, 3], labels[1, 5] = 7, 9
    logits, _ = model(tokens)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(labelled_loss(model, tokens, labels), wanted)
    labels[0, 3], labels[1, 5] = logits[0, 3].argmax(), (logits[1, 5].argmax() + 1) % 64
    assert accuracy(model, tokens, labels) == 0.5


def test_a_model_learns_a_task_and_stops_when_it_can():
    task = Recall(vocab_size=16, length=8, pairs=1, random_filler=False)
    how = Fit(steps=400, batch_size=16, lr=1e-2, stop_at=0.9, test_every=50, test_rows=32)
    arm = Arm(name="gpt", model="transformer-test", overrides={"vocab_size": 16})
    said = []
    curve = fit(arm.create(0), lambda step: task, 0, how, said.append)
    assert curve[-1][1] >= 0.9
    assert curve[-1][0] < 400
    again = fit(arm.create(0), lambda step: task, 0, how, said.append)
    assert again == curve


def test_the_best_rate_of_the_first_seed_is_used_for_all(tmp_path):
    trained = []

    def train(arm, seed, rate):
        trained.append((seed, rate))
        return {"accuracy": 1 - abs(rate - 0.2) + seed}

    work = Work(scale="default", folder=tmp_path)
    settings = {"seeds": (0, 1), "train": train, "score": lambda part: part["accuracy"]}
    assert searched(work, Arm(name="a"), rates=(0.1, 0.2, 0.4), **settings) == (
        0.2,
        [{"accuracy": 1.0}, {"accuracy": 2.0}],
    )
    assert trained == [(0, 0.1), (0, 0.2), (0, 0.4), (1, 0.2)]
    assert searched(work, Arm(name="b"), rates=(0.3,), **settings)[0] == 0.3
    assert trained[4:] == [(0, 0.3), (1, 0.3)]


def test_running_means_look_back():
    assert smooth([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


def test_the_wide_model_differs_in_what_it_removes_alone():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16}
    stock, wider = create_model("rwkv7", seed=3, **sizes), wide(3, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), wider.state_dict().values(), strict=True))
    for model in (stock, wider):  # stock initial weights have a zero output matrix
        torch.nn.init.eye_(model.blocks[0].att.output.weight)
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(stock(tokens[:, :1])[0], wider(tokens[:, :1])[0])  # nothing to remove yet
    assert not torch.allclose(stock(tokens)[0], wider(tokens)[0])
