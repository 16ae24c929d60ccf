"""RWKV-4 to RWKV-6 written out a second time, in NumPy and without the library: their skeleton, norms, comparisons."""

from collections.abc import Callable

import numpy as np
import torch


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def group_norm(y: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """The norm of every head of y [heads, n], flat."""
    normed = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + eps)
    return normed.ravel() * weight + bias


def below(p: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


TimeMix = Callable[[dict, np.ndarray, np.ndarray, dict], np.ndarray]
"""(parameters, token, the token before, what the block remembers) -> what is added; changes what is remembered."""
ChannelMix = Callable[[dict, np.ndarray, np.ndarray], np.ndarray]


def forward(
    p: dict[str, np.ndarray], tokens: list[int], time_mix: TimeMix, channel_mix: ChannelMix
) -> tuple[np.ndarray, list[dict]]:
    """Logits [t, V] token by token, and what every block remembers: att_shift, ffn_shift and the time mix's own."""
    p = {name: value.ravel() if value.ndim == 3 and value.shape[:2] == (1, 1) else value for name, value in p.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    width = p["ln_out.weight"].shape[0]
    memory = [{"att_shift": np.zeros(width), "ffn_shift": np.zeros(width)} for _ in range(layers)]
    rows = []
    for token in tokens:
        x = layer_norm(p["emb.weight"][token], p["blocks.0.ln0.weight"], p["blocks.0.ln0.bias"])
        for i, kept in enumerate(memory):
            q = below(p, f"blocks.{i}.")
            h = layer_norm(x, q["ln1.weight"], q["ln1.bias"])
            x = x + time_mix(below(q, "att."), h, kept["att_shift"], kept)
            kept["att_shift"] = h
            h = layer_norm(x, q["ln2.weight"], q["ln2.bias"])
            x = x + channel_mix(below(q, "ffn."), h, kept["ffn_shift"])
            kept["ffn_shift"] = h
        rows.append(p["head.weight"] @ layer_norm(x, p["ln_out.weight"], p["ln_out.bias"]))
    return np.stack(rows), memory


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def gain_of(weight: torch.Tensor) -> float:
    """s of a matrix that is s times an orthonormal one; fails if it is none."""
    weight = weight.detach().double()
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    square = gram.diagonal().mean()
    torch.testing.assert_close(gram, square * torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=float(square) * 1e-5)
    return float(square.sqrt())


def assert_vectors(model: torch.nn.Module, published: Callable[[int], dict[str, np.ndarray]]) -> None:
    """The named parameters of every block have the published initial values."""
    for layer, block in enumerate(model.blocks):
        for name, value in published(layer).items():
            got = block.get_parameter(name).detach().double().numpy().ravel()
            np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-7, err_msg=f"layer {layer} {name}")


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root of the mean squared difference, relative to that of `want`."""
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
