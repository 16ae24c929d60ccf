"""RRWKV: how far back RWKV-4 looks with mediums, and what they and their sums are worth for a long delay."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rookery.data.generated import UNLABELLED
from rookery.evaluate.influence import influence
from rookery.models import create_model
from rookery.models.rrwkv import RRWKV
from rookery.nn.initial import orthogonal_
from rookery.nn.language_model import LanguageModel
from rookery.reproduce.arms import Arm, Fit, fit
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
INTERVAL = 16


@dataclass(frozen=True, kw_only=True)
class Delay:
    """The first token is a label, then comes noise; the last token asks for the label."""

    length: int
    vocab_size: int = 16
    chance: float = 1 / 8

    def row(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = generator.integers(8, 15, size=self.length), np.full(self.length, UNLABELLED)
        tokens[0], tokens[-1] = generator.integers(8), 15
        labels[-1] = tokens[0]
        return tokens, labels


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 16}


def without_retrospection(seed: int) -> RRWKV:
    """Mediums are added to the mixers' inputs, but the average of values does not hold them."""
    model = create_model("rrwkv", seed=seed, interval=INTERVAL, **SIZES)
    for block in model.blocks:
        block.att.rr_um.requires_grad_(False).fill_(-1e4)
    return model


def without_inputs(seed: int) -> RRWKV:
    """The average of values holds mediums, but the mixers' inputs are those of RWKV-4."""
    model = create_model("rrwkv", seed=seed, interval=INTERVAL, **SIZES)
    for name, parameter in model.named_parameters():
        if "rr_rho" in name:
            parameter.requires_grad_(False)
    return model


ARMS = [
    Arm(name="rwkv4", overrides=SIZES, baseline=True),
    Arm(name="rrwkv", overrides={**SIZES, "interval": INTERVAL}),
    Arm(name="only in the inputs", build=without_retrospection),
    Arm(name="only in the average", build=without_inputs),
]
SEVEN = Arm(
    name="rwkv7",
    overrides={**SIZES, "head_dim": 16, "decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 16},
)


def awake(name: str, seed: int, width: int, layers: int, **overrides: Any) -> LanguageModel:
    """A fresh model whose matrices that start at zero are orthogonal instead: a fresh one passes nothing on."""
    model = create_model(name, seed=seed, hidden_size=width, num_hidden_layers=layers, vocab_size=64, **overrides)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".weight") and parameter.dim() == 2 and not parameter.any():
                orthogonal_(parameter, 1.0, generator)
    return model


LOOKING = {"rwkv4": {}, "rrwkv, 64": {"interval": 64}, "rrwkv, 16": {"interval": 16}}
"""Models whose influence is measured, and their settings."""


def looks_back(name: str, seed: int, distances: list[int], width: int, layers: int) -> list[float]:
    model = awake(name.partition(",")[0], seed, width, layers, **LOOKING[name])
    return influence(model, distances, rows=4, seed=seed)


def experiment(work: Work) -> Outcome:
    distances = work.size(quick=[8, 40, 80], default=[64, 256, 512, 1000], full=[64, 256, 512, 1000, 2000])
    width, layers = work.size(quick=(16, 2), default=(64, 4), full=(64, 4))
    task = Delay(length=work.size(quick=24, default=128, full=512))
    how = Fit(
        steps=work.size(quick=4, default=180, full=600),
        batch_size=work.size(quick=2, default=16, full=32),
        lr=1e-2,
        stop_at=0.995,
        test_every=work.size(quick=2, default=15, full=15),
        test_rows=work.size(quick=2, default=64, full=256),
    )
    contenders = [*ARMS, SEVEN] if work.scale == "full" else ARMS
    work.planned = len(SEEDS) * (len(LOOKING) + len(contenders))
    seen: dict[str, list[list[float]]] = {}
    for number, name in enumerate(LOOKING):
        seen[name] = [
            work.part(f"influence-{number}-{s}", lambda n=name, s=s: looks_back(n, s, distances, width, layers))
            for s in SEEDS
        ]
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for arm in contenders:
        curves[arm.name] = [
            work.part(f"delay-{arm.name}-{s}", lambda a=arm, s=s: fit(a.create(s), lambda step: task, s, how, work.say))
            for s in SEEDS
        ]
    table = [row(arm, curves[arm.name], seen) for arm in contenders]
    shown, findings = judge(table, seen, distances)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(task, how, width, layers),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, seen, distances, curves),
        figure_size=(10, 4),
    )


def row(arm: Arm, runs: list[list[tuple[int, float]]], seen: dict[str, list[list[float]]]) -> dict[str, Any]:
    model = arm.create(0)
    measured = {"rwkv4": "rwkv4", "rrwkv": f"rrwkv, {INTERVAL}"}.get(arm.name)
    far = [values[-1] for values in seen[measured]] if measured else []
    return {
        "model": arm.name,
        "baseline": arm.baseline,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state bytes": model.init_state(1).nbytes,
        **mean_spread("accuracy after the delay", [run[-1][1] for run in runs]),
        "steps to 95%, by seed": ", ".join(str(reached(run) or "never") for run in runs),
        "influence of the farthest token": f"{sum(far) / len(far):.1e}" if far else "–",
    }


def reached(run: list[tuple[int, float]]) -> int | None:
    return next((step for step, value in run if value >= 0.95), None)


def judge(table: list[dict[str, Any]], seen: dict[str, list[list[float]]], distances: list[int]) -> tuple[bool, str]:
    """The rule: far influence that does not fade, and a higher accuracy after the delay than RWKV-4's."""
    plain, looking = seen["rwkv4"], seen[f"rrwkv, {INTERVAL}"]
    times = [mine[-1] / max(theirs[-1], 1e-30) for mine, theirs in zip(looking, plain)]
    flat = [mine[-2] / mine[-1] for mine in looking]
    far = min(times) >= 50 and all(0.5 <= ratio <= 2 for ratio in flat)
    by_name = {row["model"]: row for row in table}
    with_, without = by_name["rrwkv"], by_name["rwkv4"]
    lead = with_["accuracy after the delay"] - without["accuracy after the delay"]
    learns = lead > with_["accuracy after the delay ±"] + without["accuracy after the delay ±"]
    lines = [
        f"| {name} | " + " | ".join(f"{np.mean([run[i] for run in runs]):.1e}" for i in range(len(distances))) + " |"
        for name, runs in seen.items()
    ]
    head = "| model, interval | " + " | ".join(f"{d} tokens back" for d in distances) + " |"
    yes = {True: "met", False: "not met"}
    parts = {n: by_name[n]["accuracy after the delay"] for n in ("only in the inputs", "only in the average")}
    return far and learns, "\n".join(
        [
            "The rule has two parts. In fresh models, the farthest token moves the last output at least 50 times as "
            "much with mediums as without, on every seed, and as much as one half as far back within a factor of two; "
            "and after equal training the accuracy after a long delay is higher than RWKV-4's by more than both "
            "spreads.",
            "",
            f"The first part is {yes[far]}: {', '.join(f'{x:.0f} times' for x in times)}, "
            f"{', '.join(f'{x:.2f}' for x in flat)}. The second is {yes[learns]} ({lead:+.2f}).",
            "",
            f"Mediums only in the mixers' inputs reach {parts['only in the inputs']:.2f}, only in the average of "
            f"values {parts['only in the average']:.2f}, both {with_['accuracy after the delay']:.2f}.",
            "",
            head,
            "|" + "---|" * (len(distances) + 1),
            *lines,
            "",
            "The paper is withdrawn, and only its idea could be read; equations and sizes are ours, so this tells of "
            "the idea and not of the paper. A flat memory of everything fixes the length of the way, not what fits in.",
        ]
    )


def setup(task: Delay, how: Fit, width: int, layers: int) -> str:
    return f"""**Influence.** The norm of the gradient of a random projection of the last position's features with
respect to the embedding so many tokens back, mean of 4 rows of random tokens. Fresh models of {layers} blocks of width
{width}; matrices that start at zero are orthogonal instead, since a fresh RWKV-4 passes nothing on.

**Delay.** The first of {task.length} tokens is one of 8 labels, then noise of 7 other tokens, the last one asks for the
label (chance {task.chance:.3f}). Two blocks of width {SIZES["hidden_size"]}, interval {INTERVAL}. At most {how.steps}
steps of {how.batch_size} fresh rows, AdamW with warm-up and cosine, peak {how.lr:g} for all arms; tested every
{how.test_every} steps on {how.test_rows} rows; an arm that reaches 99.5% stops. Length, depth and rate were chosen
after single runs on seed 0, mostly of RRWKV: with one block it learned nothing in 200 steps. "Only in the inputs": the
average of values holds no mediums (no retrospection); "only in the average": ρ is frozen at zero. A first run,
with a delay of 256 and a rate of 0.002, was stopped after one run of RWKV-4."""


def draw(
    figure: "Figure",
    seen: dict[str, list[list[float]]],
    distances: list[int],
    curves: dict[str, list[list[tuple[int, float]]]],
) -> None:
    left, right = figure.subplots(1, 2)
    for number, (name, runs) in enumerate(seen.items()):
        for i, values in enumerate(runs):
            left.plot(distances, values, color=f"C{number}", label=name if i == 0 else None, marker=".", lw=1.2)
    left.set(xlabel="tokens back", ylabel="gradient norm", yscale="log", title="influence in fresh models")
    for number, (name, runs) in enumerate(curves.items()):
        style = "--" if name == "rwkv4" else "-"
        for i, run in enumerate(runs):
            steps, values = zip(*run)
            right.plot(steps, values, style, color=f"C{number}", label=name if i == 0 else None, marker=".", lw=1.2)
    right.set(xlabel="steps", ylabel="accuracy", ylim=(0, 1.03), title="the label after a long delay")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


REPRODUCTION = Reproduction(
    name="rrwkv",
    claim="Mediums, summaries at regular intervals that both mixers look back at, shorten the way from far tokens to "
    "the present.",
    source="RRWKV, arXiv 2306.05176 (withdrawn; our interpretation)",
    experiment=experiment,
)
