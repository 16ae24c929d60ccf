"""Top-k chunk sparse attention (MoBA, arXiv 2502.13189; RWKV-X, arXiv 2504.21463, eq. 4-6).

Entries are numbered in the order of their coming and cut into chunks of `chunk_size`. A query sees the entries of its
own chunk up to its own number, and all of the topk − 1 complete chunks before it whose mean key it likes best: head by
head, by q · mean, the later chunk where two are equal. One softmax goes over all of them.
"""

from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.chunk_attention import gathered, masked, reference
from rookery.ops.dispatch import Backend, Op

OP = Op(
    "chunk_attention",
    [
        Backend("gathered", gathered.chunk_attention, gathered.why_not),
        Backend("masked", masked.chunk_attention),
        Backend("reference", reference.chunk_attention),
    ],
)


def chunk_attention(
    *,
    q: Float[Tensor, "r t h n"],
    past_k: Float[Tensor, "r p h n"],
    past_v: Float[Tensor, "r p h n"],
    means: Float[Tensor, "r c h n"],
    k: Float[Tensor, "r s h n"],
    v: Float[Tensor, "r s h n"],
    base: Int[Tensor, " r"],
    positions: Int[Tensor, "r t"],
    chunk_size: int,
    topk: int,
    backend: str | None = None,
) -> Float[Tensor, "r t h n"]:
    """What t queries of each row find, in the dtype of `v`; zero for padding.

    A row's entries 0 … base − 1, complete chunks all, are the first of `past_k`, `past_v`; entry base + i is `k`, `v`
    number i, the queries' own among them. `positions` are the queries' entry numbers, −1 at padding. `means` are the
    mean keys of the complete chunks of both, float32 at least; they choose and get no gradient. What lies beyond a
    row's entries is never read. Raises ValueError for topk < 1 or a base that ends within a chunk,
    BackendUnavailable if `backend` cannot run.
    """
    if topk < 1 or chunk_size < 1:
        raise ValueError(f"topk ({topk}) and chunk_size ({chunk_size}) must be at least 1")
    if past_k.shape[1] % chunk_size:
        raise ValueError(f"past_k holds {past_k.shape[1]} entries, no multiple of chunk_size {chunk_size}")
    call = {"q": q, "past_k": past_k, "past_v": past_v, "means": means, "k": k, "v": v, "base": base}
    return OP(backend=backend, **call, positions=positions, chunk_size=chunk_size, topk=topk)
