"""Products of permutations of five things: what a transition that is not diagonal can follow, and others cannot."""

from typing import TYPE_CHECKING, Any

from rookery.data.generated import rows
from rookery.data.word_problems import WordProblem
from rookery.models.rwkv7 import RWKV7, TimeMix
from rookery.registry import configure
from rookery.reproduce.arms import Arm, Fit, accuracy, fit
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
LENGTH = 12
"""Longest row in training."""
TRIED = (LENGTH, 2 * LENGTH, 4 * LENGTH)
WIDE = "rwkv7 wide"


class WideTimeMix(TimeMix):
    """Removes up to twice what the state holds along κ̂: with rate 1 and no decay the transition is the reflection
    I − 2κ̂κ̂ᵀ, which swaps two things where κ̂ is their difference (arXiv 2411.12537)."""

    removal = 2.0


class WideRWKV7(RWKV7):
    """RWKV-7 whose transitions have eigenvalues down to −1; published models stop short of that."""

    time_mix = WideTimeMix


def wide(seed: int, **overrides: Any) -> WideRWKV7:
    """An untrained WideRWKV7 with the initial weights of RWKV-7."""
    model = WideRWKV7(configure("rwkv7", **overrides)[1])
    model.init_weights(seed)
    return model


def arms(width: int) -> list[Arm]:
    """One block each, and two blocks of what has not solved it with one."""
    sizes = {"hidden_size": width, "vocab_size": WordProblem().vocab_size, "intermediate_size": 2 * width}
    heads = {"head_dim": width // 2}

    def arm(name: str, model: str, layers: int, **more: Any) -> Arm:
        given = {**sizes, "num_hidden_layers": layers, **({} if model == "rwkv4" else heads)}
        return Arm(name=f"{name}, {layers} block{'s' * (layers > 1)}", model=model, overrides=given, **more)

    widened = {**sizes, **heads, "num_hidden_layers": 1}
    return [
        Arm(name=f"{WIDE}, 1 block", build=lambda seed: wide(seed, **widened)),
        arm("rwkv7", "rwkv7", 1),
        arm("rwkv6", "rwkv6", 1),
        arm("rwkv5", "rwkv5", 1),
        arm("rwkv4", "rwkv4", 1),
        arm("gpt", "transformer", 1, baseline=True),
        arm("rwkv7", "rwkv7", 2),
        arm("gpt", "transformer", 2),
    ]


def curriculum(step: int, steps: int) -> WordProblem:
    """Rows grow from 3 tokens to LENGTH over the first half of the training."""
    return WordProblem(length=min(LENGTH, 3 + int((LENGTH - 2) * 2 * step / steps)))


def measure(arm: Arm, seed: int, how: Fit, work: Work) -> dict[str, Any]:
    """Trains one arm; accuracies at every tried length, of all positions and by position."""
    model = arm.create(seed)
    work.say(f"{arm.name}, seed {seed}")
    fit(model, lambda step: curriculum(step, how.steps), seed, how, work.say)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for length in TRIED:
        tokens, labels = rows(WordProblem(length=length), seed=seed, first=0, count=how.test_rows, split="test")
        found[str(length)] = accuracy(model, tokens, labels)
    # the longest rows are the last drawn; one position at a time for the plot
    found["by position"] = [accuracy(model, tokens[:, : i + 1], only_last(labels, i)) for i in range(0, max(TRIED), 3)]
    return found


def only_last(labels: Any, place: int) -> Any:
    """Labels up to `place`, all but the last taken away."""
    kept = labels[:, : place + 1].clone()
    kept[:, :place] = -100
    return kept


def experiment(work: Work) -> Outcome:
    how = Fit(
        steps=work.size(quick=4, default=1500, full=4000),
        batch_size=work.size(quick=4, default=64, full=64),
        lr=3e-3,
        test_every=work.size(quick=4, default=500, full=500),
        test_rows=work.size(quick=4, default=128, full=512),
    )
    contenders = arms(work.size(quick=32, default=64, full=64))
    work.planned = len(contenders) * len(SEEDS)
    by_arm: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in contenders}
    for seed in SEEDS:
        for arm in contenders:
            part = work.part(f"{arm.name}-{seed}", lambda a=arm, s=seed: measure(a, s, how, work))
            by_arm[arm.name].append(part)
    table = [row(arm, by_arm[arm.name]) for arm in contenders]
    shown, findings = judge(table)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(how, contenders),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, by_arm),
        figure_size=(8, 4.2),
    )


def row(arm: Arm, runs: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {}
    for length in TRIED:
        figures |= mean_spread(f"accuracy at {length}", [run[str(length)] for run in runs])
    return {"model": arm.name, "baseline": arm.baseline, "parameters": runs[0]["parameters"], **figures}


def judge(table: list[dict[str, Any]]) -> tuple[bool, str]:
    """The rule: one wide block follows, also beyond the training length; one of 4, 5, 6 and attention does not."""
    by_name = {row["model"]: row for row in table}
    best = by_name[f"{WIDE}, 1 block"]
    follows = all(best[f"accuracy at {n}"] >= least for n, least in zip(TRIED, (0.99, 0.99, 0.9)))
    others = ("rwkv6, 1 block", "rwkv5, 1 block", "rwkv4, 1 block", "gpt, 1 block")
    fail = all(by_name[name][f"accuracy at {LENGTH}"] <= 0.5 for name in others)
    figures = {name: by_name[name][f"accuracy at {LENGTH}"] for name in others}
    one, two = by_name["rwkv7, 1 block"], by_name["rwkv7, 2 blocks"]
    stock = "; ".join(
        f"{name}: " + ", ".join(f"{row[f'accuracy at {n}']:.2f} at {n}" for n in TRIED)
        for name, row in (("one block", one), ("two blocks", two))
    )
    text = f"""The rule has two parts. One block of RWKV-7 with the wide range of eigenvalues reaches 0.99 at
{TRIED[0]} and {TRIED[1]} tokens and 0.9 at {TRIED[2]}, having been trained on {LENGTH} at most; and one block of
RWKV-6, 5, 4 and of the GPT stays at or below 0.5 at {LENGTH}.

The first part is {"met" if follows else "not met"}:
{", ".join(f"{best[f'accuracy at {n}']:.3f} at {n}" for n in TRIED)}.
The second is {"met" if fail else "not met"}: {", ".join(f"{name} {value:.2f}" for name, value in figures.items())}.

A swap needs a transition with the eigenvalue −1 and no decay. The stock RWKV-7's eigenvalue along κ̂, the decay minus
the rate, does not fall below −0.46, and not below 0 where nothing decays. Its accuracies: {stock}.
What the wide range is worth is the difference to the first row; no published model has it."""
    return follows and fail, text


def setup(how: Fit, contenders: list[Arm]) -> str:
    sizes = contenders[1].overrides
    return f"""The word problem of S5: tokens are the identity and the ten swaps of five things, the answer at every
position is the product so far, one of 120 (chance {WordProblem().chance:.4f}). Width {sizes["hidden_size"]}, heads of
{sizes["head_dim"]}, MLP of {sizes["intermediate_size"]}; the arms are whole models of the library, token shift and
channel mix included; the GPT has rotary positions.

{how.steps:,} steps of {how.batch_size} fresh rows, whose length grows from 3 to {LENGTH} over the first half; AdamW,
learning rate {how.lr:g} with warm-up and cosine for all arms, not searched. Accuracy over all positions of
{how.test_rows} rows that training never saw."""


def draw(figure: "Figure", by_arm: dict[str, list[dict[str, Any]]]) -> None:
    axes = figure.subplots()
    places = range(1, max(TRIED) + 1, 3)
    for number, (name, runs) in enumerate(by_arm.items()):
        values = [sum(both) / len(both) for both in zip(*(found["by position"] for found in runs))]
        style = "--" if name.startswith("gpt") else "-"
        axes.plot(places, values, style, color=f"C{number}", label=name, marker=".", lw=1.2)
    axes.axvline(LENGTH, color="gray", lw=0.8, ls=":")
    axes.set(xlabel="tokens read (dotted: longest in training)", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title("product of S5 so far, mean of the seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right")


REPRODUCTION = Reproduction(
    name="state-tracking",
    claim="RWKV-7's transition, which is not diagonal, lets a single block follow a permutation group, which RWKV-4 "
    "to 6 and attention of equal depth cannot; that takes eigenvalues down to −1.",
    source="RWKV-7, arXiv 2503.14456; eigenvalues: arXiv 2411.12537",
    experiment=experiment,
)
