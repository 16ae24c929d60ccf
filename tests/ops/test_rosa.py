"""ROSA: every form of it finds the same, and its gradient is the finite difference over bits."""

import random

import pytest
import torch

from rookery.ops.rosa import reference, rosa, rosa_self, rosa_tokens
from rookery.ops.rosa.automaton import SuffixAutomaton
from rookery.ops.rosa.match import match


def naive(q, k, v):
    """The sentence that defines the operator, tried out length by length."""
    found = []
    for i in range(len(q)):
        answer = -1
        for m in range(i, 0, -1):
            ends = [j for j in range(m - 1, i) if k[j - m + 1 : j + 1] == q[i - m + 1 : i + 1]]
            if ends:
                answer = v[ends[-1] + 1]
                break
        found.append(answer)
    return found


def strings(alphabet, seed, length=40):
    draw = random.Random(seed)
    return [[draw.randrange(alphabet) for _ in range(length)] for _ in range(3)]


@pytest.mark.parametrize("alphabet", [2, 4, 16])
def test_definition_automaton_and_run_lengths_agree(alphabet):
    for seed in range(8):
        q, k, v = strings(alphabet, seed)
        for query, key, value in ((q, k, v), (q, q, q), (q, q, v)):
            expected = naive(query, key, value)
            assert reference.rosa_qkv(query, key, value) == expected
            automaton = SuffixAutomaton()
            assert [automaton.push(*symbols) for symbols in zip(query, key, value, strict=True)] == expected
            index = match(torch.tensor([query]), torch.tensor([key]), torch.tensor([0]), len(query))[0].tolist()
            assert [value[i] if i >= 0 else -1 for i in index] == expected
        assert rosa_tokens(torch.tensor([q])).tolist() == [reference.rosa(q)]


@pytest.mark.parametrize("start", [0, 1, 7, 38, 39, 40])
def test_a_cut_anywhere_changes_nothing(start):
    q, k, _ = (torch.tensor([s, s[::-1]]) for s in strings(2, 5))
    whole = match(q, k, torch.tensor([0, 0]), 40)
    assert torch.equal(match(q, k, torch.tensor([start, start]), 40 - start), whole[:, start:])
    uneven = match(q, k, torch.tensor([start, 3]), 37)
    assert torch.equal(uneven[0, : 40 - start], whole[0, start:][:37])
    assert torch.equal(uneven[1], whole[1, 3:])


def test_a_string_of_one_symbol_returns_the_newest():
    assert rosa_tokens(torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[-1, 0, 0, 0]]
    assert match(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0]), 4).tolist() == [[-1, 1, 2, 3]]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_retrieved_bits_are_those_of_the_definition(bits):
    q, k, v = torch.randn(3, 2, 30, 8, generator=torch.Generator().manual_seed(1))
    ones, zeros = rosa(q=q, k=k, v=v, bits=bits)
    for row in range(2):
        for group in range(8 // bits):
            place = slice(group * bits, (group + 1) * bits)
            keys = [[tuple(x[row, t, place].gt(0).tolist()) for t in range(30)] for x in (q, k, v)]
            found = reference.rosa_qkv(*keys)
            assert ones[row, :, place].bool().tolist() == [
                [bool(b) for b in f] if f != -1 else [False] * bits for f in found
            ]
            assert zeros[row, :, place].bool().tolist() == [
                [not b for b in f] if f != -1 else [False] * bits for f in found
            ]


def brute_force(tensors, which, bits, arrives, tied):
    """The gradient bit by bit from its formula; flips by giving the channel the other sign."""

    def phi(changed):
        ones, zeros = (
            rosa_self(x=changed[0], bits=bits) if tied else rosa(q=changed[0], k=changed[1], v=changed[2], bits=bits)
        )
        return (ones * arrives[0] + zeros * arrives[1]).sum()

    gradient = torch.zeros_like(tensors[which])
    for place in torch.cartesian_prod(*(torch.arange(n) for n in gradient.shape)):
        place = tuple(place.tolist())
        scores = []
        for value in (1.0, -1.0):
            changed = [x.clone() for x in tensors]
            changed[which][place] = value
            scores.append(phi(changed))
        gradient[place] = (scores[0] - scores[1]) / (2 * max(abs(float(tensors[which][place])), 1e-3))
    return gradient


@pytest.mark.parametrize("tied", [False, True], ids=["qkv", "self"])
@pytest.mark.parametrize("bits", [1, 2])
def test_the_gradient_is_the_finite_difference_over_bits(bits, tied, monkeypatch):
    monkeypatch.setattr("rookery.ops.rosa.FLIPS", 100)  # several turns
    generator = torch.Generator().manual_seed(3)
    tensors = list(torch.randn(3, 2, 7, 2, generator=generator, dtype=torch.float64))
    tensors[0][0, 2, 1] = 1e-5  # below τ
    arrives = torch.randn(2, 2, 7, 2, generator=generator, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in tensors][: 1 if tied else 3]
    ones, zeros = rosa_self(x=leaves[0], bits=bits) if tied else rosa(q=leaves[0], k=leaves[1], v=leaves[2], bits=bits)
    got = torch.autograd.grad((ones * arrives[0] + zeros * arrives[1]).sum(), leaves)
    for which, gradient in enumerate(got):
        want = brute_force(tensors, which, bits, arrives, tied)
        assert want.abs().max() > 0
        torch.testing.assert_close(gradient, want, msg=lambda m, n=which: f"d{'qkv'[n]}: {m}")


def test_channels_that_make_no_whole_symbols_are_refused():
    x = torch.ones(1, 2, 6)
    with pytest.raises(ValueError, match="bits must be 1 to 8 and divide the 6 channels, got 4"):
        rosa_self(x=x, bits=4)
    with pytest.raises(ValueError, match=r"q, k and v must be alike, got \[1, 2, 6\], \[1, 1, 6\] and \[1, 2, 6\]"):
        rosa(q=x, k=x[:, :1], v=x)
