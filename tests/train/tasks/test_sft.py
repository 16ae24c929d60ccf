import numpy as np
import pytest
import torch
from support.language import randomised
from torch.nn.functional import cross_entropy

from rookery.data.jsonl import Sample
from rookery.data.packing import IGNORED, collate
from rookery.train.tasks.sft import sft_loss

FAMILIES = ("rwkv4-test", "rwkv5-test", "rwkv6-test", "rwkv7-test", "transformer-test")


def model_and_samples(name="rwkv7-test"):
    model = randomised(name)
    random = np.random.default_rng(0)
    samples = []
    for length in (7, 12, 2):
        learned = np.arange(length) >= length // 2
        samples.append(Sample(random.integers(1, model.config.vocab_size, length), learned))
    return model, samples


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_samples_equal_separate_ones(name):
    model, samples = model_and_samples(name)
    total = count = 0
    for s in samples:
        tokens = torch.from_numpy(s.tokens)[None]
        logits, _ = model(tokens[:, :-1])
        wanted = torch.from_numpy(s.learned[1:])
        total = total + cross_entropy(logits[0][wanted], tokens[0, 1:][wanted], reduction="sum")
        count += int(wanted.sum())
    torch.testing.assert_close(sft_loss(model, collate(samples)), total / count)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = sft_loss(model, batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_targets_that_are_not_learned_have_no_influence():
    """To the last bit: the last token is nobody's context, and changing it where it is masked changes nothing."""
    model, samples = model_and_samples()
    found = []
    for last in (1, 7):
        tokens, learned = samples[1].tokens.copy(), samples[1].learned.copy()
        tokens[-1], learned[-1] = last, False
        found.append(loss_and_gradients(model, collate([samples[0], Sample(tokens, learned), samples[2]])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_gradient_reaches_the_logits_of_tokens_that_are_not_learned(monkeypatch):
    model, samples = model_and_samples()
    batch, kept = collate(samples), []

    def features(*args):
        made, state = type(model).features(model, *args)
        made.retain_grad()
        kept.append(made)
        return made, state

    monkeypatch.setattr(model, "features", features)
    sft_loss(model, batch).backward()
    masked = batch.targets[0] == IGNORED
    assert (kept[0].grad[0][masked] == 0).all()
    assert (kept[0].grad[0][~masked] != 0).any(dim=-1).all()


def test_tokens_behind_the_last_learned_one_change_nothing():
    model, (long, *_) = model_and_samples()
    learned = np.zeros(len(long.tokens), bool)
    learned[3] = True
    ends = (long.tokens[4:], (long.tokens[4:] + 3) % model.config.vocab_size)
    batches = [collate([Sample(np.concatenate([long.tokens[:4], end]), learned)]) for end in ends]
    # not to the last bit: chunked kernels add and take away what comes later in the chunk
    torch.testing.assert_close(*(loss_and_gradients(model, batch) for batch in batches), rtol=1e-12, atol=1e-13)


def test_a_start_state_is_given_to_every_document():
    model, samples = model_and_samples()
    asked = []

    def start(rows):
        asked.append(rows)
        return model.init_state(rows)

    assert torch.equal(sft_loss(model, collate(samples), start=start), sft_loss(model, collate(samples)))
    assert asked == [3]
