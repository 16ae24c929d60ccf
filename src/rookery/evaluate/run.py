"""One name for every evaluation: what `rookery eval` runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rookery.adapt.state_tuning import load_start
from rookery.checkpoints import open_checkpoint
from rookery.compress import load as load_compressed
from rookery.engine.llm import EMBEDDED
from rookery.errors import unknown
from rookery.evaluate.benchmarks import blimp, lambada, mmlu, multiple_choice
from rookery.evaluate.needle import passkey
from rookery.evaluate.perplexity import file_texts, perplexity
from rookery.evaluate.positions import by_octave, loss_by_position, plot_loss_by_position, rows_of
from rookery.evaluate.scoring import Scorer
from rookery.models import load
from rookery.nn.language_model import LanguageModel
from rookery.tokenizers import Tokenizer
from rookery.tokenizers.pairing import resolve

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "lambada": lambada,
    "mmlu": mmlu,
    "choices": multiple_choice,
    "blimp": blimp,
}
"""Tasks that read a file of questions."""
TASKS = ("perplexity", *BENCHMARKS, "needle", "positions", "lm-eval")


def load_for_evaluation(
    path: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    adapter_alpha: float | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """A model and its tokenizer; without a path the model that ships with the package. `adapter` is merged into it.

    On the CPU weights become float32 unless `dtype` is given: it is faster there, and the same numbers. A compressed
    model computes what it computes in the compiled runtime, not what the plain model would.
    """
    path = EMBEDDED if path is None else path
    checkpoint = open_checkpoint(path)
    told = checkpoint.metadata
    precision = getattr(torch, dtype) if dtype else torch.float32 if device == "cpu" else None
    if checkpoint.lite and adapter is None:
        model = load_compressed(checkpoint, dtype=precision).to(device)
    else:
        model = load(path, device=device, dtype=precision, adapter=adapter, adapter_alpha=adapter_alpha)
    model = model.eval().requires_grad_(False)
    return model, resolve(tokenizer, vocab_size=model.config.vocab_size, path=path, metadata=told)


def evaluate(
    task: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    data: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    state: str | os.PathLike[str] | None = None,
    budget: int = 4096,
    reuse: bool = True,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of one of `TASKS` as numbers that JSON can hold, with "task", "seconds" and what was read.

    `data` is the file of the task; `limit` its first so many questions or texts; `state` a tuned state that every text
    begins with; `options` are keyword arguments of the task's own function. ValueError for a task that needs a file and
    has none.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS, "`rookery eval --help`")
    if data is None and task not in ("needle", "lm-eval"):
        raise ValueError(f"the task {task!r} needs a file: rookery eval {task} FILE")
    start = load_start(state, model) if state is not None else None
    if start is not None:
        model = start.model[0]  # another one where the file holds a kernel state
    options = dict(options or {})
    began = time.perf_counter()
    if task == "perplexity":
        result = _perplexity(model, tokenizer, Path(data), limit, start, options)
    elif task == "positions":
        result = _positions(model, tokenizer, Path(data), options)
    elif task == "lm-eval":
        result = _lm_eval(model, tokenizer, limit, budget, reuse, options)
    else:
        scorer = Scorer(model, budget=budget, reuse=reuse, start=start)
        if task == "needle":
            result = passkey(scorer, tokenizer, **options)
        else:
            result = BENCHMARKS[task](scorer, tokenizer, Path(data), limit, **options)
        result |= {"tokens_read": scorer.tokens_read, "tokens_asked": scorer.tokens_asked}
    return {"task": task, **result, "seconds": round(time.perf_counter() - began, 3)}


def _perplexity(
    model: LanguageModel, tokenizer: Tokenizer, data: Path, limit: int | None, start: Any, options: dict[str, Any]
) -> dict[str, Any]:
    found = perplexity(model, tokenizer, islice(file_texts(data), limit), start=start, **options)
    return {
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.per_token,
        "nats_per_token": found.nats / found.tokens,
        "tokens": found.tokens,
        "bytes": found.bytes,
    }


def _positions(model: LanguageModel, tokenizer: Tokenizer, data: Path, options: dict[str, Any]) -> dict[str, Any]:
    plot, trained = options.pop("plot", None), options.pop("trained_length", 0)
    texts = (text if isinstance(text, str) else b"".join(text).decode() for text in file_texts(data))
    tokens = [token for text in texts for token in (tokenizer.eos_id, *tokenizer.encode(text))]
    inputs, targets = rows_of(np.array(tokens), options.pop("length", 2048), options.pop("rows", 16))
    losses = loss_by_position(model, inputs, targets, **options)
    if plot:
        plot_loss_by_position({data.name: losses}, plot, trained_length=trained)
    table = [{"from": first, "to": last, "nats": nats} for first, last, nats in by_octave(losses)]
    return {"rows": inputs.shape[0], "table": table}


def _lm_eval(
    model: LanguageModel, tokenizer: Tokenizer, limit: int | None, budget: int, reuse: bool, options: dict[str, Any]
) -> dict[str, Any]:
    from rookery.evaluate.lm_eval import RookeryLM  # says how to install the harness where it is missing

    import lm_eval  # isort: skip

    if not options.get("tasks"):
        raise ValueError("name the harness's tasks: rookery eval lm-eval --tasks arc_easy,piqa")
    lm = RookeryLM(model, tokenizer=tokenizer, budget=budget, reuse=reuse)
    found = lm_eval.simple_evaluate(model=lm, limit=limit, bootstrap_iters=0, **options)
    numbers = {
        task: {key: value for key, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
    return {"results": numbers, "tokens_read": lm.scorer.tokens_read, "tokens_asked": lm.scorer.tokens_asked}
