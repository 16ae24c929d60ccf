"""Test-time scaling of a start state: more computing for one question, a better answer (State Tuning, arXiv
2504.05097).

The paper names a larger model as guide and no more; what is done with it here is an interpretation, without public code
or tables to compare with (state_methods.md 1.6):

    "distil"  the guide writes continuations of the prompt, and the state is tuned to follow its probabilities there
    "reward"  the model writes answers itself; the state is moved towards the better ones, and not too far
    "select"  the model writes answers, and the best is taken: no gradient, the baseline that the others must beat

What it costs is counted in forward-equivalents: one is the model's reading of one token; a backward pass is two, and a
reading by the guide as many as it has times the parameters.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from rookery.adapt.state_tuning import StartState, load_start
from rookery.nn.language_model import LanguageModel
from rookery.state import State
from rookery.tokenizers.base import Tokenizer

Mode = Literal["distil", "reward", "select"]
Start = Callable[[int], State] | None
Guide = tuple[LanguageModel, Start]
"""A model and what it starts from."""
Score = Callable[[list[int]], float]
"""How good an answer (token ids) is."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is done for one prompt."""

    steps: int = 8
    """Steps of the optimiser; 0 leaves the state as it is."""
    continuations: int = 4
    """Of the guide, a step ("distil")."""
    answers: int = 8
    """Of the model itself, a step ("reward") or altogether ("select")."""
    length: int = 32
    """Tokens of a continuation or answer at most."""
    lr: float = 0.1
    """Of Adam; about 0.1 for small models, 1.0 for plain states of released ones."""
    beta: float = 0.02
    """How strongly "reward" is held to the state that it began with, in KL."""
    temperature: float = 1.0
    seed: int = 0


@dataclass
class Spent:
    """What tuning for one prompt came to."""

    forward_equivalents: float = 0.0
    scores: list[float] = field(default_factory=list)
    """Mean score of the answers, a step ("reward"), or that of every answer ("select")."""
    losses: list[float] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    """"select": the best one's tokens."""


def tune_at_test_time(
    start: StartState,
    prompt: Sequence[int],
    *,
    mode: Mode,
    guide: Guide | None = None,
    score: Score | None = None,
    budget: Budget | None = None,
) -> Spent:
    """Tunes `start` in place for one prompt, of one token or more; what then answers is `start.model[0]` from `start`.

    Whoever wants to forget what was learned keeps a copy of `start.state_dict()`. `guide` is a model with the
    vocabulary of this one, and what it starts from (None: its fresh state); "distil" needs it, the other modes `score`,
    or the guide's mean log-probability of an answer where that is left out. ValueError where what is needed is missing.
    """
    budget = budget or Budget()
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not prompt:
        raise ValueError("there is nothing to answer: the prompt has no tokens")
    if guide is None and (mode == "distil" or score is None):
        raise ValueError(f"mode {mode!r} needs a guide{'' if mode == 'distil' else ', or a score for answers'}")
    ours = start.model[0].config.vocab_size
    if guide is not None and guide[0].config.vocab_size != ours:
        raise ValueError(f"the guide has {guide[0].config.vocab_size} tokens, the model {ours}; they must share them")
    spent = Spent()
    MODES[mode](start, list(prompt), guide, score, budget, spent)
    return spent


def sample(
    model: LanguageModel,
    start: Start,
    prompt: Sequence[int],
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    """Continuations of a prompt, int64 [count, length], drawn in parallel; temperature 0 takes the likeliest."""
    device = model.head.weight.device
    with torch.no_grad():
        tokens = torch.tensor([list(prompt)] * count, dtype=torch.int64, device=device)
        state = None if start is None else start(count)
        drawn = []
        for _ in range(length):
            logits, state = model(tokens, state)
            last = logits[:, -1].float().cpu()
            if temperature:
                tokens = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator).to(device)
            else:
                tokens = last.argmax(-1, keepdim=True).to(device)
            drawn.append(tokens)
    return torch.cat(drawn, 1) if drawn else torch.empty(count, 0, dtype=torch.int64, device=device)


def log_probs(model: LanguageModel, start: Start, prompt: Sequence[int], answers: Tensor) -> Tensor:
    """Log-probabilities of all next tokens at the answers' places, [count, length, vocab]."""
    count, length = answers.shape
    head = torch.tensor(list(prompt), device=answers.device).expand(count, -1)
    tokens = torch.cat([head, answers], 1)[:, :-1]
    logits, _ = model(tokens, None if start is None else start(count))
    return logits[:, -length:].log_softmax(-1)


def of_tokens(log_p: Tensor, answers: Tensor) -> Tensor:
    """Mean log-probability of every answer, [count]."""
    return log_p.gather(-1, answers[..., None])[..., 0].mean(-1)


def _distil(start, prompt, guide, score, budget, spent):
    teacher, their_start = guide
    model, generator = start.model[0], torch.Generator().manual_seed(budget.seed)
    optimizer = torch.optim.Adam(start.parameters(), lr=budget.lr, betas=(0.9, 0.99))
    read = budget.continuations * (len(prompt) + budget.length)
    for _ in range(budget.steps):
        drawn = {"count": budget.continuations, "length": budget.length, "temperature": budget.temperature}
        answers = sample(teacher, their_start, prompt, generator=generator, **drawn)
        with torch.no_grad():
            taught = log_probs(teacher, their_start, prompt, answers)
        learned = log_probs(model, start, prompt, answers)
        loss = kl_div(learned.flatten(0, 1), taught.flatten(0, 1), reduction="batchmean", log_target=True)
        _step(optimizer, loss, start, spent)
        # it writes, and reads what it has written once more for its probabilities
        spent.forward_equivalents += read * (3 + 2 * _ratio(teacher, model))


def _reward(start, prompt, guide, score, budget, spent):
    model, generator = start.model[0], torch.Generator().manual_seed(budget.seed)
    optimizer = torch.optim.Adam(start.parameters(), lr=budget.lr, betas=(0.9, 0.99))
    began = start(1).detach().clone()
    read = budget.answers * (len(prompt) + budget.length)
    for _ in range(budget.steps):
        drawn = {"count": budget.answers, "length": budget.length, "temperature": budget.temperature}
        answers = sample(model, start, prompt, generator=generator, **drawn)
        scores = _scores(guide, score, prompt, answers)
        log_p = log_probs(model, start, prompt, answers)
        with torch.no_grad():
            before = log_probs(model, lambda rows: began.select([0] * rows), prompt, answers)
        loss = reward_loss(log_p, before, answers, scores, budget.beta)
        _step(optimizer, loss, start, spent)
        spent.scores.append(float(scores.mean()))
        spent.forward_equivalents += read * (5 + (_ratio(guide[0], model) if score is None else 0))


def reward_loss(log_p: Tensor, before: Tensor, answers: Tensor, scores: Tensor, beta: float) -> Tensor:
    """−Σ advantage · mean log p(answer) / count + β KL(p ‖ p at the beginning); equal scores have no advantage."""
    advantage = (scores - scores.mean()) / (scores.std(correction=0) + 1e-6)
    kl = (log_p.exp() * (log_p - before)).sum(-1).mean()
    return -(advantage * of_tokens(log_p, answers)).mean() + beta * kl


def _select(start, prompt, guide, score, budget, spent):
    model, generator = start.model[0], torch.Generator().manual_seed(budget.seed)
    drawn = {"count": budget.answers, "length": budget.length, "temperature": budget.temperature}
    answers = sample(model, start, prompt, generator=generator, **drawn)
    scores = _scores(guide, score, prompt, answers)
    spent.scores, spent.answer = scores.tolist(), answers[int(scores.argmax())].tolist()
    read = budget.answers * (len(prompt) + budget.length)
    spent.forward_equivalents += read * (1 + (_ratio(guide[0], model) if score is None else 0))


MODES = {"distil": _distil, "reward": _reward, "select": _select}


def _scores(
    guide: tuple[LanguageModel, Start] | None, score: Score | None, prompt: list[int], answers: Tensor
) -> Tensor:
    if score is not None:
        return torch.tensor([float(score(answer)) for answer in answers.tolist()], device=answers.device)
    with torch.no_grad():
        return of_tokens(log_probs(*guide, prompt, answers), answers).float()


def _ratio(guide: LanguageModel, model: LanguageModel) -> float:
    """How many times the parameters of the model the guide has."""
    return sum(p.numel() for p in guide.parameters()) / sum(p.numel() for p in model.parameters())


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, start: StartState, spent: Spent) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    start.project()
    spent.losses.append(float(loss.detach()))


def answer_at_test_time(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    mode: Mode,
    guide: LanguageModel,
    budget: Budget,
    *,
    state: str | os.PathLike[str] | None = None,
    guide_state: str | os.PathLike[str] | None = None,
    wanted: str | None = None,
) -> tuple[StartState, str, Spent]:
    """The tuned state, the answer in words, and what it took: `tune_at_test_time` for text.

    `state` and `guide_state` are files of tuned states to begin with; `wanted` is a regular expression whose matches in
    an answer are its score, in place of the guide's probability.
    """
    start = StartState(model) if state is None else load_start(state, model)
    theirs: Start = None
    if guide_state is not None:
        theirs = load_start(guide_state, guide)
        guide = theirs.model[0]
    score = None
    if wanted is not None:
        pattern = re.compile(wanted)
        score = lambda answer: float(len(pattern.findall(tokenizer.decode(answer))))  # noqa: E731
    tokens = tokenizer.encode(prompt)
    spent = tune_at_test_time(start, tokens, mode=mode, guide=(guide, theirs), score=score, budget=budget)
    answer = spent.answer
    if mode != "select":
        drawn = {"count": 1, "length": budget.length, "generator": torch.Generator(), "temperature": 0}
        answer = sample(start.model[0], start, tokens, **drawn)[0].tolist()
    if tokenizer.eos_id in answer:
        answer = answer[: answer.index(tokenizer.eos_id)]
    return start, tokenizer.decode(answer), spent
