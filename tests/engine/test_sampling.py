from collections import Counter

import numpy as np
import pytest

from rookery.engine.sampling import Sampler, Sampling, distribution, draw, logprobs_of, uniform


def official(logits, *, temperature, top_p, top_k=0):
    """The official pipeline after the penalties, word for word in float64: token -> probability (core.md 3.5)."""
    probs = np.exp(logits.astype(np.float64) - logits.max())
    probs /= probs.sum()
    if temperature == 0:
        temperature, top_p = 1.0, 0.0
    ranked = np.sort(probs)[::-1]
    cutoff = ranked[np.argmax(np.cumsum(ranked) >= top_p)] if top_p < 1 else 0
    ids = np.argsort(probs, kind="stable")
    probs[probs < cutoff] = 0
    if 0 < top_k < len(probs):
        probs[ids[:-top_k]] = 0
    probs = probs ** (1 / temperature)
    return probs / probs.sum()


def logits_of(name, vocab=5000):
    rng = np.random.default_rng(3)
    noise = rng.standard_normal(vocab)
    shapes = {
        "peaked": noise * 4,
        "flat": noise * 0.05,
        "ranked": -1.2 * np.log(1 + np.arange(vocab)) + 0.3 * noise,
        "one": np.where(np.arange(vocab) == 7, 200.0, noise),
    }
    return shapes[name].astype(np.float32)


# the cuts lie where float32 and float64 agree: a sum that rounds to the other side of top_p moves the cut by one token
@pytest.mark.parametrize("top_k", [0, 1, 5, 2000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.5, 0.85, 0.97, 1.0])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7])
@pytest.mark.parametrize("shape", ["peaked", "flat", "ranked", "one"])
def test_the_distribution_is_the_official_one(shape, temperature, top_p, top_k):
    logits = logits_of(shape)
    want = official(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    tokens, probabilities = distribution(logits, Sampling(temperature=temperature, top_p=top_p, top_k=top_k))
    got = np.zeros(len(logits))
    got[tokens] = probabilities
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-4)
    assert np.all(np.diff(tokens) > 0)


@pytest.mark.parametrize("size", [3, 1024, 1025, 5000])
def test_tokens_tied_at_the_cut_all_survive(size):
    logits = np.zeros(size, np.float32)
    logits[1] = 5
    tokens, probabilities = distribution(logits, Sampling(top_p=0.99999))
    assert len(tokens) == size
    np.testing.assert_allclose(probabilities.sum(), 1)
    assert list(distribution(logits, Sampling(top_p=0.01))[0]) == [1]


@pytest.mark.parametrize("size", [10, 70000])
def test_equal_logits_everywhere_cut_nothing(size):
    tokens, _ = distribution(np.full(size, 2.5, np.float32), Sampling(top_p=0.1))
    assert len(tokens) == size


def test_top_k_keeps_lower_ids_among_equals():
    logits = np.array([0, 1, 1, 2, 1], np.float32)
    assert list(distribution(logits, Sampling(top_p=1, top_k=2))[0]) == [1, 3]
    assert list(distribution(logits, Sampling(top_p=1, top_k=99))[0]) == [0, 1, 2, 3, 4]


def test_min_p_is_relative_to_the_likeliest():
    logits = np.log(np.array([0.5, 0.3, 0.1, 0.1], np.float32))
    assert list(distribution(logits, Sampling(top_p=1, min_p=0.5))[0]) == [0, 1]
    assert list(distribution(logits, Sampling(top_p=1, min_p=1))[0]) == [0]


def test_temperature_comes_after_the_cut():
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    tokens, probabilities = distribution(logits, Sampling(top_p=0.5, temperature=100))
    assert (list(tokens), list(probabilities)) == ([0], [1.0])


def test_a_very_low_temperature_does_not_underflow():
    logits = np.log(np.array([0.35, 0.35, 0.3], np.float32))
    _, probabilities = distribution(logits, Sampling(top_p=1, temperature=0.001))
    np.testing.assert_allclose(probabilities, [0.5, 0.5, 0], atol=1e-12)


def test_temperature_zero_takes_the_likeliest_and_the_lowest_id_on_a_tie():
    logits = np.array([0, 3, 1, 3], np.float32)
    for seed in range(20):
        assert Sampler(Sampling(temperature=0, top_p=1), seed).next(logits) == 1
    tokens, probabilities = distribution(logits, Sampling(temperature=0))
    assert (list(tokens), list(probabilities)) == ([1], [1.0])


def test_top_p_zero_draws_among_the_likeliest():
    logits = np.array([0, 3, 1, 3], np.float32)
    sampler = Sampler(Sampling(top_p=0), 5)
    assert {sampler.next(logits) for _ in range(100)} == {1, 3}


def test_banned_tokens_are_never_chosen():
    logits = np.array([0, 3, 1], np.float32)
    assert Sampler(Sampling(temperature=0, banned=(1,)), 0).next(logits) == 2
    assert logits[1] == 3  # the caller's array is left alone


def penalised(pieces, tokens, **sampling):
    """Logits of 0 after the penalties for `tokens`, by the official loop over a dictionary; and by ours."""
    options = Sampling(**sampling)
    occurrence: dict[int, float] = {}
    sampler = Sampler(options, 0, pieces.__getitem__)
    zeros = np.zeros(len(pieces), np.float32)
    for token in tokens:
        sampler._adjusted(zeros)
        sampler.accept(token)
        for known in occurrence:
            occurrence[known] *= options.penalty_decay
        free = pieces[token].decode() in " \t0123456789"
        occurrence[token] = occurrence.get(token, 0) + (0 if free else 1)
    want = np.zeros(len(pieces))
    for token, count in occurrence.items():
        want[token] -= options.presence_penalty + count * options.frequency_penalty
    return sampler._adjusted(zeros), want


@pytest.mark.parametrize("sizes", [(0.2, 0.2), (0.5, 0.0), (0.0, 0.7), (-0.3, 0.1)])
def test_penalties_follow_the_official_loop(sizes):
    pieces = [b"", b"a", b"12", b" ", b"b c", b"13"]
    got, want = penalised(
        pieces, [1, 1, 2, 0, 3, 4, 1, 5, 5], presence_penalty=sizes[0], frequency_penalty=sizes[1], penalty_decay=0.9
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_digits_and_spaces_pay_for_presence_alone():
    pieces = [b"x", b"12", b"13", b"", b" \t"]
    got, _ = penalised(pieces, [0, 1, 2, 3, 4], presence_penalty=0.25, frequency_penalty=1.0, penalty_decay=1.0)
    # "13" does not stand in " \t0123456789", so it counts; the empty piece does
    np.testing.assert_allclose(got, [-1.25, -0.25, -1.25, -0.25, -0.25])


def test_without_token_bytes_every_token_counts():
    sampler = Sampler(Sampling(frequency_penalty=1.0), 0)
    sampler.next(np.zeros(3, np.float32))
    sampler.accept(2)
    np.testing.assert_allclose(sampler._adjusted(np.zeros(3, np.float32)), [0, 0, -1])


def test_a_draw_depends_on_seed_and_step_alone():
    logits = logits_of("flat")
    whole = Sampler(Sampling(top_p=1), 11)
    tokens = [whole.next(logits) for _ in range(8)]
    later = Sampler(Sampling(top_p=1), 11, step=5)
    assert [later.next(logits) for _ in range(3)] == tokens[5:]
    other = Sampler(Sampling(top_p=1), 12)
    assert [other.next(logits) for _ in range(8)] != tokens


def test_the_random_stream_is_pinned():
    # figures of an independent SplitMix64; a change here breaks every seed that users have written down
    def reference(seed, count):
        mask = 2**64 - 1

        def mix(z):
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            return z ^ (z >> 31)

        state, numbers = mix(seed & mask), []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            numbers.append((mix(state) >> 11) / 2**53)
        return numbers

    for seed in (0, 1, -1, 2**80 + 3):
        assert [uniform(seed, step) for step in range(5)] == reference(seed, 5)
    assert f"{uniform(7, 0):.12f}" == "0.524345941678"


def test_draws_follow_the_probabilities():
    probabilities = np.array([0.1, 0.0, 0.6, 0.3])
    n = 20000
    counts = Counter(draw(probabilities, uniform(3, step)) for step in range(n))
    assert counts[1] == 0
    for index, p in enumerate(probabilities):
        assert abs(counts[index] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1e-9


def test_a_draw_never_leaves_the_list():
    thirds = np.full(3, 1 / 3)
    assert draw(thirds, 0.0) == 0
    assert draw(thirds, 1 - 2**-53) == 2


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("temperature", -0.1, "0 or more"),
        ("top_p", 1.5, "between 0 and 1"),
        ("top_p", float("nan"), "between 0 and 1"),
        ("top_k", -1, "0 or more"),
        ("min_p", 2, "between 0 and 1"),
        ("penalty_decay", -1, "between 0 and 1"),
    ],
)
def test_settings_outside_their_range_are_refused(name, value, limits):
    with pytest.raises(ValueError, match=f"{name} must be {limits}, got {value}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(temperature, bad):
    with pytest.raises(ValueError, match="no token can be chosen"):
        Sampler(Sampling(temperature=temperature), 0).next(np.array([0, bad, 1], np.float32))


@pytest.mark.parametrize("temperature", [0, 1])
def test_banning_every_token_is_refused(temperature):
    with pytest.raises(ValueError, match="every token is banned"):
        Sampler(Sampling(temperature=temperature, banned=(0, 1)), 0).next(np.zeros(2, np.float32))


def test_typical_keeps_what_carries_as_much_as_expected():
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = np.log(probabilities).astype(np.float32)
    entropy = -(probabilities * np.log(probabilities)).sum()
    order = np.argsort(np.abs(-np.log(probabilities) - entropy))
    for typical_p in (0.1, 0.3, 0.55, 0.9):
        count = int(np.searchsorted(np.cumsum(probabilities[order]), typical_p)) + 1
        kept, _ = distribution(logits, Sampling(top_p=1, typical_p=typical_p))
        assert list(kept) == sorted(order[:count])
    assert len(distribution(logits, Sampling(top_p=1))[0]) == 5
    many = logits_of("ranked", 20_000)
    weights = np.exp(many.astype(np.float64) - many.max())
    weights /= weights.sum()
    order = np.argsort(np.abs(-np.log(weights) + (weights * np.log(weights)).sum()), kind="stable")
    for typical_p in (0.05, 0.7, 0.999):
        count = int(np.searchsorted(np.cumsum(weights[order]), typical_p)) + 1
        kept, _ = distribution(many, Sampling(top_p=1, typical_p=typical_p))
        assert abs(len(kept) - count) <= 1 + count // 1000  # float32 and float64 may part by a token at the cut
        assert len({*kept} - {*order[: count + 20]}) == 0
    # 0.3 is the most typical, and top_p leaves the likeliest alone: one token must stay
    assert list(distribution(logits, Sampling(top_p=0.1, typical_p=0.1))[0]) == [0]
    with pytest.raises(ValueError, match="typical_p must be between 0 and 1, got 2"):
        Sampling(typical_p=2)


def test_a_bias_is_added_to_the_logits():
    logits = np.zeros(4, np.float32)
    greedy = Sampling(temperature=0, logit_bias={2: 1.0, 3: 0.5})
    assert Sampler(greedy, 0).next(logits) == 2
    assert Sampler(Sampling(temperature=0, logit_bias={0: float("-inf"), 1: -1.0}), 0).next(logits) == 2
    assert not logits.any()
    with pytest.raises(ValueError, match="the logit bias of token 3 must be a number, got inf"):
        Sampling(logit_bias={3: float("inf")})


def test_log_probabilities_are_the_models_own():
    logits = np.log(np.array([0.5, 0.125, 0.125, 0.25], np.float32)) + 3
    told = logprobs_of(logits, 1, 3)
    assert told.token == 1
    np.testing.assert_allclose(told.logprob, np.log(0.125), rtol=1e-6)
    assert [token for token, _ in told.top] == [0, 3, 1]
    np.testing.assert_allclose([p for _, p in told.top], np.log([0.5, 0.25, 0.125]), rtol=1e-6)
    assert logprobs_of(logits, 0, 0).top == ()
    assert len(logprobs_of(logits, 0, 99).top) == 4
