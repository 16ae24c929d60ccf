"""How much a token far back still moves the prediction: for any language model of the library."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rookery.nn.language_model import LanguageModel


def influence(model: LanguageModel, distances: Sequence[int], *, rows: int = 4, seed: int = 0) -> list[float]:
    """Norm of the gradient that the last position's features have at the embedding `distance` tokens before it.

    The features are weighted by one random vector; the mean over `rows` rows of random tokens, one token longer than
    the largest distance. ValueError for a model without a table of embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    config, length = model.config, max(distances) + 1
    tokens = torch.randint(config.vocab_size, (rows, length), generator=generator)
    taken: list[Tensor] = []
    hook = _embedding(model).register_forward_hook(lambda module, given, out: _keep(out, (rows, length), taken))
    try:
        features, _ = model.features(tokens.to(model.head.weight.device), None, None)
    finally:
        hook.remove()
    direction = torch.randn(features.shape[-1], generator=generator).to(features)
    grads = torch.autograd.grad((features[:, -1] @ direction).sum(), taken, allow_unused=True)
    norms = sum(grad for grad in grads if grad is not None).norm(dim=-1).mean(dim=0)
    return [float(norms[length - 1 - distance]) for distance in distances]


def _keep(out: Tensor, shape: tuple[int, int], taken: list[Tensor]) -> Tensor:
    if out.shape[:2] == shape:  # a table of a few tokens more is none of these
        out = out.detach().requires_grad_()
        taken.append(out)
    return out


def _embedding(model: LanguageModel) -> nn.Embedding:
    wanted = model.fingerprint_weights()[0]
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is wanted:
            return module
    raise ValueError(f"{model.family} has no table of embeddings to look at")
