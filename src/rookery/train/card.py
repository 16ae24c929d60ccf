"""README.md beside a finished model: what it is, what it learned from and how, in the Hub's model card format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rookery.checkpoints.atomic import replacing
from rookery.train.config import DistillConfig, FinetuneConfig, TrainConfig, describe

USE = ("## Use", "", "```", "rookery generate --model model.safetensors PROMPT", "```", "")


def write_card(path: Path, config: TrainConfig, parameters: int, facts: dict[str, Any], *, writes: bool = True) -> None:
    """Writes the card to `path`; `facts` are figures of the run's last step, by name; `writes` says that it is a
    language model."""
    base, made = config.initial, config.model
    if isinstance(config, FinetuneConfig):
        base, made = config.base, f"Fine-tuned from {config.base}"
    elif isinstance(config, DistillConfig):
        base, made = config.teacher, f"Distilled from {config.teacher}"
    head = ["library_name: rookery", "tags: [rwkv]"]
    if writes:
        head.append("pipeline_tag: text-generation")
    if base:
        head.append(f"base_model: {json.dumps(base)}")
    rows = [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in facts.items()]
    lines = [
        *("---", *head, "---", ""),
        f"# {path.parent.resolve().name}",
        "",
        f"{made}, {parameters:,} parameters.",
        "",
        "## Figures",
        "",
        *("| | |", "|---|---|", *rows, ""),
        *(USE if writes and (path.parent / "model.safetensors").exists() else ()),
        *("## How it was made", "", "```", describe(config), "```", ""),
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
