"""Generated tasks: it is true that …"""

import numpy as np
import pytest
import torch

from rookery.data.generated import UNLABELLED, row_generator, rows
from rookery.data.passkey_text import NAMES, PasskeyText, filler, words
from rookery.data.recall import Facts, Overwrite, Passkey, Recall
from rookery.data.word_problems import WordProblem, elements, generators, index_of

TASKS = [
    Recall(),
    Recall(length=128, pairs=32, vocab_size=1024, random_filler=False),
    Recall(pairs=4, passes=2, alpha=1.0),
    Overwrite(),
    Passkey(),
    Passkey(depth=0.5, decoys=4),
    Facts(values=8),
    Facts(names=9, values=6, noise_ids=3, length=40, asked=0.0),
    PasskeyText(),
    PasskeyText(depth=0.3, needles=4, digits=3),
    WordProblem(),
    WordProblem(points=3, length=5),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_row_depends_on_seed_split_and_number_alone(task):
    tokens, labels = rows(task, seed=3, first=0, count=6)
    again = rows(task, seed=3, first=4, count=2)
    assert torch.equal(tokens[4:], again[0])
    assert torch.equal(labels[4:], again[1])
    assert not torch.equal(tokens, rows(task, seed=4, first=0, count=6)[0])
    assert not torch.equal(tokens, rows(task, seed=3, first=0, count=6, split="test")[0])


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_tokens_and_labels_are_of_the_vocabulary(task):
    tokens, labels = rows(task, seed=0, first=0, count=8)
    asked = labels[labels != UNLABELLED]
    assert tokens.shape == labels.shape == (8, task.length)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    assert 0 <= asked.min() <= asked.max() < task.vocab_size
    assert 0 < task.chance < 0.2


@pytest.mark.parametrize("task", [task for task in TASKS if isinstance(task, Recall)], ids=str)
def test_a_lookup_in_the_list_answers_every_question(task):
    tokens, labels = rows(task, seed=1, first=0, count=20)
    half, context = task.vocab_size // 2, 2 * task.pairs * task.passes
    for row, wanted in zip(tokens.numpy(), labels.numpy()):
        book = dict(zip(row[0:context:2], row[1:context:2]))
        asked = np.flatnonzero(wanted != UNLABELLED)
        assert [book[row[i]] for i in asked] == wanted[asked].tolist()
        assert len(asked) == len(book) == len(set(book.values())) == task.pairs
        assert all(key < half <= value for key, value in book.items())
        assert (asked >= context).all()
        assert (asked % 2 == 0).all()


def test_filler_changes_no_question():
    plain = rows(Recall(random_filler=False), seed=2, first=0, count=8)[1]
    assert torch.equal(plain, rows(Recall(), seed=2, first=0, count=8)[1])


def test_small_alpha_asks_soon_after_the_list():
    def distance(alpha):
        labels = rows(Recall(alpha=alpha, pairs=4), seed=0, first=0, count=200)[1]
        return float((labels != UNLABELLED).nonzero()[:, 1].double().mean())

    assert distance(0.01) < distance(1.0) - 5


def test_the_last_write_to_a_key_counts():
    task = Overwrite()
    tokens, labels = rows(task, seed=1, first=0, count=20)
    for row, wanted in zip(tokens.numpy(), labels.numpy()):
        book = dict(zip(row[0:32:2], row[1:32:2]))  # later writes replace earlier ones
        asked = np.flatnonzero(wanted != UNLABELLED)
        assert {row[i]: wanted[i] for i in asked} == book
        assert len(set(row[1:32:2])) == 16
    assert task.blind_to_order == pytest.approx(0.3, abs=0.01)


def test_blindness_to_order_costs_what_the_formula_says():
    task, hits = Overwrite(), []
    for number in range(500):
        _, who, _ = task.written(row_generator(0, "train", number))
        hits += [1 / (who == key).sum() for key in range(task.keys)]
    assert np.mean(hits) == pytest.approx(task.blind_to_order, abs=0.01)


@pytest.mark.parametrize("decoys", [0, 4])
def test_the_passkey_stands_once_and_where_it_should(decoys):
    tokens, labels = rows(Passkey(depth=0.5, decoys=decoys), seed=0, first=0, count=20)
    for row, wanted in zip(tokens.tolist(), labels.tolist()):
        assert row[126:128] == [row[-1], wanted[-1]]
        assert row.count(row[-1]) == 2
        assert row.count(wanted[-1]) == 1


def told(task, row):
    """Name -> value of the facts of a row, and how often each stands there."""
    facts = [
        divmod(token - task.names, task.values) for token in row if 0 <= token - task.names < task.names * task.values
    ]
    assert len({name for name, _ in facts}) == len(set(facts)), "one value per name"
    return dict(facts), [name for name, _ in facts]


def test_a_name_is_asked_for_after_its_fact_was_told():
    task = Facts(names=20, length=100)
    tokens, labels = rows(task, seed=0, first=0, count=10)
    for row, wanted in zip(tokens.tolist(), labels.tolist()):
        asked = [i for i in range(100) if wanted[i] != UNLABELLED]
        assert asked == [i for i in range(100) if row[i] < 20]
        assert 15 < len(asked) < 45
        for i in asked:
            assert told(task, row[:i])[0][row[i]] == wanted[i] - 20 * 5


def test_a_fact_that_is_asked_for_at_the_end_stands_once_and_where_it_should():
    task = Facts(names=20, length=100, asked=0.0, depth=0.5)
    tokens, labels = rows(task, seed=0, first=0, count=10)
    for row, wanted in zip(tokens.tolist(), labels.tolist()):
        book, names = told(task, row)
        assert names.count(row[-1]) == 1
        assert row[49] == 20 + 4 * row[-1] + book[row[-1]]
        assert wanted[-1] == 20 * 5 + book[row[-1]]
        assert wanted[:-1] == [UNLABELLED] * 99
    assert len(set(tokens[:, -1].tolist())) > 4


def test_facts_need_places():
    with pytest.raises(ValueError, match=r"told \(0.8\) above 0 and told \+ asked at most 1"):
        Facts(told=0.8)


def test_the_text_holds_its_needle_and_asks_for_it():
    task = PasskeyText(length=400, depth=0.5)
    tokens, labels = rows(task, seed=0, first=0, count=5)
    for row, wanted in zip(tokens, labels):
        text = bytes(row.tolist()).decode()
        sentence = text[text.rindex("the key of") :]
        answer = bytes(wanted[wanted != UNLABELLED].tolist()).decode()
        assert text.count(sentence) == 2
        assert sentence.endswith(answer)
        assert 100 < text.index(sentence) < 300
        assert int((wanted != UNLABELLED).nonzero()[0]) == task.length - 6


def test_filler_has_the_length_asked_for_and_no_digits():
    text = filler(1000, row_generator(0, "train", 0))
    assert len(text) == 1000
    assert not any(letter.isdigit() for letter in text)
    assert len(set(words())) == 200
    assert not {name.lower() for name in NAMES} & set(words())


def test_products_of_s5_are_those_of_matrices():
    task = WordProblem(length=7)
    tokens, labels = rows(task, seed=0, first=0, count=3)
    assert len(elements(5)) == 120
    assert len(generators(5)) == 11
    for row, wanted in zip(tokens.numpy(), labels.numpy()):
        product = np.eye(5, dtype=int)
        for token, label in zip(row, wanted):
            product = np.eye(5, dtype=int)[generators(5)[token]].T @ product
            found = product.argmax(axis=0)
            assert index_of(found) == label


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="length 20 must be even and at least 32 for 8 pairs"):
        Recall(length=20)
    with pytest.raises(ValueError, match="vocab_size 32 must be larger than length 64"):
        Recall(vocab_size=32)
    with pytest.raises(ValueError, match="16 writes to 4 keys need an even length of at least 40, got 38"):
        Overwrite(length=38)
