"""The cache of top-k chunk sparse attention (RWKV-X, arXiv 2504.21463, section 3.2): chunks, mean keys, eviction.

Complete chunks never change until eviction, so that a token costs a copy of the chunk that is filling and not of the
cache. A call is read in rounds that end where a row's cache is full, whatever the cut into calls, so that any cut gives
the same numbers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rookery.nn.growth import Growth
from rookery.nn.packing import row_mask
from rookery.ops.chunk_attention import chunk_attention

# r rows, p places in complete chunks, o places in the filling chunk, c chunks, h heads, n channels of a head


class ChunkCache(NamedTuple):
    """What one layer remembers. Places beyond a row's entries hold zeros."""

    past_keys: Tensor
    """[r, p, h, n], complete chunks"""
    past_values: Tensor
    past_positions: Tensor
    """int64 [r, p, h], which tokens the entries come from; [r, 0, h] where nothing is ever evicted"""
    keys: Tensor
    """[r, o, h, n], the chunk that is filling"""
    values: Tensor
    positions: Tensor
    """int64 [r, o, h]"""
    chunk_means: Tensor
    """[r, c, h, n], mean keys of complete chunks, float32 at least"""
    queries: Tensor
    """[r, observed, h, n], the last queries; none where they do not vote"""


def empty(config: Any, batch: int, heads: int, dim: int, like: Tensor) -> ChunkCache:
    """The cache before the first token, in the dtype of `like`."""
    none = like.new_zeros(batch, 0, heads, dim)
    nowhere = like.new_zeros(batch, 0, heads, dtype=torch.int64)
    votes = config.observed if config.max_entries and config.eviction == "vote" else 0
    means = none.to(torch.promote_types(like.dtype, torch.float32))
    return ChunkCache(none, none, nowhere, none, none, nowhere, means, like.new_zeros(batch, votes, heads, dim))


class Completion(NamedTuple):
    """Chunks that become complete in a round."""

    most: int
    """Entries of the filling chunk that they take, in the row that completes most."""
    means: Growth
    """Where their mean keys go."""
    move: Growth
    """Where they go themselves."""
    rest: Tensor
    """int64 [r, o], what the new filling chunk is made of"""
    none: Tensor
    """bool [r, o], places where it has no entry yet"""


class Round(NamedTuple):
    """New tokens up to the next eviction."""

    take: Growth | None
    """Where the round's tokens stand among the call's; None where the round is the whole call."""
    taken: list[int]
    """Tokens of each row."""
    base: Tensor
    """int64 [r], entries in complete chunks before the round"""
    write: Growth
    """Where the new entries go in the filling chunk, which may become several"""
    begun: int | None
    """Entries of the filling chunk before the round, where that and what is taken are the same for all rows"""
    positions: Tensor
    """int64 [r, t], the queries' entry numbers, −1 at padding"""
    tokens: Tensor
    """int64 [r, t], their places in the text, −1 at padding"""
    places: tuple[int, int]
    """Places for entries after the round, in complete chunks and in the filling one."""
    completion: Completion | None
    full: Tensor | None
    """Rows to reduce at the round's end."""


class Plan(NamedTuple):
    """How one call goes through all caches of a model."""

    layout: Growth
    """Rows and packed documents, see `Growth.rows`."""
    rounds: list[Round]


def plan(config: Any, tokens: Tensor, seen: Tensor, cache: ChunkCache, cu_seqlens: Tensor | None) -> Plan:
    """The plan for `tokens` [b, t] after rows that have read `seen` [r] and have caches like `cache`."""
    real = None if cu_seqlens is None else row_mask(cu_seqlens)
    before = [0] * len(seen) if seen.device.type == "meta" else seen.tolist()
    left = [tokens.shape[1]] * len(before) if real is None else cu_seqlens.diff().tolist()
    columns = tokens.shape[1] if real is None else real.shape[1]
    layout = Growth(seen, seen[:, None], 0, real is None, real)
    rounds, offsets = [], [0] * len(before)
    held = cache.past_keys.shape[1], cache.keys.shape[1]
    while any(left):
        entries = [config.entries(n) for n in before]
        taken = [min(n, config.max_entries - e) if config.max_entries else n for n, e in zip(left, entries)]
        whole = real is None and not any(offsets) and taken == left
        take = None if whole else _growth(offsets, taken, columns, seen.device)
        now = _round(config, before, taken, held, take, seen.device)
        rounds.append(now)
        held = now.places
        offsets, before = ([n + t for n, t in zip(numbers, taken)] for numbers in (offsets, before))
        left = [n - t for n, t in zip(left, taken)]
    return Plan(layout, rounds)


def _growth(start: list[int], taken: list[int], length: int, device: torch.device) -> Growth:
    """Entries `start` … `start` + `taken` of each row; −1 where a row has fewer than the longest."""
    first, count = (torch.tensor(numbers, device=device) for numbers in (start, taken))
    columns = torch.arange(max(taken), device=device)
    positions = torch.where(columns < count[:, None], first[:, None] + columns, -1)
    return Growth(first, positions, length, False, None)


def _round(
    config: Any, before: list[int], taken: list[int], held: tuple[int, int], take: Growth | None, device: torch.device
) -> Round:
    size = config.chunk_size
    entries = [config.entries(n) for n in before]
    filling, chunks = [e % size for e in entries], [e // size for e in entries]
    base = torch.tensor(chunks, device=device) * size
    after = [n + t for n, t in zip(before, taken)]
    # the places that the most tokens of any row ask for, and never fewer than there are
    places = tuple(max(*pair) for pair in zip(held, config.places(max(after))))
    length = max(held[1], max(f + t for f, t in zip(filling, taken)))
    write = _growth(filling, taken, length, device)
    reached = [e + t for e, t in zip(entries, taken)]
    full = [row for row, e in enumerate(reached) if taken[row] and config.max_entries and e == config.max_entries]
    return Round(
        take=take,
        taken=taken,
        base=base,
        write=write,
        begun=filling[0] if len({*filling}) == len({*taken}) == 1 else None,
        positions=torch.where(write.positions < 0, -1, base[:, None] + write.positions),
        tokens=_growth(before, taken, 0, device).positions,
        places=places,
        completion=_completion(size, chunks, [f + t for f, t in zip(filling, taken)], length, places, device),
        full=torch.tensor(full, device=device) if full else None,
    )


def _completion(
    size: int, chunks: list[int], reached: list[int], length: int, places: tuple[int, int], device: torch.device
) -> Completion | None:
    """For rows with so many `chunks` whose filling places, `length` of them, hold `reached` entries."""
    done = [n // size for n in reached]
    if not any(done):
        return None
    complete = [n * size for n in done]
    rest = torch.tensor(complete, device=device)[:, None] + torch.arange(places[1], device=device)
    return Completion(
        most=max(complete),
        means=_growth(chunks, done, places[0] // size, device),
        move=_growth([n * size for n in chunks], complete, places[0], device),
        rest=rest.clamp(max=length - 1),
        none=rest >= torch.tensor(reached, device=device)[:, None],
    )


def attend(
    config: Any, q: Tensor, k: Tensor, v: Tensor, cache: ChunkCache, rounds: list[Round]
) -> tuple[Tensor, ChunkCache]:
    """What the queries find among the entries up to their own, [r, t, h, n], and the cache after them."""
    if not rounds:
        return torch.zeros_like(q), cache
    if rounds[0].take is None:
        return _read(config, q, k, v, cache, rounds[0])
    y = torch.zeros_like(q)
    for now in rounds:
        index = _like(now.take.positions.clamp(min=0), q)
        found, cache = _read(config, *(x.gather(1, index) for x in (q, k, v)), cache, now)
        y = now.take.write(y, found)
    return y, cache


def _read(config: Any, q: Tensor, k: Tensor, v: Tensor, cache: ChunkCache, now: Round) -> tuple[Tensor, ChunkCache]:
    """One round."""
    cache = cache._replace(keys=_written(cache.keys, k, now), values=_written(cache.values, v, now))
    if config.max_entries:
        tokens = now.tokens[..., None].expand(-1, -1, q.shape[2])
        cache = cache._replace(positions=_written(cache.positions, tokens, now))
    if now.completion:
        new = _means(cache.keys[:, : now.completion.most], config.chunk_size)
        cache = cache._replace(chunk_means=now.completion.means.write(cache.chunk_means, new))
    y = chunk_attention(
        q=q,
        past_k=cache.past_keys,
        past_v=cache.past_values,
        means=cache.chunk_means,
        k=cache.keys,
        v=cache.values,
        base=now.base,
        positions=now.positions,
        chunk_size=config.chunk_size,
        topk=config.topk,
    )
    if cache.queries.shape[1]:
        cache = cache._replace(queries=_last(cache.queries, q.detach(), now.taken))
    if now.completion:
        cache = _with_complete_chunks_moved(cache, now.completion)
    if now.full is not None:
        cache = _reduced(config, cache, now)
    return y, cache


def _written(filling: Tensor, new: Tensor, now: Round) -> Tensor:
    """The filling places [r, o, ...] with the new entries [r, t, ...]."""
    if now.begun is None:
        return now.write.write(filling, new)
    return torch.cat([filling[:, : now.begun], new, filling[:, now.begun + new.shape[1] :]], dim=1)


def _means(keys: Tensor, size: int) -> Tensor:
    """Mean keys [r, c, h, n] of entries [r, c · size, h, n]. They only choose: no gradient."""
    wide = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    return wide.unflatten(1, (-1, size)).mean(dim=2)


def _last(queries: Tensor, new: Tensor, taken: list[int]) -> Tensor:
    """The last queries of each row, after `taken` new ones at the front of `new`."""
    both = torch.cat([queries, new], dim=1)
    observed = queries.shape[1]
    if len({*taken}) == 1:
        return both[:, taken[0] : taken[0] + observed]
    index = torch.tensor(taken, device=new.device)[:, None] + torch.arange(observed, device=new.device)
    return both.gather(1, _like(index, both))


def _with_complete_chunks_moved(cache: ChunkCache, done: Completion) -> ChunkCache:
    """Chunks that are complete leave the filling places; what has begun after them moves to the front."""
    changed = {}
    for past, filling in PAIRS:
        x = getattr(cache, filling)
        if not x.shape[1]:
            continue  # positions that nobody keeps
        changed[past] = done.move.write(getattr(cache, past), x[:, : done.most])
        begun = x.gather(1, _like(done.rest, x))
        changed[filling] = begun.masked_fill(_like(done.none, x), 0)
    return cache._replace(**changed)


PAIRS = (("past_keys", "keys"), ("past_values", "values"), ("past_positions", "positions"))
"""Fields that entries go through: places in complete chunks, places in the filling one."""


def _like(index: Tensor, x: Tensor) -> Tensor:
    """`index`, of the first dimensions of x [r, p, ...], for all of its last ones."""
    missing = (1,) * (x.dim() - index.dim())
    return index.view(*index.shape, *missing).expand(*index.shape, *x.shape[index.dim() :])


def _reduced(config: Any, cache: ChunkCache, now: Round) -> ChunkCache:
    """The cache with its full rows reduced to `min_entries` and cut into chunks anew."""
    size, most, least = config.chunk_size, config.max_entries, config.min_entries
    complete = most // size * size
    rows = cache._make(x.index_select(0, now.full) for x in cache)

    def all_of(past: Tensor, filling: Tensor) -> Tensor:
        return torch.cat([past[:, :complete], filling[:, : most - complete]], dim=1)

    keys = all_of(rows.past_keys, rows.keys)
    index = kept(config, keys, rows.queries).transpose(1, 2)  # [r, least, h]
    border = least // size * size
    changed = {}
    for past, filling in PAIRS:
        x = all_of(getattr(rows, past), getattr(rows, filling))
        x = x.gather(1, _like(index, x))
        for name, part in ((past, x[:, :border]), (filling, x[:, border:])):
            old = getattr(cache, name)
            behind = (0, 0) * (part.dim() - 2)
            changed[name] = old.index_copy(0, now.full, pad(part, (*behind, 0, old.shape[1] - part.shape[1])))
        if past == "past_keys":
            means = _means(x[:, :border], size)
            means = pad(means, (0, 0, 0, 0, 0, cache.chunk_means.shape[1] - means.shape[1]))
            changed["chunk_means"] = cache.chunk_means.index_copy(0, now.full, means)
    return cache._replace(**changed)


def positions(config: Any, cache: ChunkCache, tokens_seen: int) -> Tensor:
    """Which tokens the entries of rows that have read `tokens_seen` come from, [r, h, entries]; for looking at.

    ValueError where nothing is ever evicted: then they are all tokens.
    """
    if not config.max_entries:
        raise ValueError("this cache evicts nothing (max_entries=0): its entries are all tokens that were read")
    entries = config.entries(tokens_seen)
    base = entries // config.chunk_size * config.chunk_size
    held = torch.cat([cache.past_positions[:, :base], cache.positions[:, : entries - base]], dim=1)
    return held.transpose(1, 2)


@torch.no_grad()
def kept(config: Any, keys: Tensor, queries: Tensor) -> Tensor:
    """Which of `max_entries` entries remain, int64 [r, h, min_entries] in the order of their coming.

    The window remains. Of the older entries those do, head by head, that the last queries [r, observed, h, n] attend
    to most: the sum of their softmax over the older keys [r, max_entries, h, n] (eq. 7); among equals the earlier.
    """
    rows, most, heads, dim = keys.shape
    older = most - config.window_entries
    count = config.min_entries - config.window_entries
    window = torch.arange(older, most, device=keys.device).expand(rows, heads, -1)
    if config.eviction == "newest":
        return torch.cat([torch.arange(older - count, older, device=keys.device).expand(rows, heads, -1), window], -1)
    wide = torch.promote_types(keys.dtype, torch.float32)
    scores = torch.einsum("rohn,rehn->rhoe", queries, keys[:, :older]).to(wide) * dim**-0.5
    votes = scores.softmax(dim=-1).sum(dim=2)
    best = votes.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.cat([best.sort(dim=-1).values, window], dim=-1)
