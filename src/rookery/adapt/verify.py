"""How well a converted model does what its teacher did: layer by layer, in distribution, and in what it says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rookery.adapt.convert_transformer import align
from rookery.adapt.distillation import forward_kl
from rookery.checkpoints.atomic import replacing
from rookery.models.arwkv import Converted
from rookery.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Figures over held-out rows; accuracies are shares of the predicted tokens."""

    tokens: int
    """Predictions that were compared."""
    kl: float
    """KL(teacher ‖ student), nats a token."""
    agreement: float
    """Likeliest token the same as the teacher's."""
    accuracy: float
    """Likeliest token the text's."""
    teacher_accuracy: float
    loss: float
    """Cross-entropy of the text, nats a token."""
    teacher_loss: float
    state_bytes: int
    """Of a row as long as those compared, in float32."""
    teacher_state_bytes: int
    layers: tuple[dict[str, Any], ...]
    """By time mix: its block, its distance from the attention and that by the root mean square of the attention's
    output; a mixer that says nothing scores about 1."""

    def text(self) -> str:
        """The figures as people read them."""
        rows = [
            f"{self.tokens:,} predictions",
            f"KL(teacher ‖ student)   {self.kl:.4f} nats a token",
            f"same likeliest token    {self.agreement:.1%}",
            f"next token right        {self.accuracy:.1%}   teacher {self.teacher_accuracy:.1%}",
            f"cross-entropy           {self.loss:.4f}   teacher {self.teacher_loss:.4f}",
            f"state of a row          {self.state_bytes:,} bytes   teacher {self.teacher_state_bytes:,}",
            "",
            "layer   error     relative",
        ]
        return "\n".join(rows + [f"{e['layer']:>5}   {e['error']:.5f}   {e['relative']:.3f}" for e in self.layers])

    def write(self, folder: Path) -> None:
        """verification.json and verification.txt."""
        for name, text in (("json", json.dumps(asdict(self), indent=1)), ("txt", self.text())):
            with replacing(folder / f"verification.{name}") as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def verify(teacher: Transformer, student: Converted, rows: Tensor, *, batch: int = 8) -> Verification:
    """Both models on held-out `rows` [n, t] of tokens, `batch` at a time; each token but the last predicts the next.

    A teacher of another width, such as a larger one of the same vocabulary, has no layers to compare.
    """
    sums: dict[str, float] = {}
    errors, scales, done, layers = 0.0, 0.0, 0, ()
    alike = all(getattr(teacher.config, n) == getattr(student.config, n) for n in ("hidden_size", "num_hidden_layers"))
    for some in rows.split(batch):
        for name, value in _compared(teacher, student, some).items():
            sums[name] = sums.get(name, 0.0) + value
        if alike and teacher.config.vocab_size == student.config.vocab_size:
            found = align(teacher, student, some[:, :-1])
            layers = found.layers
            errors, scales = errors + len(some) * found.errors, scales + len(some) * found.scales
        done += len(some)
    count = rows[:, 1:].numel()
    listed = tuple(
        {"layer": layer, "error": float(error / done), "relative": float(error / scale)}
        for layer, error, scale in zip(layers, errors if layers else (), scales if layers else (), strict=True)
    )
    size = {"tokens_seen": rows.shape[1], "batch": 1, "itemsize": 4}
    return Verification(
        tokens=count,
        state_bytes=student.config.state_nbytes(**size),
        teacher_state_bytes=teacher.config.state_nbytes(**size),
        layers=listed,
        **{name: value / count for name, value in sums.items()},
    )


def _compared(teacher: Transformer, student: Converted, rows: Tensor) -> dict[str, float]:
    """Sums over the predictions of some rows."""
    targets = rows[:, 1:].flatten()
    mine, theirs = (model(rows[:, :-1])[0].flatten(0, 1).float() for model in (student, teacher))
    theirs = theirs[:, : mine.shape[1]]
    found = {
        "kl": forward_kl(mine, theirs),
        "agreement": mine.argmax(-1) == theirs.argmax(-1),
        "accuracy": mine.argmax(-1) == targets,
        "teacher_accuracy": theirs.argmax(-1) == targets,
        "loss": cross_entropy(mine, targets, reduction="none"),
        "teacher_loss": cross_entropy(theirs, targets, reduction="none"),
    }
    return {name: float(values.double().sum()) for name, values in found.items()}
