"""WKV-7, one token at a time. This file is the definition; every other backend must agree with it."""

# b batch, t time, h heads, k key channels, v value channels, d documents

import torch
from jaxtyping import Float, Int
from torch import Tensor


def wkv7(
    *,
    r: Float[Tensor, "b t h k"],
    log_w: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    a: Float[Tensor, "b t h k"],
    b: Float[Tensor, "b t h k"],
    state: Float[Tensor, "rows h v k"],
    cu_seqlens: Int[Tensor, " d+1"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "rows h v k"]]:
    if cu_seqlens is not None:
        return per_document(wkv7, r=r, log_w=log_w, k=k, v=v, a=a, b=b, state=state, cu_seqlens=cu_seqlens)
    out_dtype = v.dtype
    # the state is float32 at least: rounding it to bfloat16 every step costs two decimal digits in 500 tokens
    r, log_w, k, v, a, b = (x.to(state.dtype) for x in (r, log_w, k, v, a, b))
    outputs = []
    for t in range(r.shape[1]):
        decayed = state * log_w[:, t].exp()[..., None, :]
        removed = (state @ a[:, t, ..., None]) * b[:, t, ..., None, :]
        written = v[:, t, ..., None] * k[:, t, ..., None, :]
        state = decayed + removed + written
        outputs.append((state @ r[:, t, ..., None])[..., 0])
    y = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return y.to(out_dtype), state


def per_document(run, *, state: Tensor, cu_seqlens: Tensor, **rows: Tensor) -> tuple[Tensor, Tensor]:
    """Runs an operator of `rows` [1, t, ...] document by document, each with its own row of `state`."""
    ends = cu_seqlens.tolist()
    results = [
        run(**{name: x[:, start:end] for name, x in rows.items()}, state=state[i : i + 1])
        for i, (start, end) in enumerate(zip(ends, ends[1:]))
    ]
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)
