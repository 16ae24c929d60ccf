"""The head in two levels (oracles of RWKV-Lite's fourth technique) and the cache of embedding rows (its third)."""

import math

import pytest
import torch
from torch import nn

from rookery.compress.embedding import hit_rate
from rookery.compress.hierarchical_head import HierarchicalHead, cluster, train_first

VOCAB, WIDTH, CLUSTERS = 90, 12, 7


def parts(seed=0):
    torch.manual_seed(seed)
    head, first = nn.Linear(WIDTH, VOCAB, bias=False), nn.Linear(WIDTH, CLUSTERS, bias=False)
    labels = torch.cat([torch.arange(CLUSTERS), torch.randint(CLUSTERS, (VOCAB - CLUSTERS,))])
    with torch.no_grad():
        head.weight.mul_(5)
        first.weight.mul_(6)
    return head.requires_grad_(False), first.requires_grad_(False), labels


def two_levels(mass=0.6, fewest=1, most=3):
    return HierarchicalHead(*parts(), mass=mass, fewest=fewest, most=most)


@pytest.fixture
def x():
    return torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5))


def test_with_all_clusters_it_is_the_whole_head(x):
    head = two_levels(fewest=CLUSTERS, most=CLUSTERS)
    assert torch.equal(head(x), head.head(x))
    assert torch.equal(two_levels(mass=1.0, most=CLUSTERS)(x), head.head(x))


def test_each_cluster_left_out_has_its_guessed_probability(x):
    head = two_levels()
    p = head(x).double().softmax(-1)
    torch.testing.assert_close(p.sum(-1), torch.ones(40, dtype=torch.float64))
    chosen, log_p = head.chosen(x)
    by_cluster = torch.zeros(40, CLUSTERS, dtype=torch.float64).index_add_(1, head.labels, p)
    torch.testing.assert_close(by_cluster[~chosen], log_p.exp()[~chosen], atol=1e-6, rtol=1e-5)
    for c in range(CLUSTERS):  # all its tokens alike
        inside = p[~chosen[:, c]][:, head.labels == c]
        torch.testing.assert_close(inside, inside.mean(-1, keepdim=True).expand_as(inside), atol=1e-9, rtol=1e-5)


def test_among_chosen_tokens_nothing_changes(x):
    head = two_levels()
    exact = head.chosen(x)[0][:, head.labels]
    of_whole = head.head(x).masked_fill(~exact, -math.inf).softmax(-1)
    torch.testing.assert_close(head(x).masked_fill(~exact, -math.inf).softmax(-1), of_whole)


def test_clusters_are_chosen_until_their_mass_is_reached(x):
    head = two_levels(mass=0.6, fewest=1, most=CLUSTERS)
    chosen, log_p = head.chosen(x)
    for picked, p in zip(chosen, log_p.exp()):
        inside = p[picked].sort().values
        assert inside.sum() >= 0.6
        assert inside[1:].sum() < 0.6
    assert set(two_levels(mass=1e-9, fewest=3).chosen(x)[0].sum(-1).tolist()) == {3}
    assert two_levels(mass=1.0, most=2).chosen(x)[0].sum(-1).max() == 2


def test_sums_of_guesses_that_never_reach_the_mass_choose_all(x):
    # rounding: a mass of one is reached by all clusters or, in rounded sums, never
    assert set(two_levels(mass=1.0, fewest=1, most=CLUSTERS).chosen(x)[0].sum(-1).tolist()) == {CLUSTERS}


def test_the_first_level_learns_what_the_whole_head_says(x):
    head, _, labels = parts()
    features = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(6))
    first = train_first(head, labels, features, steps=60, batch=128, lr=5e-2)

    def divergence(level):
        truth = torch.zeros(40, CLUSTERS).index_add_(1, labels, head(x).softmax(-1))
        return nn.functional.kl_div(level(x).log_softmax(-1), truth, reduction="batchmean").item()

    untrained = train_first(head, labels, features, steps=0)
    assert divergence(first) < 0.5 * divergence(untrained)
    # for another model it is worse than for its own: it must be trained again
    moved = nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(False)
    moved.weight.data = head.weight.flip(0).clone()
    stale = torch.zeros(40, CLUSTERS).index_add_(1, labels, moved(x).softmax(-1))
    assert nn.functional.kl_div(first(x).log_softmax(-1), stale, reduction="batchmean") > 2 * divergence(first)


def test_clusters_bring_together_what_is_close():
    torch.manual_seed(0)
    centres = torch.randn(5, 16) * 10
    wanted = torch.arange(200) % 5
    labels = cluster(centres[wanted] + torch.randn(200, 16), 5, seed=1)
    assert labels.max() == 4
    assert all(len(labels[wanted == c].unique()) == 1 for c in range(5))


def test_empty_clusters_are_dropped_and_numbers_have_no_gaps():
    rows = torch.randn(3, 8).repeat(20, 1)  # rows of a vocabulary that nobody uses are alike
    labels = cluster(rows, 10)
    assert labels.unique().tolist() == [0, 1, 2]


def test_no_cluster_is_larger_than_allowed():
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(80, 6) * 0.01, torch.randn(20, 6) * 9])
    assert torch.bincount(cluster(rows, 10)).max() > 30
    assert torch.bincount(cluster(rows, 10, largest=1.5)).max() <= 15
    assert torch.equal(cluster(rows, 10, seed=3), cluster(rows, 10, seed=3))


def test_numbers_of_clusters_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="101 clusters of 100 tokens"):
        cluster(torch.randn(100, 4), 101)
    with pytest.raises(ValueError, match="leaves no room"):
        cluster(torch.randn(100, 4), 5, largest=0.5)


def test_a_larger_cache_never_answers_less():
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand(3000, generator=generator) ** 3 * 60).long().tolist()
    rates = [hit_rate(tokens, capacity) for capacity in range(1, 61)]
    assert rates == sorted(rates)
    assert rates[-1] == 1 - len(set(tokens)) / len(tokens)
    assert hit_rate([1, 2, 1, 3, 1], 2) == pytest.approx(0.4)  # 1 stays, as it was used
    assert hit_rate([1, 2, 1, 3, 1], 2, "fifo") == pytest.approx(0.2)
    with pytest.raises(ValueError, match="1 row or more"):
        hit_rate([1], 0)
