"""A head in two levels: first which clusters of tokens are likely, then exact logits for the tokens of those alone.

RWKV-Lite, arXiv 2412.10856. The tokens of each remaining cluster share its guessed probability equally, so that
probabilities still add up to one and no token is impossible.
"""

import math

import torch
from torch import Tensor, nn

# v tokens of the vocabulary, c width, k clusters


class HierarchicalHead(nn.Module):
    """Logits [..., v] of features [..., c]; here all of them are computed and most are replaced."""

    labels: Tensor
    """int64 [v]: a token's cluster"""

    def __init__(
        self, head: nn.Linear, first: nn.Linear, labels: Tensor, *, mass: float, fewest: int, most: int
    ) -> None:
        super().__init__()
        self.head, self.first = head, first
        self.mass, self.fewest, self.most = mass, fewest, most
        self.register_buffer("labels", labels)

    @property
    def sizes(self) -> Tensor:
        """int64 [k]: tokens of each cluster."""
        return torch.bincount(self.labels, minlength=self.first.out_features)

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """bool [..., k], which clusters are computed, and their guessed log probabilities [..., k]."""
        log_p = self.first(x).double().log_softmax(-1)
        order = log_p.argsort(dim=-1, descending=True, stable=True)
        sums = log_p.exp().gather(-1, order).cumsum(-1)
        # as many as it takes to reach the mass, the last of them included
        count = (sums < self.mass).sum(-1, keepdim=True) + 1
        count = count.clamp(min=self.fewest).clamp(max=min(self.most, log_p.shape[-1]))
        ranks = torch.arange(log_p.shape[-1], device=x.device).expand_as(order)
        return torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, order, ranks < count), log_p

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x)
        chosen, log_p = self.chosen(x)
        exact = chosen[..., self.labels]
        of_chosen = logits.double().masked_fill(~exact, -math.inf).logsumexp(-1, keepdim=True)
        mass = log_p.masked_fill(~chosen, -math.inf).logsumexp(-1, keepdim=True)
        shared = of_chosen - mass + log_p - self.sizes.double().log()
        return torch.where(exact, logits, shared[..., self.labels].to(logits.dtype))


@torch.no_grad()
def cluster(
    embedding: Tensor, clusters: int, *, components: int = 200, seed: int = 0, rounds: int = 25, largest: float = 0.0
) -> Tensor:
    """int64 [v]: a cluster for each row of `embedding` [v, c], by k-means on its principal components.

    Clusters are numbered without gaps: those that end empty are dropped. `largest`, in multiples of v / clusters, is
    the most that one may hold (0: any number); a giant cluster spares no work. ValueError for more clusters than rows.
    """
    rows = len(embedding)
    if not 1 <= clusters <= rows:
        raise ValueError(f"{clusters} clusters of {rows} tokens; give 1 to {rows}")
    if largest and largest < 1:
        raise ValueError(f"largest={largest} leaves no room for all tokens; give 1 or more, or 0 for any size")
    points = _principal(embedding.float(), components)
    generator = torch.Generator().manual_seed(seed)
    centres = _spread(points, clusters, generator)
    labels = torch.zeros(rows, dtype=torch.int64)
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(8192)])
        if torch.equal(nearest, labels):
            break
        labels = nearest
        counts = torch.bincount(labels, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    if largest:
        labels = _with_room(torch.cdist(points, centres), math.ceil(largest * rows / clusters))
    return torch.unique(labels, return_inverse=True)[1]


def _principal(rows: Tensor, components: int) -> Tensor:
    """The rows' principal components [v, min(c, components)]."""
    centred = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, -min(components, rows.shape[1]) :]


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres to begin with, far from each other (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count:
        if float(distance.sum()) <= 0:  # the rest repeats rows that are centres already
            return points[chosen]
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        distance = torch.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
    return points[chosen]


def _with_room(distances: Tensor, most: int) -> Tensor:
    """Labels in which no cluster holds more than `most`: those that lose the most by another choice choose first."""
    two = distances.topk(min(2, distances.shape[1]), largest=False).values
    order = (two[:, -1] - two[:, 0]).argsort(descending=True)
    room = [most] * distances.shape[1]
    preferred = distances.argsort(1).tolist()
    labels = torch.empty(len(distances), dtype=torch.int64)
    for token in order.tolist():
        labels[token] = found = next(c for c in preferred[token] if room[c])
        room[found] -= 1
    return labels


def train_first(
    head: nn.Linear,
    labels: Tensor,
    features: Tensor,
    *,
    steps: int = 300,
    batch: int = 512,
    lr: float = 1e-2,
    seed: int = 0,
) -> nn.Linear:
    """The first level c → k, taught on `features` [n, c] by what the whole head says of each cluster.

    The loss is the divergence KL(q ‖ p) of the clusters' true probabilities q from the guessed p, a mean over tokens;
    nothing else is trained. Adam, `lr` to a tenth of it.
    """
    width, count = head.in_features, int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    first = nn.Linear(width, count, bias=False).to(head.weight.device)
    nn.init.orthogonal_(first.weight, 0.5 * math.sqrt(max(1.0, len(labels) / width)), generator=generator)
    optimizer = torch.optim.Adam(first.parameters(), lr=lr)
    features = features.detach().float()
    weight = head.weight.detach().float()
    for step in range(1, steps + 1):
        some = features[torch.randint(len(features), (batch,), generator=generator)]
        with torch.no_grad():
            truth = torch.zeros(batch, count).index_add_(1, labels, (some @ weight.T).softmax(-1))
        guessed = first(some).log_softmax(-1)
        loss = nn.functional.kl_div(guessed, truth, reduction="none").sum(-1).mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first.to(head.weight.dtype).requires_grad_(False)
