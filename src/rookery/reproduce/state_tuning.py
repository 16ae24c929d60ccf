"""State Tuning: a table of facts is tuned into the start state of a frozen model, plainly, through a kernel,
decorrelated."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rookery.adapt.at_test_time import Budget, Mode, sample, tune_at_test_time
from rookery.adapt.decorrelate import decorrelate
from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.read_features import read_features
from rookery.adapt.state_tuning import StartState
from rookery.data.generated import UNLABELLED, rows
from rookery.models import create_model
from rookery.models.rwkv7 import RWKV7
from rookery.reproduce.arms import Fit, accuracy, fit
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
KEYS = 64
"""Keys and as many values: a fixed table is one value for each."""
PAIRS = 8
"""Pairs that a row of pretraining lists, and questions of every row."""
STEPS = (25, 50, 100, 150, 300)
"""Steps of tuning after which the table is asked for."""
JUDGED = 50
SIZES = {
    "vocab_size": 2 * KEYS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "intermediate_size": 256,
    "decay_rank": 8,
    "rate_rank": 8,
    "value_rank": 8,
    "gate_rank": 8,
}


@dataclass(frozen=True)
class InContext:
    """Rows of pretraining: pairs of a mapping drawn afresh, then its keys in another order, each with its value."""

    vocab_size: int = 2 * KEYS
    chance: float = 1 / KEYS

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys = generator.choice(KEYS, PAIRS, replace=False)
        return listed(keys, KEYS + generator.choice(KEYS, PAIRS, replace=False), generator)


def listed(keys: np.ndarray, values: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A row that lists these pairs and asks for all of them."""
    order = generator.permutation(PAIRS)
    tokens = np.concatenate([np.stack([keys, values], 1).ravel(), np.stack([keys[order], values[order]], 1).ravel()])
    labels = np.full(4 * PAIRS, UNLABELLED)
    labels[2 * PAIRS :: 2] = values[order]
    return tokens, labels


@dataclass(frozen=True)
class Table:
    """Rows of tuning: eight different keys of one fixed table, each with its value; nothing is listed before."""

    values: np.ndarray
    """The value of every key."""
    vocab_size: int = 2 * KEYS
    chance: float = 1 / KEYS

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return asked(self.values, generator.choice(KEYS, PAIRS, replace=False))


def asked(values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row that asks for these keys."""
    labels = np.full(2 * len(keys), UNLABELLED)
    labels[::2] = values[keys]
    return np.stack([keys, values[keys]], 1).ravel(), labels


def whole_table(values: np.ndarray, seed: int, times: int = 4) -> tuple[Tensor, Tensor]:
    """Rows that ask for every key so many times, in different orders."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(KEYS).reshape(-1, PAIRS) for _ in range(times)]
    made = [asked(values, keys) for order in orders for keys in order]
    tokens, labels = (torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*made))
    return tokens, labels


def table_of(seed: int) -> np.ndarray:
    return KEYS + np.random.default_rng(1000 + seed).permutation(KEYS)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a start state is tuned."""

    name: str
    lr: float
    kernel: str = ""
    """Transition of a kernel state; "" for a plain one."""
    decorrelated: bool = False
    sgd: bool = False
    baseline: bool = False


WAYS = (
    Way(name="plain", lr=0.3, baseline=True),
    Way(name="plain, decorrelated", lr=0.1, decorrelated=True),
    Way(name="kernel", lr=0.3, kernel="full"),
    Way(name="kernel, decorrelated", lr=0.1, kernel="full", decorrelated=True),
    Way(name="kernel that stays", lr=0.3, kernel="none"),
    Way(name="kernel that stays, decorrelated", lr=0.1, kernel="none", decorrelated=True),
    Way(name="plain, SGD", lr=10.0, sgd=True),
    Way(name="kernel that stays, decorrelated, SGD", lr=1.0, kernel="none", decorrelated=True, sgd=True),
)
BEST = "kernel that stays, decorrelated"
"""Whose tuned model guides at test time."""


class Pretrained:
    """The frozen models, made once."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.models: dict[int, RWKV7] = {}

    def __call__(self, seed: int) -> RWKV7:
        if seed not in self.models:
            self.models[seed] = pretrained(self.work, seed)
        return self.models[seed]


def pretrained(work: Work, seed: int) -> RWKV7:
    """The model that has learned to recall pairs in context; its weights are kept in the work folder."""
    path = work.folder / f"pretrained-{seed}.pt"
    model = create_model("rwkv7", seed=seed, **SIZES)

    def learn() -> dict[str, Any]:
        how = Fit(
            steps=work.size(quick=3, default=500, full=1500),
            batch_size=work.size(quick=4, default=64, full=64),
            lr=3e-3,
            stop_at=0.99,
            test_every=50,
            test_rows=64,
        )
        curve = fit(model, lambda step: InContext(), seed, how, work.say)
        torch.save(model.state_dict(), path)
        return {"curve": curve}

    work.part(f"pretrain-{seed}", learn)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)


def start_of(model: RWKV7, way: Way, values: np.ndarray, seed: int) -> StartState:
    """An untuned state of this form, calibrated on rows of the table."""
    tokens, labels = rows(Table(values), seed=seed, first=0, count=64, split="test")
    if not way.kernel:
        start = StartState(model)
    else:
        start = KernelStart(model, transition=way.kernel)
        start.calibrate(tokens)
    if way.decorrelated:
        decorrelate(start, read_features(start, tokens, mask=labels != UNLABELLED))
    return start


class Started:
    """A model that begins in a tuned state, where one is asked for that begins afresh."""

    def __init__(self, start: StartState) -> None:
        self.start, self.head = start, start.model[0].head

    def features(self, tokens: Tensor, state: None, cu_seqlens: None) -> tuple[Tensor, Any]:
        return self.start.model[0].features(tokens, self.start(tokens.shape[0]), cu_seqlens)


def tune(start: StartState, way: Way, values: np.ndarray, seed: int, steps: int) -> list[tuple[int, float]]:
    """Tunes in place; (steps, accuracy over the whole table) on the way."""
    kind = {"momentum": 0.9} if way.sgd else {"betas": (0.9, 0.99)}
    optimizer = (torch.optim.SGD if way.sgd else torch.optim.Adam)(start.parameters(), lr=way.lr, **kind)
    model, test, curve = Started(start), whole_table(values, seed), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = way.lr * (1 - 0.95 * (step - 1) / steps)
        tokens, labels = rows(Table(values), seed=seed, first=step * 32, count=32)
        features, _ = model.features(tokens, None, None)
        places = labels != UNLABELLED
        loss = torch.nn.functional.cross_entropy(model.head(features[places]), labels[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in STEPS or step == steps:
            curve.append((step, accuracy(model, *test)))
    return curve


def measure(work: Work, model: RWKV7, way: Way, seed: int) -> dict[str, Any]:
    """Tunes one state; its curve and size."""
    values = table_of(seed)
    start = start_of(model, way, values, seed)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    curve = tune(start, way, values, seed, work.size(quick=2, default=300, full=600))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    if way.name == BEST:
        start.fold()
        torch.save(start.state_dict(), work.folder / f"best-{seed}.pt")
    return {"curve": curve, "numbers": sum(p.numel() for p in start.parameters())}


def untuned(model: RWKV7, seed: int) -> dict[str, float]:
    """What the frozen model knows of the table: by itself, and with the asked pairs listed before the questions."""
    values = table_of(seed)
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(KEYS).reshape(-1, PAIRS) for _ in range(4)]
    made = [listed(keys, values[keys], generator) for order in orders for keys in order]
    shown = (torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*made))
    return {"alone": accuracy(model, *whole_table(values, seed)), "listed": accuracy(model, *shown)}


def at_test_time(work: Work, model: RWKV7, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Mode -> (forward-equivalents of a question, accuracy): every question by itself, from a state of zero."""
    way = next(way for way in WAYS if way.name == BEST)
    values = table_of(seed)
    guide = start_of(model, way, values, seed)
    guide.fold()
    guide.load_state_dict(torch.load(work.folder / f"best-{seed}.pt", weights_only=True))
    start = start_of(model, way, values, seed)
    fresh = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    keys = np.random.default_rng(seed).permutation(KEYS)[: work.size(quick=2, default=24, full=KEYS)]
    budgets: dict[Mode, list[Budget]] = {
        "distil": [Budget(steps=n, continuations=1, length=1, seed=seed) for n in work.size(**DISTIL)],
        "reward": [Budget(steps=n, answers=8, length=1, seed=seed) for n in work.size(**REWARD)],
        "select": [Budget(answers=n, length=1, seed=seed) for n in work.size(**SELECT)],
    }

    def answered(mode: Mode, budget: Budget, key: int) -> tuple[float, bool]:
        start.load_state_dict(fresh)
        spent = tune_at_test_time(start, [key], mode=mode, guide=(guide.model[0], guide), budget=budget)
        if mode == "select":
            return spent.forward_equivalents, spent.answer[0] == values[key]
        drawn = {"count": 1, "length": 1, "generator": torch.Generator(), "temperature": 0}
        return spent.forward_equivalents, int(sample(start.model[0], start, [key], **drawn)) == values[key]

    curves: dict[str, list[tuple[float, float]]] = {}
    for mode, tried in budgets.items():
        curves[mode] = []
        for budget in tried:
            found = [answered(mode, budget, int(key)) for key in keys]
            curves[mode].append((found[0][0], sum(right for _, right in found) / len(found)))
        work.say(f"  {mode}: " + "  ".join(f"{cost:.0f} → {right:.2f}" for cost, right in curves[mode]))
    return curves


DISTIL = {"quick": (0, 1), "default": (0, 1, 2, 4, 8, 16), "full": (0, 1, 2, 4, 8, 16, 32)}
REWARD = {"quick": (1,), "default": (1, 4), "full": (1, 2, 4, 8, 16)}
SELECT = {"quick": (1, 2), "default": (1, 4, 8, 16, 32, 64), "full": (1, 2, 4, 8, 16, 32, 64, 128)}


def experiment(work: Work) -> Outcome:
    work.planned = len(SEEDS) * (len(WAYS) + 3)
    model_of = Pretrained(work)
    found: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
    known, curves = [], []
    for seed in SEEDS:
        model = model_of(seed)
        known.append(work.part(f"untuned-{seed}", lambda: untuned(model, seed)))  # noqa: B023
        for number, way in enumerate(WAYS):
            found[way.name].append(work.part(f"way{number}-{seed}", lambda: measure(work, model, way, seed)))  # noqa: B023
        curves.append(work.part(f"test-time-{seed}", lambda: at_test_time(work, model, seed)))  # noqa: B023
    table = [row(way, found[way.name]) for way in WAYS] + controls(known)
    shown, findings = judge(table, curves, known)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(work),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, found, curves),
        figure_size=(13, 4.4),
    )


def at(curve: list[tuple[int, float]], steps: int) -> float:
    """Accuracy after so many steps (--quick: after the last)."""
    return dict(map(tuple, curve)).get(steps, curve[-1][1])


def row(way: Way, parts: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = {}
    for steps in STEPS[:-2] + STEPS[-1:]:
        accuracies |= mean_spread(f"at {steps} steps", [at(part["curve"], steps) for part in parts])
    return {
        "state": way.name,
        "baseline": way.baseline,
        "numbers trained": parts[0]["numbers"],
        "optimiser": f"{'SGD' if way.sgd else 'Adam'} {way.lr:g}",
        **accuracies,
    }


def controls(known: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of the untuned model."""
    made = []
    for name, key in (("none (untuned)", "alone"), ("none, the pairs in the text", "listed")):
        same = mean_spread("x", [one[key] for one in known])
        values: dict[str, Any] = {}
        for steps in STEPS[:-2] + STEPS[-1:]:
            values |= {f"at {steps} steps": same["x"], f"at {steps} steps ±": same["x ±"]}
        made.append({"state": name, "baseline": False, "numbers trained": 0, "optimiser": "–", **values})
    return made


def judge(table: list[dict[str, Any]], curves: list[dict], known: list[dict[str, float]]) -> tuple[bool, str]:
    """The rule: see its text."""
    by_name = {row["state"]: row for row in table}
    key = f"at {JUDGED} steps"

    def above(better: str, worse: str) -> bool:
        one, other = by_name[better], by_name[worse]
        return one[key] - other[key] > one[f"{key} ±"] + other[f"{key} ±"]

    upscaled, decorrelated = above("kernel", "plain"), above("kernel, decorrelated", "kernel")
    distilled, selected = best_at_equal_cost(curves)
    scaled = distilled > selected
    text = f"""The rule, fixed before the run: after {JUDGED} steps the kernel-upscaled state knows more of the table
than the plain one, and the decorrelated kernel state more than that, each by more than both spreads; and at test time
tuning by distillation answers more than the best of several samples does for no less computing.

The kernel state is {"above" if upscaled else "not above"} the plain one ({100 * by_name["kernel"][key]:.0f}% against
{100 * by_name["plain"][key]:.0f}%), the decorrelated one is {"above" if decorrelated else "not above"} it
({100 * by_name["kernel, decorrelated"][key]:.0f}%). At test time distillation answers {100 * distilled:.0f}%, the best
sample at no less computing {100 * selected:.0f}%. Decorrelation alone leaves the plain state at
{100 * by_name["plain, decorrelated"][key]:.0f}% after {JUDGED} steps.

An interpretation: the paper has no public code or tables to compare with. The task is chosen so that no untuned model
of any size can know the table ({100 * known[0]["alone"]:.0f}% here, chance {100 / KEYS:.1f}%), while the same model
reads {100 * known[0]["listed"]:.0f}% of it out of a text that lists it. The kernel state trains four times as many
numbers as the plain one. Learning rates are those of state_methods.md 1.10, not searched here; the guide at test time
is the same model with its tuned state, so that distillation shows what may be reached with a guide that knows the
answer."""
    return upscaled and decorrelated and scaled, text


def best_at_equal_cost(curves: list[dict[str, list[tuple[float, float]]]]) -> tuple[float, float]:
    """Mean accuracies of "select" with the largest budget, and of "distil" with the largest that costs no more."""
    distilled, selected = [], []
    for curve in curves:
        cost, right = curve["select"][-1]
        selected.append(right)
        distilled.append(max(accuracy for spent, accuracy in curve["distil"] if spent <= cost))
    return sum(distilled) / len(distilled), sum(selected) / len(selected)


def setup(work: Work) -> str:
    return f"""Two blocks of RWKV-7, width 64, heads of 16, low ranks of 8 (0.13 M parameters), learn to recall: rows of
{4 * PAIRS} tokens list {PAIRS} of {KEYS} keys with values drawn afresh, then ask for all; at most
{work.size(quick=3, default=500, full=1500)} steps of 64 rows, AdamW 3e-3. Then the weights are frozen. One table of
{KEYS} keys is fixed, and start states are tuned on rows that ask for {PAIRS} different keys and list nothing: 32 rows
a step, the learning rate falls to 5% linearly. Accuracy is over all {KEYS} keys at the answers' positions, each asked
four times.

Kernel states have 64 features per head (four times its channels), support vectors by spherical k-means of keys,
γ = 4 / median squared distance; one "that stays" neither decays nor is erased. Decorrelated: R = E[x xᵀ]^(−1/2), once,
from 256 positions. At test time every question is a text of one key and is tuned by itself, from zero, Adam 0.1, in the
form "{BEST}"; computing is counted in forward-equivalents of one token (a backward pass is two)."""


def draw(figure: "Figure", found: dict[str, list[dict[str, Any]]], curves: list[dict]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    for number, (name, parts) in enumerate(found.items()):
        style = ":" if "SGD" in name else "--" if "decorrelated" not in name else "-"
        color = f"C{0 if name.startswith('plain') else 2 if 'stays' in name else 1}"
        for i, part in enumerate(parts):
            steps, values = zip(*part["curve"])
            label = name if i == 0 else None
            left.plot(steps, values, style, color=color, label=label, marker=".", lw=1.2, zorder=number)
    left.set(xlabel="steps of tuning", ylabel="share of the table", ylim=(0, 1.03), xscale="log")
    left.set_xticks(STEPS, [str(steps) for steps in STEPS])
    left.set_xticks([], minor=True)
    left.set_title("one line a seed")
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    for number, mode in enumerate(curves[0]):
        for i, curve in enumerate(curves):
            cost, values = zip(*curve[mode])
            label = mode if i == 0 else None
            right.plot([max(1.0, x) for x in cost], values, color=f"C{number}", label=label, marker=".", lw=1.2)
    right.set(xlabel="forward-equivalents a question", ylim=(0, 1.03), title="at test time", xscale="log")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)


REPRODUCTION = Reproduction(
    name="state-tuning",
    claim="Tuning only the start state teaches a frozen RWKV-7 a task; a kernel-upscaled state learns it better than a "
    "plain one, decorrelated backpropagation sooner, and a guide's help at test time scales further.",
    source="State Tuning, arXiv 2504.05097; an interpretation, no public code or tables to compare with",
    experiment=experiment,
)
