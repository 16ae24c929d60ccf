"""Bone (today MiSS and BAT) against LoRA, PiSSA, DoRA, all weights and the start state, at equal trainable numbers."""

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rookery.adapt.config import AdaptConfig
from rookery.adapt.peft import attach
from rookery.adapt.state_tuning import StartState
from rookery.data.jsonl import Sample
from rookery.data.packing import collate
from rookery.engine.llm import EMBEDDED
from rookery.models import load
from rookery.nn.language_model import LanguageModel
from rookery.reproduce.arms import searched
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread
from rookery.state import State
from rookery.tokenizers import Tokenizer
from rookery.tokenizers.pairing import resolve
from rookery.train.config import OptimConfig
from rookery.train.optim import Optimizer, learning_rate
from rookery.train.tasks.sft import sft_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
EQUAL = 2e-3
"""The one rate of the comparison at equal rates."""
ADAPTERS = (2e-3, 8e-3)
"""Rates among which each adapter's best is chosen on the first seed."""
NAMES = ["Tom", "Anna", "Ben", "Lily", "Sam", "Mia", "Max", "Lucy", "Tim", "Sara", "Jack", "Emma"]
THINGS = ["apples", "toys", "books", "balls", "cakes", "stones", "cups", "shells"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to tune."""

    name: str
    adapt: AdaptConfig
    rates: tuple[float, ...] = ADAPTERS
    """Learning rates that are tried on the first seed."""
    more_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    """The same for --full."""
    equal: bool = True
    """Takes part in the comparison at equal rates."""


def arms() -> list[Arm]:
    """147,456 trainable numbers each (DoRA 138,240), but for all weights and for the state."""
    low = {"lora": 8, "pissa": 8, "dora": 7, "miss": 16, "bat": 16}
    made = [
        Arm(name=name, adapt=AdaptConfig(method=name, rank=rank, alpha=2.0 * rank * (name != "pissa")))
        for name, rank in low.items()
    ]
    whole = {"rates": (1e-3,), "more_rates": (5e-4, 1e-3, 2e-3), "equal": False}
    made.append(Arm(name="full", adapt=AdaptConfig(method="full"), **whole))
    whole |= {"rates": (1.0,), "more_rates": (0.01, 0.1, 1.0)}
    return [*made, Arm(name="state", adapt=AdaptConfig(method="state"), **whole)]


QUICK = ("lora", "miss", "bat", "state")


def sentence(pick: random.Random, held_out: bool) -> tuple[str, str]:
    """A question with its answer's beginning, and the answer; which sums are held out depends on the operands alone."""
    while True:
        a, b = pick.randrange(10, 100), pick.randrange(10, 100)
        minus = pick.random() < 0.5
        if minus and b > a:
            a, b = b, a
        if (((a * 100 + b) * 2 + minus) % 17 < 2) == held_out:
            break
    who, what = pick.choice(NAMES), pick.choice(THINGS)
    verb = pick.choice(("gives away", "loses") if minus else ("buys", "finds"))
    sign = "-" if minus else "+"
    start = f"{who} has {a} {what} and {verb} {b} of them. " if minus else f"{who} has {a} {what} and {verb} {b} more. "
    return f"{start}{who} has {a}{sign}{b}=", f"{a - b if minus else a + b} {what}.\n"


def sentences(count: int, seed: int, held_out: bool = False) -> list[tuple[str, str]]:
    """`count` of them, the same for the same seed."""
    pick = random.Random(seed)
    return [sentence(pick, held_out) for _ in range(count)]


def samples(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Sample]:
    """Whole sentences, learned from the first token on; token 0 stands before them."""
    rows = [np.array([0, *tokenizer.encode(start + end)]) for start, end in pairs]
    return [Sample(row, np.ones(len(row), dtype=bool)) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    steps: int
    batch: int
    held_out: int
    answers: int
    own: int
    """Rows of the base's own text, of 96 tokens, on which forgetting is measured."""


class Study:
    """What all arms share: the base, its tokenizer, what is held out, the base's own text."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        base = load(EMBEDDED, dtype=torch.float32)
        self.tokenizer = resolve(vocab_size=base.config.vocab_size, path=EMBEDDED)
        self.pairs = sentences(max(sizes.held_out, sizes.answers), seed=999, held_out=True)
        self.test = collate(samples(self.pairs[: sizes.held_out], self.tokenizer))
        self.bytes = sum(len(start + end) for start, end in self.pairs[: sizes.held_out])
        self.own = own_text(base, sizes.own, 96)

    def batch(self, seed: int, step: int) -> Any:
        """The sentences of a step: the same for all arms."""
        return collate(samples(sentences(self.sizes.batch, seed=1_000_000 * (seed + 1) + step), self.tokenizer))

    @torch.no_grad()
    def bits(self, model: LanguageModel, start: StartState | None) -> float:
        """Bits per byte of the held-out sentences."""
        loss = float(sft_loss(model, self.test, start=start))
        return loss * self.test.targets.numel() / self.bytes / math.log(2)

    @torch.no_grad()
    def exact(self, model: LanguageModel, start: StartState | None) -> float:
        """Share of the held-out sums whose digits come out right, the likeliest token at a time."""
        right = 0
        for question, answer in self.pairs[: self.sizes.answers]:
            tokens = torch.tensor([[0, *self.tokenizer.encode(question)]])
            logits, state = model(tokens, start(1) if start else None)
            said: list[int] = []
            for _ in range(6):
                said.append(int(logits[0, -1].argmax()))
                logits, state = model(torch.tensor([[said[-1]]]), state)
            right += self.tokenizer.decode(said).startswith(answer.split(" ")[0] + " ")
        return right / self.sizes.answers

    @torch.no_grad()
    def forgotten(self, model: LanguageModel, start: StartState | None) -> float:
        """Nats a token of the base's own text."""
        logits, _ = model(self.own[:, :-1], start(len(self.own)) if start else None)
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), self.own[:, 1:].flatten()))


@torch.no_grad()
def own_text(model: LanguageModel, rows: int, length: int) -> Tensor:
    """What the base writes by itself at temperature 1, [rows, length]."""
    generator, state = torch.Generator().manual_seed(7), None
    columns = [torch.zeros(rows, 1, dtype=torch.int64)]
    for _ in range(length - 1):
        logits, state = model(columns[-1], state)
        columns.append(torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator))
    return torch.cat(columns, dim=1)


def optim(rate: float) -> OptimConfig:
    """adaptation.md E.2.2, with a shorter warm-up for fewer steps."""
    return OptimConfig(lr=rate, final_lr=rate / 10, warmup_steps=10, weight_decay=0.0, eps=1e-8)


def tuned(study: Study, arm: Arm, seed: int, rate: float) -> dict[str, Any]:
    """Trains one arm; its losses and figures."""
    model = load(EMBEDDED, dtype=torch.float32)
    start: StartState | None = None
    trained: nn.Module = model
    if arm.adapt.method == "state":
        model.requires_grad_(False)
        trained = start = StartState(model)
    elif arm.adapt.method != "full":
        attach(model, arm.adapt, seed)
    settings, sizes = optim(rate), study.sizes
    numbers = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    optimizer, losses, norms, seconds = Optimizer(trained, settings, torch.float32), [], [], []
    state: State | Any = start
    for step in range(1, sizes.steps + 1):
        began = time.process_time()
        loss = sft_loss(model, study.batch(seed, step), start=state)
        loss.backward()
        norms.append(optimizer.step(learning_rate(settings, step, sizes.steps)))
        losses.append(loss.item())
        seconds.append(time.process_time() - began)
    return {
        "numbers": numbers,
        "losses": losses,
        "first norm": norms[0],
        "seconds": statistics.median(seconds),
        "bits": study.bits(model, start),
        "exact": study.exact(model, start),
        "own": study.forgotten(model, start),
    }


def experiment(work: Work) -> Outcome:
    sizes = Sizes(
        steps=work.size(quick=2, default=50, full=200),
        batch=work.size(quick=2, default=6, full=8),
        held_out=work.size(quick=2, default=32, full=256),
        answers=work.size(quick=1, default=24, full=400),
        own=work.size(quick=2, default=8, full=32),
    )
    seeds = work.size(quick=SEEDS[:2], default=SEEDS, full=(*SEEDS, 3, 4))
    study, contenders = Study(sizes), [arm for arm in arms() if work.scale != "quick" or arm.name in QUICK]
    work.planned = (len(contenders) + 2) * len(seeds)

    def among(rates: Sequence[float], arm: Arm) -> tuple[float, list[dict[str, Any]]]:
        """The rate with the lowest final loss on the first seed, and all seeds' runs with it."""
        how = {"train": partial(tuned, study), "score": lambda run: -final(run["losses"])}
        return searched(work, arm, rates=rates, seeds=seeds, **how)

    at_equal = {arm.name: among((EQUAL,), arm)[1] for arm in contenders if arm.equal}
    best, at_best = {}, {}
    for arm in contenders:
        rates = work.size(quick=arm.rates[:1], default=arm.rates, full=arm.more_rates)
        best[arm.name], at_best[arm.name] = among(rates, arm)
    base = load(EMBEDDED, dtype=torch.float32)
    before = {name: getattr(study, name)(base, None) for name in ("bits", "exact", "forgotten")}
    shown, findings = judge(at_best, at_equal, before)
    return Outcome(
        table=[row(arm, best[arm.name], at_best[arm.name], at_equal.get(arm.name), before) for arm in contenders],
        shown=shown,
        findings=findings,
        setup=setup(sizes),
        seeds=seeds,
        plot=lambda figure: draw(figure, at_best, at_equal),
        figure_size=(9, 4),
    )


def final(losses: list[float]) -> float:
    """Mean loss of the last ten steps."""
    return statistics.fmean(losses[-10:])


def early(losses: list[float]) -> float:
    """Mean loss of the steps 41 to 50, or of the last ten of fewer."""
    return statistics.fmean(losses[40:50] or losses[-10:])


def row(
    arm: Arm, rate: float, runs: list[dict[str, Any]], equal: list[dict[str, Any]] | None, before: dict[str, float]
) -> dict[str, Any]:
    same = [early(run["losses"]) for run in equal] if equal else None
    name = f"loss at step 50, rate {EQUAL:g}"
    return {
        "method": arm.name,
        "baseline": arm.name == "lora",
        "trainable": runs[0]["numbers"],
        **(mean_spread(name, same) if same else dict.fromkeys(mean_spread(name, [0]))),
        "best rate": f"{rate:g}",
        **mean_spread("final loss", [final(run["losses"]) for run in runs]),
        **mean_spread("bits/byte", [run["bits"] for run in runs]),
        **mean_spread("sums right", [run["exact"] for run in runs]),
        **mean_spread("forgotten, nats", [run["own"] - before["forgotten"] for run in runs]),
        "first gradient norm": statistics.fmean(run["first norm"] for run in runs),
        "seconds a step": statistics.fmean(run["seconds"] for run in runs),
    }


def judge(
    best: dict[str, list[dict[str, Any]]], equal: dict[str, list[dict[str, Any]]], before: dict[str, float]
) -> tuple[bool, str]:
    """The rule of adaptation.md E.2.3."""
    at = {name: [early(run["losses"]) for run in runs] for name, runs in equal.items()}
    first = all(min(lora - miss, lora - bat) > 0 for lora, miss, bat in zip(at["lora"], at["miss"], at["bat"]))
    ends = {name: [final(run["losses"]) for run in best[name]] for name in ("lora", "miss")}
    margin = statistics.stdev(ends["lora"])
    means = {name: statistics.fmean(values) for name, values in ends.items()}
    second = means["miss"] <= means["lora"] + margin
    order = ", ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in sorted(at.items(), key=_mean))
    text = f"""The rule: at one rate ({EQUAL:g}) MiSS and BAT have a lower loss than LoRA around step 50 on every seed
({_said(first)}), and at the best rate of each MiSS ends at most one standard deviation above LoRA
({_said(second)}: {means["miss"]:.3f} against {means["lora"]:.3f} ± {margin:.3f}).

Around step 50 at the equal rate: {order}. At one rate MiSS and BAT take larger steps, as their first
gradient norms say; the best rates show what is left of the lead. Before tuning the base needs
{before["bits"]:.3f} bits a byte for the new sentences and answers {100 * before["exact"]:.0f}% of the
sums. So few steps teach the sentences' form; sums stay hard for a model of this size, so the share that
is right says little. Nor does forgetting compare the methods alone: it grows with the rate, and the
adapters' rates are larger than that of all weights."""
    return first and second, text


def _mean(item: tuple[str, list[float]]) -> float:
    return statistics.fmean(item[1])


def _said(held: bool) -> str:
    return "holds" if held else "does not hold"


def setup(sizes: Sizes) -> str:
    return f"""The base is the model that ships with the package: four blocks of RWKV-7, 256 wide, 4.5 million weights,
trained on children's stories. The new text is made up: "Tom has 34 apples and buys 27 more. Tom has
34+27=61 apples.", with {len(NAMES)} names, {len(THINGS)} things, sums and differences of numbers from
10 to 99, of which some pairs never appear in training. {sizes.held_out} held-out sentences are measured
in bits a byte, {sizes.answers} are answered with the likeliest tokens; forgetting is the rise of the
loss on {sizes.own} rows of the base's own text.

Adapters on all six matrices of a block, of equal size: LoRA and PiSSA of rank 8, MiSS and BAT (peft's
form) of 16 rows; DoRA of rank 7 is 6% smaller, of rank 8 it would be larger. LoRA and DoRA are scaled
by 2, as usual. {sizes.steps} steps of {sizes.batch} sentences, AdamW (0.9, 0.99), warm-up 10, cosine to
a tenth, clip 1, no decay of weights; seeds move the adapters' first values and the order of sentences.
The best rate of an adapter is that of {" and ".join(f"{rate:g}" for rate in ADAPTERS)} with the lower
final loss on the first seed; all weights have 1e-3, the state 1. The larger one may not be large enough
where it is the best; `--full` searches further."""


def draw(figure: "Figure", best: dict[str, list[dict[str, Any]]], equal: dict[str, list[dict[str, Any]]]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, runs, title in ((left, equal, f"one rate, {EQUAL:g}"), (right, best, "best rate of each")):
        for number, (name, some) in enumerate(runs.items()):
            mean = np.mean([run["losses"] for run in some], axis=0)
            axes.plot(np.arange(1, len(mean) + 1), mean, color=f"C{number}", label=name, lw=1.2)
        axes.set(xlabel="step", title=title, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set(ylabel="loss, nats a token, mean over seeds")


REPRODUCTION = Reproduction(
    name="bone",
    claim="With as many trainable numbers as LoRA, one shared block a matrix (Bone: today MiSS, BAT) learns faster.",
    source="Bone / DiSHA / MiSS, arXiv 2409.15371, table of results and loss curves",
    experiment=experiment,
)
