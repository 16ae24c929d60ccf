"""A small picture of what a session remembers: a bar for each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rookery.engine.session import Session

WIDTH = 40
"""Characters of the longest bar."""
EIGHTHS = " ▏▎▍▌▋▊▉█"


def state_norms(session: Session) -> list[float]:
    """The root mean square of each layer's recurrent state, or of all tensors where a layer has none of that name."""
    layers: dict[int, dict[str, np.ndarray]] = {}
    _ = session.tokens_seen  # what was shown is read
    for name, tensor in session._at.state.tensors().items():
        if name.startswith("layers."):
            _, layer, part = name.split(".")
            layers.setdefault(int(layer), {})[part] = tensor.astype(np.float64)
    norms = []
    for _, parts in sorted(layers.items()):
        chosen = [parts["wkv"]] if "wkv" in parts else list(parts.values())
        numbers = sum(part.size for part in chosen)
        norms.append(math.sqrt(sum(float((part**2).sum()) for part in chosen) / max(1, numbers)))
    return norms


def picture(session: Session) -> str:
    """Lines of text: tokens, bytes, and a bar for each layer, the largest over the whole width."""
    norms = state_norms(session)
    most = max(norms, default=0.0) or 1.0
    lines = [f"{session.tokens_seen:,} tokens in a state of {session.nbytes:,} bytes; root mean square of each layer:"]
    for layer, norm in enumerate(norms):
        eighths = round(8 * WIDTH * norm / most)
        bar = EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        lines.append(f"{layer:>3} {norm:9.3g} {bar}".rstrip())
    return "\n".join(lines)
