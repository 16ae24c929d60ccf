"""WuNeng's promise: state heads beside attention heads do what either does, and the parts that it is made of."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rookery.data.generated import rows
from rookery.data.recall import Overwrite
from rookery.data.word_problems import WordProblem
from rookery.models import create_model
from rookery.reproduce.arms import Arm, Fit, accuracy, fit
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread
from rookery.reproduce.state_tracking import wide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
RECALL = Overwrite(vocab_size=64, length=40, keys=4, writes=16)
POINTS, LENGTH = 3, 16
FAR = 4 * LENGTH
SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16, "intermediate_size": 128}
RANKS = {"decay_rank": 16, "rate_rank": 16}
ATTENTION, RECURRENT, HYBRID = "attention heads", "rwkv7", "wuneng"
ABLATIONS: dict[str, dict[str, Any]] = {
    "no middle heads": {"middle": "none"},
    "additive middle": {"middle": "additive"},
    "concat middle": {"middle": "concat"},
    "summed heads": {"out_mode": "sum"},
    "3 tokens read": {"state_window": 3},
}
"""Name -> what differs from WuNeng's defaults."""


def attention_alone(seed: int, vocab_size: int) -> nn.Module:
    """The same block with attention heads only: state heads are silent, and nothing of them is trained."""
    model = create_model("wuneng", seed=seed, vocab_size=vocab_size, middle="none", **SIZES, **RANKS)
    with torch.no_grad():
        for block in model.blocks:
            block.att.state.alpha.zero_()
            block.att.state.requires_grad_(False)
    return model


def arms(vocab_size: int) -> list[Arm]:
    """One block each. Where there is a state, it may remove twice what is there: S3 needs the eigenvalue −1."""
    more = {"value_rank": 16, "gate_rank": 32}

    def hybrid(name: str, **choices: Any) -> Arm:
        given = {**SIZES, **RANKS, "vocab_size": vocab_size, "iclr_scale": 2.0, **choices}
        return Arm(name=name, model="wuneng", overrides=given)

    return [
        Arm(name=ATTENTION, build=lambda seed: attention_alone(seed, vocab_size), baseline=True),
        Arm(name=RECURRENT, build=lambda seed: wide(seed, vocab_size=vocab_size, **SIZES, **RANKS, **more)),
        hybrid(HYBRID),
        *(hybrid(name, **choices) for name, choices in ABLATIONS.items()),
    ]


def measure_recall(arm: Arm, seed: int, how: Fit, work: Work) -> dict[str, Any]:
    """Accuracy of the last value while one arm learns."""
    work.say(f"overwritten recall, {arm.name}, seed {seed}")
    model = arm.create(seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": trained, "curve": fit(model, lambda step: RECALL, seed, how, work.say)}


def measure_tracking(arm: Arm, seed: int, how: Fit, work: Work) -> dict[str, float]:
    """Accuracy of the product at the longest trained length and at four times as much."""
    work.say(f"products of S{POINTS}, {arm.name}, seed {seed}")
    model = arm.create(seed)

    def task(step: int) -> WordProblem:
        return WordProblem(points=POINTS, length=min(LENGTH, 3 + int((LENGTH - 1) * 2 * step / how.steps)))

    fit(model, task, seed, how, work.say)
    tested = {"trained": LENGTH, "far": FAR}
    return {
        name: accuracy(
            model, *rows(WordProblem(points=POINTS, length=n), seed=seed, first=0, count=how.test_rows, split="test")
        )
        for name, n in tested.items()
    }


def experiment(work: Work) -> Outcome:
    common = {
        "steps": work.size(quick=2, default=250, full=1000),
        "batch_size": work.size(quick=2, default=32, full=64),
        "lr": 5e-3,
        "test_rows": work.size(quick=2, default=256, full=512),
    }
    test_every = work.size(quick=1, default=25, full=50)
    recalling = Fit(**common, stop_at=0.995, test_every=test_every)
    tracking = Fit(**common, test_every=common["steps"])
    names = [arm.name for arm in arms(RECALL.vocab_size)]
    work.planned = 2 * len(SEEDS) * len(names)
    recall, track = {}, {}
    for one, other in zip(arms(RECALL.vocab_size), arms(WordProblem(points=POINTS).vocab_size), strict=True):
        recall[one.name] = [
            work.part(f"recall-{one.name}-{seed}", lambda a=one, s=seed: measure_recall(a, s, recalling, work))
            for seed in SEEDS
        ]
        track[one.name] = [
            work.part(f"track-{one.name}-{seed}", lambda a=other, s=seed: measure_tracking(a, s, tracking, work))
            for seed in SEEDS
        ]
    table = [row(name, recall[name], track[name]) for name in names]
    shown, findings = judge(table, recall)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(recalling),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, recall, table),
        figure_size=(10, 4.2),
    )


def steps_to_95(run: dict[str, Any]) -> int | None:
    return next((step for step, value in run["curve"] if value >= 0.95), None)


def row(name: str, recall: list[dict[str, Any]], track: list[dict[str, float]]) -> dict[str, Any]:
    reached = [steps_to_95(run) for run in recall]
    return {
        "heads": name,
        "baseline": name == ATTENTION,
        "trained parameters": recall[0]["parameters"],
        **mean_spread("last value", [run["curve"][-1][1] for run in recall]),
        "steps to 95%, by seed": ", ".join("never" if step is None else str(step) for step in reached),
        **mean_spread(f"S{POINTS}, {LENGTH} tokens", [run["trained"] for run in track]),
        **mean_spread(f"S{POINTS}, {FAR} tokens", [run["far"] for run in track]),
    }


def judge(table: list[dict[str, Any]], recall: dict[str, list[dict[str, Any]]]) -> tuple[bool, str]:
    """The rule: see the text below."""
    by_name = {row["heads"]: row for row in table}
    hybrid, attention, recurrent = (by_name[name] for name in (HYBRID, ATTENTION, RECURRENT))
    far = f"S{POINTS}, {FAR} tokens"
    recalls = hybrid["last value"] >= max(attention["last value"], recurrent["last value"]) - 0.02
    never = 10**9
    steps = {name: [steps_to_95(run) or never for run in recall[name]] for name in (HYBRID, ATTENTION)}
    sooner = all(a < b for a, b in zip(steps[HYBRID], steps[ATTENTION]))
    tracks = hybrid[far] - attention[far] > hybrid[far + " ±"] + attention[far + " ±"]
    keeps = hybrid[far] >= recurrent[far] - 0.05
    said = {True: "yes", False: "no"}
    shown = recalls and sooner and tracks and keeps
    text = f"""The rule has four parts, and all must hold. In overwritten recall, WuNeng comes within 2 points of the
better of attention and RWKV-7: {said[recalls]}. It gets to 95% in fewer steps than attention on every seed:
{said[sooner]}. On products of {FAR} permutations, four times as many as in training, it is above attention by more than
both spreads: {said[tracks]}; and at most 5 points below RWKV-7: {said[keeps]}.

A reader that finds a key's values but not which was written last would recall {100 * RECALL.blind_to_order:.0f}%. The
rows below WuNeng take one of its parts away or put another in its place; they have no part in the verdict, and with two
seeds they say little about small differences. WuNeng has more parameters than attention alone, as its paper has. The
paper's own figures are not public: this is a test of [our reading](../how-it-works/wuneng.md), not of their model."""
    return shown, text


def setup(how: Fit) -> str:
    return f"""One block of width 64, heads of 16, low ranks of 16, a channel mix of 128. "Attention heads" is WuNeng's
block with its state heads silenced and not trained. RWKV-7 and all state heads may remove twice what the state
holds (see [state tracking](state-tracking.md)).

Overwritten recall: {RECALL.writes} writes to {RECALL.keys} keys, then each key once; the last value counts.
{RECALL.length} tokens, a vocabulary of {RECALL.vocab_size}, random filler (chance {RECALL.chance:.3f}). Products of
permutations of {POINTS} things: up to {LENGTH} tokens in training, a label at every token
(chance {WordProblem(points=POINTS).chance:.2f}).

At most {how.steps:,} steps of {how.batch_size} fresh rows, AdamW with warm-up and cosine, peak learning rate
{how.lr:g}, not searched; recall stops at 99.5%. Tested on {how.test_rows} rows that training never saw, recall every
{how.test_every} steps."""


def draw(figure: "Figure", recall: dict[str, list[dict[str, Any]]], table: list[dict[str, Any]]) -> None:
    curves, bars = figure.subplots(1, 2)
    for number, name in enumerate(recall):
        for i, run in enumerate(recall[name]):
            steps, values = zip(*run["curve"])
            style = "-" if name in (ATTENTION, RECURRENT, HYBRID) else ":"
            curves.plot(steps, values, style, color=f"C{number}", label=name if i == 0 else None, lw=1.4)
    curves.axhline(RECALL.blind_to_order, color="grey", lw=0.8, ls="--")
    curves.set(xlabel="steps", ylabel="accuracy", ylim=(0, 1.03), title="the last of several values, one line a seed")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=7)
    far = f"S{POINTS}, {FAR} tokens"
    names = [row["heads"] for row in table]
    bars.barh(
        names,
        [row[far] for row in table],
        xerr=[row[far + " ±"] for row in table],
        capsize=3,
        color=[f"C{i}" for i in range(len(names))],
    )
    bars.axvline(WordProblem(points=POINTS).chance, color="grey", lw=0.8, ls="--")
    bars.invert_yaxis()
    bars.set(xlabel="accuracy", xlim=(0, 1.03), title=f"products of {FAR} permutations, trained on {LENGTH}")
    bars.tick_params(axis="y", labelsize=8)


REPRODUCTION = Reproduction(
    name="wuneng",
    claim="With RWKV-7 state heads added to its attention heads, one block has both abilities: it recalls the last "
    "value of a key at least as well as either, and follows a state far beyond what it was trained on.",
    source="WuNeng, arXiv 2504.19191, abstract",
    experiment=experiment,
)
