"""What each kind of adapter does to a weight W [out, in], in NumPy: the merged matrix (adaptation.md C.2)."""

from collections.abc import Mapping

import numpy as np

Factors = Mapping[str, np.ndarray]
"""Part of an adapter's tensors for one weight, without the module's name: "lora_A", "disha" … -> float32 values."""
Shape = tuple[int, ...]


class Misfit(ValueError):
    """The factors do not fit the weight; the message says how."""


def low_rank(weight: np.ndarray, factors: Factors, scale: float, *, undo: bool = False) -> np.ndarray:
    """LoRA: W + s·B·A, with A [r, in] and B [out, r]; less PiSSA's first pair where the file has it (scale 1)."""
    a, b = factors["lora_A"], factors["lora_B"]
    sign = -1 if undo else 1
    if "init_lora_A" in factors:
        return weight + sign * (b @ a - factors["init_lora_B"] @ factors["init_lora_A"])
    merged = weight + sign * scale * (b @ a)
    magnitude = factors.get("lora_magnitude_vector")
    if magnitude is None:
        return merged
    # DoRA: every row keeps its direction and gets a length of its own
    return magnitude.reshape(-1, 1) * merged / np.linalg.norm(merged, axis=1, keepdims=True)


def table(weight: np.ndarray, factors: Factors, scale: float, *, undo: bool = False) -> np.ndarray:
    """LoRA of an embedding [tokens, width]: A [r, tokens], B [width, r]."""
    return weight + (-scale if undo else scale) * (factors["lora_embedding_B"] @ factors["lora_embedding_A"]).T


def pair(factors: Factors, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """LoRA as A [r, in] and B [out, r] of a change B·A that stays beside the weight."""
    a, b = factors["lora_A"], scale * factors["lora_B"]
    if "init_lora_A" in factors:  # what PiSSA took out of the weights at first is still in them here
        a, b = np.concatenate([a, factors["init_lora_A"]]), np.concatenate([b, -factors["init_lora_B"]], axis=1)
    return a, b


def shard_pair(shape: Shape, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of MiSS: row j of A has ones where the column i is j modulo r (adaptation.md C.2.1)."""
    outputs, inputs = shape
    a = np.arange(inputs) % shared.shape[0] == np.arange(shared.shape[0])[:, None]
    return a.astype(np.float32), repeated(shared, outputs).T


def repeated(shared: np.ndarray, outputs: int) -> np.ndarray:
    """D [r, out] of mini's [r, out / n]."""
    return np.tile(shared, (1, outputs // shared.shape[1]))


def shared_rows(shape: Shape, shared: np.ndarray, name: str) -> np.ndarray:
    """MiSS's D as [r, out / n], whichever way its file keeps it; Misfit where it does not fit the weight."""
    shared = shared.T if is_turned(shape, shared.shape, name) else shared
    check_shards(shape, shared.shape)
    return shared


def is_turned(weight: Shape, shared: Shape, name: str) -> bool:
    """True for the oldest files of RWKV-PEFT, which keep [out, r]; peft's [r, out / n] must not be taken for it."""
    return name in ("bone", "disha") and shared[1] != weight[0] == shared[0]


def shards(weight: np.ndarray, shared: np.ndarray, *, undo: bool = False) -> np.ndarray:
    """MiSS, once Bone: every column i gets row i mod r of D [r, out]; D [r, out / n] is repeated n times."""
    outputs, inputs = weight.shape
    shared = repeated(shared, outputs)
    change = shared[np.arange(inputs) % shared.shape[0]].T
    return weight - change if undo else weight + change


def affine_blocks(
    weight: np.ndarray, blocks: np.ndarray, added: np.ndarray | None = None, *, by_rows: bool
) -> np.ndarray:
    """BAT: blocks W[a, b] of r × r become W[a, b] + W[a, b]·B + B, with a B for every a (row of blocks), or every b.

    Bone-AB adds another one than it multiplies with.
    """
    (outputs, inputs), r = weight.shape, blocks.shape[1]
    cut = weight.reshape(outputs // r, r, inputs // r, r).swapaxes(1, 2)  # [a, b, r, r]
    factor, term = (x[:, None] if by_rows else x[None] for x in (blocks, blocks if added is None else added))
    changed = cut + cut @ factor + term
    return changed.swapaxes(1, 2).reshape(outputs, inputs)


def without_affine_blocks(
    weight: np.ndarray, blocks: np.ndarray, added: np.ndarray | None = None, *, by_rows: bool
) -> np.ndarray:
    """What `affine_blocks` was given: blocks (W'[a, b] − B)·(I + B)⁻¹, in float64."""
    (outputs, inputs), r = weight.shape, blocks.shape[1]
    cut = weight.astype(np.float64).reshape(outputs // r, r, inputs // r, r).swapaxes(1, 2)
    inverse = np.linalg.inv(np.eye(r) + blocks.astype(np.float64))
    term = (blocks if added is None else added).astype(np.float64)
    term, inverse = (x[:, None] if by_rows else x[None] for x in (term, inverse))
    return ((cut - term) @ inverse).swapaxes(1, 2).reshape(outputs, inputs).astype(weight.dtype)


def check_inverse(blocks: np.ndarray) -> None:
    """Misfit where BAT has mapped different weights to one: I + B cannot be turned round."""
    worst = float(np.linalg.cond(np.eye(blocks.shape[1]) + blocks.astype(np.float64)).max())
    if not worst < 1e7:
        raise Misfit(f"I + B has the condition number {worst:.1g}: what was there before cannot be computed")


def check_low_rank(weight: Shape, factors: Mapping[str, Shape]) -> None:
    """Misfit unless every factor has its place beside `weight`."""
    for first, second in (("lora_A", "lora_B"), ("init_lora_A", "init_lora_B")):
        if first not in factors and second not in factors:
            continue
        if first not in factors or second not in factors:
            raise Misfit(f"there is {first} without {second}, or the other way round")
        _pair(weight, (first, factors[first]), (second, factors[second]))
    if "lora_A" not in factors:
        raise Misfit("lora_A is missing")


def check_table(weight: Shape, factors: Mapping[str, Shape]) -> None:
    """The same for an embedding."""
    names = "lora_embedding_A", "lora_embedding_B"
    if any(name not in factors for name in names):
        raise Misfit(f"{' or '.join(names)} is missing")
    _pair(weight[::-1], *((name, factors[name]) for name in names))


def check_shards(weight: Shape, shared: Shape) -> None:
    """The same for MiSS."""
    outputs, inputs = weight
    if outputs % max(1, shared[1]) or not 0 < shared[0] <= inputs:
        raise Misfit(f"a factor {_times(shared)} shares no rows with a weight {_times(weight)}")


def check_blocks(weight: Shape, blocks: Shape, *, by_rows: bool) -> None:
    """The same for BAT."""
    outputs, inputs = weight
    count, r = blocks[:2]
    if blocks[2] != r or outputs % r or inputs % r or count * r != (outputs if by_rows else inputs):
        raise Misfit(f"a factor {_times(blocks)} does not cut a weight {_times(weight)} into blocks")


def check_two_blocks(weight: Shape, factors: Mapping[str, Shape]) -> bool:
    """The same for Bone-AB; whether its blocks are per row of blocks, which their number tells.

    A square weight's are per column, as in the code that trained such files.
    """
    if factors.keys() != {"bone_A", "bone_B"} or factors["bone_A"] != factors["bone_B"] or len(factors["bone_A"]) != 3:
        raise Misfit("Bone-AB has bone_A and bone_B of one shape, [blocks, r, r]")
    count, r = factors["bone_A"][:2]
    by_rows = count * r != weight[1]
    check_blocks(weight, factors["bone_A"], by_rows=by_rows)
    return by_rows


def _pair(weight: Shape, a: tuple[str, Shape], b: tuple[str, Shape]) -> None:
    (a_name, a_shape), (b_name, b_shape) = a, b
    if len(a_shape) != 2 or a_shape[1] != weight[1]:
        raise Misfit(f"{a_name} {_times(a_shape)} does not fit a weight {_times(weight)}")
    if b_shape != (weight[0], a_shape[0]):
        raise Misfit(f"{b_name} {_times(b_shape)} does not fit a weight {_times(weight)}")


def _times(shape: Shape) -> str:
    return " × ".join(map(str, shape))
