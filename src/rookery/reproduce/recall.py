"""Associative recall: how many pairs the families bring back out of a state of one size, and how soon they learn to."""

from typing import TYPE_CHECKING, Any

from rookery.data.recall import Recall
from rookery.registry import configure
from rookery.reproduce.arms import Arm, Fit, all_searched, fit, parameters
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
TASK = Recall(vocab_size=512, length=64, pairs=8)


def arms() -> list[Arm]:
    """Two blocks each, of equal width; heads of 16 keep the states small."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": TASK.vocab_size, "intermediate_size": 256}
    seven = {"decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 32}
    own = {"rwkv7": {"head_dim": 16, **seven}, "rwkv6": {"head_dim": 16, "mix_rank": 16, "decay_rank": 16}}
    own |= {"rwkv5": {"head_dim": 16}, "rwkv4": {}, "transformer": {"head_dim": 16, "intermediate_size": 176}}
    return [
        Arm(
            name="gpt" if model == "transformer" else model,
            model=model,
            overrides={**sizes, **more},
            baseline=model == "transformer",
        )
        for model, more in own.items()
    ]


def mixture(step: int) -> Recall:
    """A quarter, a half and all of the pairs in turn: easy rows let the recurrent arms off the plateau sooner."""
    return Recall(vocab_size=TASK.vocab_size, length=TASK.length, pairs=TASK.pairs >> (2 - step % 3))


def measure(arm: Arm, seed: int, how: Fit, work: Work) -> dict[str, Any]:
    """Trains one arm; its accuracy with all pairs while it learns."""
    work.say(f"{arm.name}, seed {seed}")
    # the test rows of `fit` are those of its last step's task: all pairs
    return {
        "curve": fit(arm.create(seed), lambda step: TASK if step == how.steps else mixture(step), seed, how, work.say)
    }


def experiment(work: Work) -> Outcome:
    how = Fit(
        steps=work.size(quick=4, default=1500, full=6000),
        batch_size=work.size(quick=2, default=32, full=32),
        lr=2e-3,
        stop_at=0.995,
        test_every=work.size(quick=2, default=125, full=250),
        test_rows=work.size(quick=2, default=256, full=512),
    )
    rates = work.size(quick=(2e-3,), default=(2e-3,), full=(1e-3, 2e-3, 3e-3))
    contenders = arms()
    found = all_searched(work, contenders, how=how, rates=rates, seeds=SEEDS, measure=measure)
    table = [row(arm, *found[arm.name]) for arm in contenders]
    shown, findings = judge(table)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(how, rates),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, {name: runs for name, (_, runs) in found.items()}),
        figure_size=(7, 4.2),
    )


def row(arm: Arm, rate: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    config = configure(arm.model, **arm.overrides)[1]
    reached = [next((step for step, value in run["curve"] if value >= 0.95), None) for run in runs]
    return {
        "model": arm.name,
        "baseline": arm.baseline,
        "parameters": parameters(arm.model, arm.overrides),
        "state bytes": config.state_nbytes(tokens_seen=TASK.length, batch=1, itemsize=4),
        "learning rate": f"{rate:g}",
        **mean_spread("accuracy", [run["curve"][-1][1] for run in runs]),
        "steps to 95%, by seed": ", ".join("never" if step is None else f"{step:,}" for step in reached),
    }


def judge(table: list[dict[str, Any]]) -> tuple[bool, str]:
    """The rule: RWKV-7 above 6, 5 and 4 by more than both spreads."""
    by_name = {row["model"]: row for row in table}
    best = by_name["rwkv7"]
    leads = {name: best["accuracy"] - by_name[name]["accuracy"] for name in ("rwkv6", "rwkv5", "rwkv4")}
    shown = all(lead > best["accuracy ±"] + by_name[name]["accuracy ±"] for name, lead in leads.items())
    text = f"""The rule: RWKV-7's mean accuracy lies above that of RWKV-6, 5 and 4 by more than both spreads together.

RWKV-7 recalls {100 * best["accuracy"]:.1f}% of the values; it lies above
{", ".join(f"{name} by {100 * lead:+.1f} points" for name, lead in leads.items())}. The GPT, whose cache keeps every
token, recalls {100 * by_name["gpt"]["accuracy"]:.1f}%. An arm that stops at 99.5% trains no further.

An accuracy far from 100% shows how soon an arm learns under this recipe, not what its state can hold (attention's
cache keeps everything): recall is learned suddenly, after a plateau whose length depends on the learning rate."""
    return shown, text


def setup(how: Fit, rates: tuple[float, ...]) -> str:
    listed = ", ".join(f"{rate:g}" for rate in rates)
    chosen = f"the best of {listed} on the first seed" if len(rates) > 1 else f"{listed}, not searched"
    return f"""Multi-query associative recall: {TASK.pairs} pairs, then each key once, {TASK.length} tokens, a
vocabulary of {TASK.vocab_size}, random filler, distances of power {TASK.alpha} (chance {TASK.chance:.4f}).
Training rows hold
{TASK.pairs // 4}, {TASK.pairs // 2} or {TASK.pairs} pairs in turn. Two blocks of width 64, heads of 16, low ranks of
16 (gate 32): whole models of the library with their published initial weights.

At most {how.steps:,} steps of {how.batch_size} fresh rows, AdamW with warm-up and cosine; the peak learning rate of an
arm is {chosen}. Tested every {how.test_every} steps on {how.test_rows} rows that training never saw."""


def draw(figure: "Figure", by_arm: dict[str, list[dict[str, Any]]]) -> None:
    axes = figure.subplots()
    for number, (name, runs) in enumerate(by_arm.items()):
        style = "--" if name == "gpt" else "-"
        for i, found in enumerate(runs):
            steps, values = zip(*found["curve"])
            label = name if i == 0 else None
            axes.plot(steps, values, style, color=f"C{number}", label=label, marker=".", lw=1.2)
    axes.set(xlabel="steps", ylabel="accuracy", ylim=(0, 1.03), title=f"recall of {TASK.pairs} pairs, one line a seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


REPRODUCTION = Reproduction(
    name="recall",
    claim="At equal width and depth, RWKV-7's delta rule recalls more of what it has read than RWKV-4 to 6.",
    source="RWKV-7, arXiv 2503.14456; task: Zoology, arXiv 2312.04927",
    experiment=experiment,
)
