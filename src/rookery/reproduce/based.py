"""BASED's dial: associative recall against the bytes of the state, with the features and the window swept."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rookery.data.recall import Recall
from rookery.registry import configure
from rookery.reproduce.arms import Arm, Fit, all_searched, fit, parameters
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
TASK = Recall(vocab_size=128, length=32, pairs=8)
FEATURES = (1, 2, 4, 16)
WINDOWS = (4, 8, 16)
ATTENTION = "attention"
SLOWER = 0.5
"""Share of the learning rate for RWKV-7, which has MLPs and other initial weights."""


def arms() -> list[Arm]:
    """A convolution and one mixer, no MLP, as in Zoology; and whole RWKV-7 models of two blocks."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": TASK.vocab_size}
    # the published 0.02 is for widths of 1024 and more
    own = {"num_heads": 1, "intermediate_size": 0, "padding_rows": 0, "initializer_range": 0.08}

    def based(name: str, **more: Any) -> Arm:
        given = {"linear_layers": (), "window_layers": (), **more}
        return Arm(name=name, model="based", overrides={**sizes, **own, **given}, baseline=name == ATTENTION)

    low = {"decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 32, "intermediate_size": 128}
    return [
        # a window of the whole row is attention to everything
        based(ATTENTION, window_layers=(1,), window=TASK.length),
        *(based(f"window {w}", window_layers=(1,), window=w) for w in WINDOWS),
        *(based(f"features {f}", linear_layers=(1,), feature_dim=f) for f in FEATURES),
        based(
            "features 4, window 8", num_hidden_layers=3, linear_layers=(1,), window_layers=(2,), feature_dim=4, window=8
        ),
        *(Arm(name=f"rwkv7, heads of {n}", model="rwkv7", overrides={**sizes, **low, "head_dim": n}) for n in (8, 32)),
    ]


def measure(arm: Arm, seed: int, how: Fit, work: Work) -> dict[str, Any]:
    """Trains one arm; its accuracy while it learns."""
    work.say(f"{arm.name}, seed {seed}")
    if arm.model == "rwkv7":
        how = replace(how, lr=SLOWER * how.lr)
    return {"curve": fit(arm.create(seed), lambda step: TASK, seed, how, work.say)}


def experiment(work: Work) -> Outcome:
    how = Fit(
        steps=work.size(quick=2, default=300, full=1500),
        batch_size=work.size(quick=2, default=64, full=64),
        lr=1e-2,
        stop_at=0.995,
        test_every=work.size(quick=1, default=50, full=100),
        test_rows=work.size(quick=2, default=256, full=512),
    )
    rates = work.size(quick=(1e-2,), default=(1e-2,), full=(3e-3, 1e-2, 2e-2))
    contenders = arms()
    found = all_searched(work, contenders, how=how, rates=rates, seeds=SEEDS, measure=measure)
    table = [row(arm, found[arm.name][1]) for arm in contenders]
    shown, findings = judge(table)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(how, rates),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, table),
        figure_size=(7, 4.4),
    )


def row(arm: Arm, runs: list[dict[str, Any]]) -> dict[str, Any]:
    config = configure(arm.model, **arm.overrides)[1]
    return {
        "model": arm.name,
        "baseline": arm.baseline,
        "parameters": parameters(arm.model, arm.overrides),
        "state bytes": config.state_nbytes(tokens_seen=TASK.length, batch=1, itemsize=4),
        **mean_spread("accuracy", [run["curve"][-1][1] for run in runs]),
        "steps, by seed": ", ".join(str(run["curve"][-1][0]) for run in runs),
    }


def judge(table: list[dict[str, Any]]) -> tuple[bool, str]:
    """The rule: see the text below."""
    by_name = {row["model"]: row for row in table}

    def above(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one["accuracy"] - other["accuracy"] > one["accuracy ±"] + other["accuracy ±"]

    def rises(rows: list[dict[str, Any]]) -> bool:
        return above(rows[-1], rows[0]) and not any(above(one, next_) for one, next_ in zip(rows, rows[1:]))

    features = [by_name[f"features {f}"] for f in FEATURES]
    windows = [by_name[f"window {w}"] for w in WINDOWS]
    attention = by_name[ATTENTION]
    near = attention["accuracy"] - features[-1]["accuracy"] < 0.05
    cheaper = [
        (one["model"], other["model"])
        for one in features
        for other in windows
        if one["state bytes"] <= other["state bytes"] and above(one, other)
    ]
    shown = rises(features) and rises(windows) and near and bool(cheaper)
    listed = "; ".join(f"{one} above {other}" for one, other in cheaper) or "none"
    said = {True: "yes", False: "no"}
    text = f"""The rule has four parts, and all must hold ("above" means by more than both spreads together). Recall
rises with the number of features, the last above the first and none above its successor: {said[rises(features)]}. It
rises with the window in the same way: {said[rises(windows)]}. {FEATURES[-1]} features come within 5 points of
attention: {said[near]} ({100 * features[-1]["accuracy"]:.1f}% against {100 * attention["accuracy"]:.1f}%). Some linear
attention is above a window whose state is no smaller: {said[bool(cheaper)]} ({listed}).

The state of attention is that of {TASK.length} tokens and grows with every further one; all others stay as they are.
The RWKV-7 rows are whole models with MLPs, set beside the others for the size of their state."""
    return shown, text


def setup(how: Fit, rates: tuple[float, ...]) -> str:
    chosen = f"the best of {', '.join(f'{r:g}' for r in rates)} on the first seed" if len(rates) > 1 else f"{how.lr:g}"
    return f"""Multi-query associative recall: {TASK.pairs} pairs, then each key once, {TASK.length} tokens, a
vocabulary of {TASK.vocab_size}, random filler, distances of power {TASK.alpha} (chance {TASK.chance:.4f}). Width 64:
a convolution, then one mixer with one head (one arm has both mixers, one after the other), no MLPs, head tied to the
embedding, initial matrices of N(0, 0.08): what N(0, 0.02) is at a width of 1024. RWKV-7: two whole blocks, low ranks of
16 (gate 32), published initial weights.

At most {how.steps:,} steps of {how.batch_size} fresh rows, AdamW with warm-up and cosine, peak learning rate {chosen}
({SLOWER:g} of it for RWKV-7); an arm that recalls 99.5% stops. Tested on {how.test_rows} rows that training never saw.
State bytes count float32 numbers."""


def draw(figure: "Figure", table: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    groups = (("features ", "o-", "linear attention, by features"), ("window ", "s-", "window, by keys"))
    groups += (("rwkv7", "^--", "RWKV-7, by head size"),)
    for prefix, style, label in groups:
        rows = sorted(
            (r for r in table if r["model"].startswith(prefix) and "," not in r["model"].removeprefix("rwkv7,")),
            key=lambda r: r["state bytes"],
        )
        axes.errorbar(
            [r["state bytes"] for r in rows],
            [r["accuracy"] for r in rows],
            yerr=[r["accuracy ±"] for r in rows],
            fmt=style,
            capsize=3,
            lw=1.2,
            label=label,
        )
        for r in rows:
            axes.annotate(
                r["model"].split()[-1],
                (r["state bytes"], r["accuracy"]),
                xytext=(4, -11),
                textcoords="offset points",
                fontsize=8,
            )
    both = next(r for r in table if r["model"].startswith("features") and "window" in r["model"])
    attention = next(r for r in table if r["baseline"])
    axes.plot(both["state bytes"], both["accuracy"], "D", label=both["model"])
    axes.plot(attention["state bytes"], attention["accuracy"], "k*", ms=11, label=f"attention, {TASK.length} tokens")
    axes.axhline(TASK.chance, color="grey", lw=0.8, ls=":", label="chance")
    axes.set(
        xscale="log",
        xlabel="bytes of state",
        ylabel="accuracy",
        ylim=(0, 1.05),
        title=f"recall of {TASK.pairs} pairs (bars: half the range over the seeds)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


REPRODUCTION = Reproduction(
    name="based",
    claim="With linear attention on Taylor features and a short window, recall is bought with state: both dials move "
    "it from little to what attention reaches.",
    source="BASED, arXiv 2402.18668, sections 3 and 6.1; task: Zoology, arXiv 2312.04927",
    experiment=experiment,
)
