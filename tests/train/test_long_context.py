"""Rows in pieces: it is true that …"""

import pytest
import torch

from rookery.adapt.state_tuning import StartState
from rookery.data.packing import IGNORED, PackedBatch
from rookery.models import create_model
from rookery.recipes import recipe
from rookery.train.config import TrainConfig, overlay
from rookery.train.long_context import backward_documents_in_pieces, backward_in_pieces, document_pieces
from rookery.train.parallel import Place
from rookery.train.tasks.language import check_pieces, language_loss
from rookery.train.tasks.sft import sft_loss


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


LENGTHS = (3, 17, 9, 1)


@pytest.fixture
def documents():
    """Documents of `LENGTHS`; the first tokens of the second and all of the first are not learned."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    tokens = torch.randint(1, 60, (1, int(ends[-1])))
    targets = torch.randint(1, 60, tokens.shape)
    targets[:, :9] = IGNORED
    return PackedBatch(tokens, targets, ends)


@pytest.mark.parametrize("length", [1, 4, 8, 100])
def test_gradients_through_the_borders_are_those_of_whole_documents(model, documents, length):
    start = StartState(model)
    expected = gradients(model, lambda: backwarded(sft_loss(model, documents, 1e-3, start)))
    wanted = [p.grad.clone() for p in start.parameters()]
    start.zero_grad()

    def in_pieces():
        settings = {"through": True, "weight": 0.5, "l2wrap": 1e-3}
        return backward_documents_in_pieces(model, documents, length, start, **settings)

    found = gradients(model, in_pieces)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for parameter, grad in zip(start.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-6, atol=1e-9)


def backwarded(loss):
    (loss * 0.5).backward()
    return loss


def test_documents_in_pieces_have_the_loss_of_whole_ones(model, documents):
    whole = float(sft_loss(model, documents).detach())
    found = gradients(model, lambda: backward_documents_in_pieces(model, documents, 4))
    assert found[0] == pytest.approx(whole, rel=1e-6)
    borders = [piece.cu_seqlens.diff().tolist() for piece in document_pieces(documents, 8)]
    assert borders == [[3, 8, 8, 1], [8, 1], [1]]
    assert [piece.rows for piece in document_pieces(documents, 8)] == [None, [1, 2], [0]]


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
    with pytest.raises(ValueError, match="piece_length is for models that learn text"):
        overlay(recipe("forecast"), {"piece_length": 8})


def test_documents_in_pieces_are_refused_on_several_processes(monkeypatch):
    monkeypatch.setattr("rookery.train.tasks.language.Place.here", lambda: Place(world=2))
    with pytest.raises(ValueError, match="several processes cannot read documents in pieces"):
        check_pieces(TrainConfig(piece_length=8))
