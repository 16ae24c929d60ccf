import math

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.data.jsonl import Preference, Sample
from rookery.train.tasks.preference import (
    References,
    collate_pairs,
    document_log_probs,
    dpo_loss,
    orpo_loss,
    shortened_pairs,
)


def model_and_pairs():
    model = randomised("rwkv7-test")
    random = np.random.default_rng(0)

    def sample(length):
        return Sample(random.integers(1, model.config.vocab_size, length), np.arange(length) >= 3)

    return model, [Preference(sample(6), sample(9)), Preference(sample(7), sample(5))]


def by_hand(model, sample):
    """ln p of the learned tokens, one token at a time."""
    total, state = 0.0, None
    for here, following, learned in zip(sample.tokens, sample.tokens[1:], sample.learned[1:]):
        logits, state = model(torch.tensor([[here]]), state)
        if learned:
            total += float(logits[0, 0].log_softmax(0)[following])
    return total


@torch.no_grad()
def hand_values(model, pairs):
    return [[by_hand(model, s) for s in (pair.chosen, pair.rejected)] for pair in pairs]


def test_log_probs_are_those_of_each_document_alone():
    model, pairs = model_and_pairs()
    sums, counts = document_log_probs(model, collate_pairs(pairs))
    values = hand_values(model, pairs)
    torch.testing.assert_close(sums, torch.tensor([values[0][0], values[1][0], values[0][1], values[1][1]]).double())
    assert counts.tolist() == [3, 4, 6, 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_papers_formula(smoothing):
    model, pairs = model_and_pairs()
    reference = torch.tensor([-3.0, -4.0, -5.0, -2.0]).double()
    found = dpo_loss(document_log_probs(model, collate_pairs(pairs))[0], reference, beta=0.5, smoothing=smoothing)
    total = right = 0.0
    for (chosen, rejected), (chosen_before, rejected_before) in zip(hand_values(model, pairs), [(-3, -5), (-4, -2)]):
        delta = (chosen - chosen_before) - (rejected - rejected_before)
        sigmoid = 1 / (1 + math.exp(-0.5 * delta))
        total += -(1 - smoothing) * math.log(sigmoid) - smoothing * math.log(1 - sigmoid)
        right += delta > 0
    assert found["loss"].item() == pytest.approx(total / 2)
    assert found["accuracy"].item() == right / 2


def test_orpo_is_the_papers_formula():
    model, pairs = model_and_pairs()
    found = orpo_loss(*document_log_probs(model, collate_pairs(pairs)), weight=0.3)
    values = hand_values(model, pairs)
    preferred = 0.0
    for (chosen, rejected), pair in zip(values, pairs):
        p, q = math.exp(chosen / pair.chosen.learned.sum()), math.exp(rejected / pair.rejected.learned.sum())
        ratio = (p / (1 - p)) / (q / (1 - q))
        preferred -= math.log(1 / (1 + 1 / ratio))
    learned = -(values[0][0] + values[1][0]) / 7
    assert found["loss"].item() == pytest.approx(learned + 0.3 * preferred / 2)


def test_orpo_is_finite_for_an_answer_that_is_certain():
    found = orpo_loss(torch.tensor([0.0, -40.0], requires_grad=True), torch.tensor([2, 2]))
    assert torch.isfinite(found["loss"])


def test_a_model_that_is_its_own_reference_has_no_preference(tmp_path):
    model, pairs = model_and_pairs()
    references = References.of_model(model, pairs, tmp_path / "reference.safetensors")
    found = dpo_loss(document_log_probs(model.float(), collate_pairs(pairs))[0], references.of([0, 1]))
    assert found["loss"].item() == pytest.approx(math.log(2), abs=1e-4)


def test_references_are_computed_once(tmp_path, monkeypatch):
    model, pairs = model_and_pairs()
    path = tmp_path / "reference.safetensors"
    first = References.of_model(model, pairs, path)
    monkeypatch.setattr("rookery.train.tasks.preference.document_log_probs", None)
    assert torch.equal(References.of_model(model, pairs, path).log_probs, first.log_probs)
    with pytest.raises(TypeError):  # other pairs: these are computed anew
        References.of_model(model, pairs[::-1], path)


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_training_raises_the_preference(kind):
    model, pairs = model_and_pairs()
    batch = collate_pairs(pairs)
    reference = document_log_probs(model, batch)[0].detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    margins = []
    for _ in range(8):
        sums, counts = document_log_probs(model, batch)
        found = dpo_loss(sums, reference) if kind == "dpo" else orpo_loss(sums, counts, 1.0)
        margins.append(found["margin"].item())
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert margins[-1] > margins[0]


def test_pairs_that_are_too_long_are_left_out_whole():
    _, pairs = model_and_pairs()
    kept, left_out = shortened_pairs(pairs, 6)
    assert kept == [pairs[1]]
    assert left_out == 1
