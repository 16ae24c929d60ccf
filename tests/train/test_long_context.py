"""Rows in pieces: it is true that …"""

import pytest
import torch

from rookery.models import create_model
from rookery.train.config import TrainConfig
from rookery.train.long_context import backward_in_pieces
from rookery.train.tasks.language import language_loss


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = create_model("rwkv7-test").double()
    for parameter in model.parameters():  # of the published values some are zero, and would hide errors
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def gradients(model, backward):
    model.zero_grad()
    loss = backward()
    return float(torch.as_tensor(loss).detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["rwkv7-test", "rwkv6-test", "transformer-test"])
@pytest.mark.parametrize("length", [1, 5, 16, 100])
def test_gradients_through_the_borders_are_those_of_whole_rows(model, family, length):
    if family != "rwkv7-test":
        model = create_model(family).double()
    rows = torch.randint(1, 60, (2, 17))
    inputs, targets = rows[:, :-1], rows[:, 1:]

    def whole():
        loss = language_loss(model, inputs, targets, 1e-3)
        (loss * 0.5).backward()
        return loss

    expected = gradients(model, whole)
    found = gradients(
        model,
        lambda: backward_in_pieces(model, inputs, targets, length, through=True, weight=0.5, l2wrap=1e-3),
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_truncated_backpropagation_carries_the_state_but_no_gradient(model):
    rows = torch.randint(1, 60, (2, 17))
    inputs, targets = rows[:, :-1], rows[:, 1:]

    def by_hand():
        state, total = None, 0.0
        for i in (0, 8):
            logits, state = model(inputs[:, i : i + 8], state)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, i : i + 8].flatten()) / 2
            loss.backward()
            total += float(loss.detach())
            state = state.detach()
        return total

    expected = gradients(model, by_hand)
    found = gradients(model, lambda: backward_in_pieces(model, inputs, targets, 8))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_pieces_and_parts_at_once_are_refused():
    with pytest.raises(ValueError, match="not both"):
        TrainConfig(piece_length=8, context_parallel=2)
