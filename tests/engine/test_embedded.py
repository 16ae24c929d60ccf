"""The model that ships with the package writes text."""

import math

import numpy as np
import pytest

from rookery import LLM
from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.engine.llm import EMBEDDED

SENTENCE = (
    "Once upon a time, there was a big dog named Max. Max loved to play in the park with his friends. "
    "One day, he saw a small cat in a tree."
)


@pytest.fixture(scope="module")
def llm():
    return LLM(threads=1)


def test_it_is_as_small_as_promised():
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 10 << 20
    assert 3e6 <= sum(map(math.prod, open_checkpoint(EMBEDDED).shapes.values())) <= 5e6


def test_it_has_learned_english(llm):
    tokens = [0, *llm.tokenizer.encode(SENTENCE)]
    logits = llm.logits(tokens)[:-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max()).sum(axis=1, keepdims=True)) - logits.max()
    nats = -log_p[np.arange(len(tokens) - 1), tokens[1:]].sum() / len(SENTENCE)
    assert nats < 0.5  # equal chances for every piece would be about 1.8


def test_its_text_is_made_of_words_it_was_taught(llm):
    text = llm.generate("Once upon a time", max_tokens=80, seed=1)
    common = {"the", "and", "was", "to", "a", "she", "he", "they", "said", "her", "his", "in", "with"}
    words = text.lower().split()
    assert len(words) > 30
    assert len([word for word in words if word.strip('.,"!?') in common]) > len(words) / 5


def test_a_seed_gives_one_text_whatever_the_threads():
    one, two = (LLM(threads=threads).generate("The little fox", max_tokens=40, seed=7) for threads in (1, 2))
    assert one == two


def test_a_fork_goes_its_own_way(llm):
    story = llm.session()
    story.feed("Tom had a red ball.")
    branch = story.fork()
    branch.feed(" He gave it to the cat, who")
    assert story.generate(20, temperature=0) != branch.generate(20, temperature=0)
    assert story.nbytes == branch.nbytes


def test_every_row_of_its_embedding_is_a_token(llm):
    assert llm.runner.config.vocab_size == llm.tokenizer.vocab_size
