import math

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.evaluate import perplexity as module
from rookery.evaluate.perplexity import file_texts, perplexity
from rookery.evaluate.positions import by_octave, loss_by_position, plot_loss_by_position, rows_of
from rookery.tokenizers import load_tokenizer
from rookery.tokenizers.blocks import tokens_of

BYTES = load_tokenizer("bytes")
TEXT = "Ein süßer Käse – and a quick brown fox. " * 9


def model_of(name="rwkv7-test", vocab_size=256):
    model = randomised(name, vocab_size=vocab_size)
    return model.eval()


@torch.no_grad()
def nats_of(model, inputs, targets):
    logits, _ = model(torch.tensor([inputs]))
    log_probs = logits[0, -len(targets) :].float().log_softmax(-1)
    return -float(log_probs.gather(1, torch.tensor(targets)[:, None]).double().sum())


def test_a_carried_state_gives_the_loss_of_the_whole_text(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 37)
    model, tokens = model_of(), BYTES.encode(TEXT)
    found = perplexity(model, BYTES, [TEXT])
    assert found.nats == pytest.approx(nats_of(model, [0, *tokens[:-1]], tokens), rel=1e-6)
    assert found.tokens == found.bytes == len(TEXT.encode())
    assert found.bits_per_byte == pytest.approx(found.nats / len(TEXT.encode()) / math.log(2))
    assert found.per_token == pytest.approx(math.exp(found.nats / found.tokens))


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (10, 3), (5000, 100)])
def test_a_sliding_window_predicts_every_token_once_from_the_window_before_it(window, stride):
    model, tokens = model_of("transformer-test"), BYTES.encode(TEXT)[:63]
    found = perplexity(model, BYTES, [BYTES.decode(tokens)], mode="sliding", window=window, stride=stride)
    known, total, at = [0, *tokens], 0.0, 0
    while at < len(tokens):
        new = min(window if at == 0 else stride, len(tokens) - at)
        total += nats_of(model, known[max(0, at + new - window) : at + new], tokens[at : at + new])
        at += new
    assert found.nats == pytest.approx(total, rel=1e-6)
    assert found.tokens == len(tokens)


def test_texts_are_independent():
    model = model_of()
    together = perplexity(model, BYTES, ["abc", "defg"])
    apart = [perplexity(model, BYTES, [text]) for text in ("abc", "defg")]
    assert together.nats == pytest.approx(sum(p.nats for p in apart))
    assert together.bytes == 7


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_blocks_give_the_tokens_of_the_whole(name, monkeypatch):
    """Also where a block ends inside a character or a word."""
    monkeypatch.setattr("rookery.tokenizers.blocks.LONGEST_TOKEN", 130)
    tokenizer, data = load_tokenizer(name), (TEXT * 4).encode()
    blocks = [data[i : i + 301] for i in range(0, len(data), 301)]
    found = list(tokens_of(blocks, tokenizer))
    assert [token for tokens, _ in found for token in tokens] == tokenizer.encode(TEXT * 4)
    assert sum(size for _, size in found) == len(data)
    assert len(found) > 1


def test_files_are_read_as_their_ending_says(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert b"".join(*file_texts(tmp_path / "a.txt")) == TEXT.encode()
    assert list(file_texts(tmp_path / "b.jsonl")) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match=r"there is no text file '.*nothing.txt'"):
        list(file_texts(tmp_path / "nothing.txt"))


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="there is no text to predict"):
        perplexity(model_of(), BYTES, [""])
    with pytest.raises(ValueError, match=r"stride must lie in 1…16"):
        perplexity(model_of(), BYTES, ["x"], mode="sliding", window=16, stride=17)


def test_losses_by_position_are_those_of_the_whole_rows():
    model = model_of()
    inputs, targets = rows_of(np.array(BYTES.encode(TEXT * 2)), length=100, rows=4)
    found = loss_by_position(model, inputs, targets, batch=3, chunk=33)
    rows = zip(inputs.tolist(), targets.tolist(), strict=True)
    assert float(found.sum()) == pytest.approx(np.mean([nats_of(model, *row) for row in rows]), rel=1e-6)
    stretches = by_octave(found)
    assert sum((s.last - s.first + 1) * s.nats for s in stretches) == pytest.approx(float(found.sum()))
    assert (stretches[0].first, stretches[-1].last) == (0, 99)
    with pytest.raises(ValueError, match="too few for a row of 5000"):
        rows_of(np.arange(100), 5000, 2)


def test_losses_by_position_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot_loss_by_position({"tiny": np.linspace(3, 2, 100)}, tmp_path / "loss.png", trained_length=50)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
