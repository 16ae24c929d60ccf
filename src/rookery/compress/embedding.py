"""How well a cache of embedding rows works for a text; the cache itself is part of the compiled runtime."""

from collections import OrderedDict
from collections.abc import Iterable


def hit_rate(tokens: Iterable[int], capacity: int, policy: str = "lru") -> float:
    """Share of the look-ups that a cache of `capacity` rows answers, empty at first.

    "lru" drops the row whose last use is the longest ago, as the runtime does; "fifo" the one that came first, as the
    published code does. ValueError for a capacity below 1 or another policy.
    """
    if capacity < 1 or policy not in ("lru", "fifo"):
        raise ValueError(f"a cache has 1 row or more and the policy lru or fifo, got {capacity} and {policy!r}")
    kept: OrderedDict[int, None] = OrderedDict()
    hits = count = 0
    for token in tokens:
        count += 1
        if token in kept:
            hits += 1
            if policy == "lru":
                kept.move_to_end(token)
            continue
        if len(kept) == capacity:
            kept.popitem(last=False)
        kept[token] = None
    return hits / count if count else 0.0
