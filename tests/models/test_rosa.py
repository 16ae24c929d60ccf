"""The trained ROSA models give the answers that the published scripts print (core.md 4.2)."""

import random

import pytest
import torch
from support.data import shared
from support.language import LENGTH, assert_close, assert_same_state, randomised, some_tokens

import rookery
from rookery.families.rosa import RosaConfig
from rookery.models import create_model
from rookery.ops.rosa import rosa_self, rosa_tokens

DIGITS = "0123456789+-="
WIDTH = 129
"""Characters of a row."""


def problems(most_digits):
    """Sums and differences of numbers of up to `most_digits` digits as (question, answer), one list per length."""
    draw = random.Random(42)

    def number(digits):
        return draw.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)

    for most in range(1, most_digits + 1):
        found = []
        for i in range(1, 2 * most):
            left, right = (i, most) if i <= most else (most, 2 * most - i)
            a, b = number(left), number(right)
            sign = draw.choice("+-")
            found.append((f"{a}{sign}{b}", str(a + b if sign == "+" else a - b)))
        yield found


@torch.no_grad()
def right_digits(model, pairs):
    """How many characters of the answers the model predicts, and how many there are."""
    rows = torch.tensor([[DIGITS.index(c) for c in f"{q}={a}".ljust(WIDTH, "=")] for q, a in pairs])
    predicted = model(rows[:, :-1])[0].argmax(dim=-1)
    right = total = 0
    for row, guess, (question, answer) in zip(rows, predicted, pairs, strict=True):
        place = slice(len(question), len(question) + len(answer))
        right += int((guess[place] == row[1:][place]).sum())
        total += len(answer)
    return right, total


def running_counts(most_digits):
    model = rookery.load(shared("models/rosa/251024_rosaQKV_L2_digit20.pth"))
    right = total = 0
    counts = []
    for pairs in problems(most_digits):
        more = right_digits(model, pairs)
        right, total = right + more[0], total + more[1]
        counts.append((right, total))
    return counts


@pytest.mark.data
def test_the_arithmetic_model_makes_the_published_mistakes_on_short_numbers():
    assert [f"{q}={a}" for pairs in problems(3) for q, a in pairs][:6] == [
        *("1-0=1", "3+38=41", "23+96=119", "85+6=91", "0+195=195", "39+617=656"),
    ]
    assert running_counts(5) == [(0, 1), (7, 8), (21, 23), (48, 55), (94, 102)]


@pytest.mark.data
@pytest.mark.slow
def test_the_arithmetic_model_makes_the_published_mistakes_on_twenty_digits():
    counts = running_counts(20)
    assert counts[9] == (720, 741)
    assert counts[19] == (5482, 5635)
    # what the script prints: it adds up running counts
    assert tuple(map(sum, zip(*counts, strict=True))) == (30583, 31554)


@pytest.mark.data
@torch.no_grad()
def test_the_counting_model_of_two_bit_retrievals_makes_the_published_mistakes():
    weights = torch.load(shared("models/rosa/251016_rosa_1bit_run.pth"), map_location="cpu", weights_only=True)
    rows = []
    for size in range(1, 6):
        text, n = "", int(3.5**size)
        while len(text) < 128:
            text, n = f"{text}A{n}", n + 1
        rows.append([10 if c == "A" else int(c) for c in text[:128]])
    tokens = torch.tensor(rows)
    read, expected = tokens[:, :-1], tokens[:, 1:]
    copied = rosa_tokens(read)
    assert (copied == expected).sum(dim=1).tolist() == [31, 36, 35, 55, 53]

    def retrieved(x, layer):
        ones, zeros = rosa_self(x=x)
        return ones * weights[f"rosa{layer}.emb1"] + zeros * weights[f"rosa{layer}.emb0"]

    nothing = torch.zeros(1, 32)  # the last row, which −1 means
    x = weights["e.weight"][read] + torch.cat([weights["emb_rosa.emb.weight"], nothing])[copied]
    x = x + retrieved(x, 1)
    x = x + torch.nn.functional.linear(x, weights["lin.weight"], weights["lin.bias"])
    x = x + retrieved(x, 2)
    predicted = torch.nn.functional.linear(x, weights["o.weight"], weights["o.bias"]).argmax(dim=-1)
    assert (predicted == expected).sum(dim=1).tolist() == [119, 122, 115, 110, 101]


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 33])
def test_four_bit_symbols_may_be_cut_anywhere(cut):
    model = randomised("rosa-4bit-test")
    tokens = some_tokens(model, 2, LENGTH)
    whole, after = model(tokens)
    first, state = model(tokens[:, :cut])
    second, state = model(tokens[:, cut:], state)
    assert_close(torch.cat([first, second], dim=1), whole, "logits")
    assert_same_state(state, after)


@torch.no_grad()
def test_the_number_of_bits_changes_what_is_retrieved():
    one, four = randomised("rosa-test"), create_model("rosa-4bit-test").double()
    four.load_state_dict(one.state_dict())
    tokens = some_tokens(one, 1, LENGTH)
    assert not torch.allclose(one(tokens)[0], four(tokens)[0])


def test_bits_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"bits \(4\) must be 1 to 8 and divide hidden_size \(30\)"):
        RosaConfig(hidden_size=30, bits=4)
