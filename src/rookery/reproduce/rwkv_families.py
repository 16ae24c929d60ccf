"""RWKV-7, 6, 5, 4 and a GPT: the same number of parameters, the same text in the same order, the same recipe."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rookery.data.generated import row_generator
from rookery.data.passkey_text import filler
from rookery.data.text import read_documents, tokenize, validation_rows
from rookery.evaluate.positions import loss_by_position, mean_by_stretch
from rookery.models import load
from rookery.reproduce.arms import Arm, matched, parameters, searched, smooth, train_on_text
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread
from rookery.tokenizers import load_tokenizer
from rookery.train.config import DataConfig, OptimConfig, TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
FAMILIES = ("rwkv7", "rwkv6", "rwkv5", "rwkv4", "transformer")
LEARNED = (
    "text/wikipedia_english_20240601to20240615.json",
    "text/wikipedia_english_20240701to20240714.json",
    "text/wikipedia_english_20240801to20240815.json",
    "text/tinyshakespeare.txt",
)
HELD_OUT = "text/wikipedia_english_20250101to20250115.json"
"""Articles written later than all that is learned."""
RATES = (2e-3, 5e-3)
"""Learning rates that `--full` tries; the others use the first."""
BEYOND = 4
"""Longest text that is tried, in training lengths."""


def arms(work: Work, vocab_size: int) -> list[Arm]:
    """The five models: RWKV-7 with its own proportions, the others' MLPs widened to its number of parameters."""
    width = work.size(quick=32, default=128, full=128)
    sizes = {"hidden_size": width, "num_hidden_layers": work.size(quick=2, default=4, full=4), "vocab_size": vocab_size}
    heads = {"head_dim": min(32, width // 2)}
    budget = parameters("rwkv7", {**sizes, **heads})
    chosen = {name: {**sizes, **(heads if name != "rwkv4" else {})} for name in FAMILIES}
    if work.scale == "quick":
        chosen["rwkv6"] |= {"mix_rank": 8, "decay_rank": 8}  # the official ranks are larger than this whole model
    return [
        Arm(
            name="gpt" if name == "transformer" else name,
            model=name,
            overrides=given if name == "rwkv7" else matched(name, given, budget=budget),
            baseline=name == "transformer",
        )
        for name, given in chosen.items()
    ]


def recipe(work: Work) -> TrainConfig:
    """The run that all arms share."""
    learned, held_out, tokenizer = text(work)
    steps = work.size(quick=8, default=220, full=1500)
    return TrainConfig(
        data=DataConfig(
            path=",".join(map(str, learned)),
            validation=str(held_out),
            tokenizer=str(tokenizer),
            sequence_length=work.size(quick=32, default=256, full=256),
        ),
        optim=OptimConfig(warmup_steps=min(20, steps // 4)),
        steps=steps,
        batch_size=work.size(quick=4, default=8, full=8),
        save_every=work.size(quick=8, default=100, full=100),
        validate_every=0,
        keep=1,
    )


def text(work: Work) -> tuple[list[Path], Path, str]:
    """Files to learn from, held-out file, tokenizer: Wikipedia and Shakespeare, or made-up sentences for --quick."""
    if work.scale != "quick":
        vocabulary = work.folder / "vocab.txt"
        learned = work.data(*LEARNED)
        if not vocabulary.exists():
            from rookery.tokenizers.train import train_vocabulary, write_vocabulary

            work.say("making a vocabulary of 1,024 pieces")
            texts = [document for path in learned for document in read_documents(path)]
            write_vocabulary(train_vocabulary(texts[::8], 1024), vocabulary)
        return learned, *work.data(HELD_OUT), str(vocabulary)
    paths = [work.folder / name for name in ("learned.txt", "held-out.txt")]
    for number, (path, characters) in enumerate(zip(paths, (20_000, 4_000))):
        path.write_text(filler(characters, row_generator(0, "train", number)), encoding="utf-8")
    return paths[:1], paths[1], "bytes"


def measure(work: Work, arm: Arm, seed: int, config: TrainConfig, rate: float) -> dict[str, Any]:
    """Trains one arm; its curve, speed and held-out losses by position in bits per byte."""
    config = replace(config, optim=replace(config.optim, lr=rate, final_lr=rate / 20))
    trained = train_on_text(work, arm, seed, config)
    documents = list(read_documents(Path(config.data.validation)))
    corpus = tokenize(documents, load_tokenizer(config.data.tokenizer))
    length = config.data.sequence_length
    rows = validation_rows(corpus, BEYOND * length, most=work.size(quick=4, default=64, full=128))
    losses = loss_by_position(load(trained.model), *rows)
    bits_per_byte = len(corpus.tokens) / sum(len(document.encode()) for document in documents) / math.log(2)
    stretches = mean_by_stretch(losses, length // 4) * bits_per_byte
    return {
        "curve": smooth([loss * bits_per_byte for loss in trained.losses], window=max(1, config.steps // 30)),
        "tokens_per_second": trained.tokens_per_second,
        "within": float(losses[:length].mean()) * bits_per_byte,
        "stretches": stretches.tolist(),
    }


def experiment(work: Work) -> Outcome:
    config = recipe(work)
    contenders = arms(work, load_tokenizer(config.data.tokenizer).vocab_size)
    rates = work.size(quick=RATES[:1], default=RATES[:1], full=RATES)
    work.planned = len(contenders) * (len(SEEDS) + len(rates) - 1)
    chosen = {
        arm.name: searched(
            work,
            arm,
            rates=rates,
            seeds=SEEDS,
            train=lambda arm, seed, rate: measure(work, arm, seed, config, rate),
            score=lambda part: -part["curve"][-1],  # of the text that is learned: held-out text chooses nothing
        )
        for arm in contenders
    }
    by_arm = {name: runs for name, (_, runs) in chosen.items()}
    table = [row(arm, *chosen[arm.name]) for arm in contenders]
    shown, findings = judge(table, rates)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(config, contenders, rates),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, by_arm, config),
        figure_size=(10, 4.2),
    )


WITHIN, LATE, LAST = "bits per byte", "last quarter of the training length", f"at {BEYOND}× the training length"


def row(arm: Arm, rate: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": arm.name,
        "baseline": arm.baseline,
        "parameters": parameters(arm.model, arm.overrides),
        "rate": rate,
        **mean_spread(WITHIN, [run["within"] for run in runs]),
        **mean_spread(LATE, [run["stretches"][3] for run in runs]),
        **mean_spread(LAST, [sum(run["stretches"][-4:]) / 4 for run in runs]),
        **mean_spread("tokens/s", [run["tokens_per_second"] for run in runs]),
    }


def judge(table: list[dict[str, Any]], rates: Sequence[float]) -> tuple[bool, str]:
    """The rule: RWKV-7 below every other by more than both spreads, and no worse far beyond the training length."""
    by_name = {row["model"]: row for row in table}
    best = by_name["rwkv7"]
    lines, apart = [], True
    for name, other in by_name.items():
        if name == "rwkv7":
            continue
        lead = other[WITHIN] - best[WITHIN]
        clear = lead > best[WITHIN + " ±"] + other[WITHIN + " ±"]
        apart &= clear
        word = "below" if lead > 0 else "above"
        lines.append(f"- {abs(lead):.3f} bits per byte {word} {name}{'' if clear else ', which is not a clear lead'}")
    means = [by_name[name][WITHIN] for name in ("rwkv7", "rwkv6", "rwkv5", "rwkv4")]
    ordered = means == sorted(means)
    holds = best[LAST] <= best[LATE] + 0.02
    drift = {name: row[LAST] - row[LATE] for name, row in by_name.items()}
    drifts = ", ".join(f"{name} {value:+.3f}" for name, value in drift.items())
    choice = (
        f"Every arm has the better of {len(rates)} learning rates, by the training loss of its first seed at the end."
        if len(rates) > 1
        else "All arms have one learning rate. In trials of 120 steps the GPT did better at 2e-3, the rate used, than "
        "at 1e-3 or 5e-3;\nRWKV-7 did better at 5e-3 than at 2e-3."
    )
    text = f"""The rule has three parts. RWKV-7's mean loss lies below that of every other model by more than
both spreads together; the mean losses of RWKV-7, 6, 5 and 4 rise in this order; and at {BEYOND} times the training
length RWKV-7's loss is at most 0.02 bits per byte above that of the last quarter of the training length.

RWKV-7 on held-out text, within the training length, lies

{chr(10).join(lines)}

The first part is {"met" if apart else "not met"}, the second is {"met" if ordered else "not met"}. From the
last quarter of the training length to {BEYOND} times it, the loss changes by (bits per byte): {drifts}. The
third part is {"met" if holds else "not met"}.

{choice}
The models are tiny: this compares families under one recipe, not their limits. The tokens per second were measured
while training, on a machine that other work may have shared."""
    return apart and ordered and holds, text


def setup(config: TrainConfig, contenders: list[Arm], rates: Sequence[float]) -> str:
    tokens = config.steps * config.batch_size * config.data.sequence_length
    sizes = contenders[0].overrides
    optim = config.optim
    return f"""Every model has {sizes["num_hidden_layers"]} blocks of width {sizes["hidden_size"]}; the MLP is widened
until the parameters match RWKV-7's. The GPT has rotary positions, SDPA, RMS norm and a gated MLP. All read the same
{tokens:,} tokens in the same order: English Wikipedia of 2024 and Shakespeare, in a vocabulary of
{sizes["vocab_size"]:,} pieces; held out are articles of January 2025.

{config.steps} steps of {config.batch_size} × {config.data.sequence_length} tokens in {config.dtype}, AdamW, learning
rate {" or ".join(f"{rate:g}" for rate in rates)}, falling to a twentieth (cosine),
weight decay {optim.weight_decay:g} on matrices, gradients clipped at
{optim.clip:g}. The initial weights are each family's published ones."""


def draw(figure: "Figure", by_arm: dict[str, list[dict[str, Any]]], config: TrainConfig) -> None:
    curves, positions = figure.subplots(1, 2)
    length = config.data.sequence_length
    per_step = config.batch_size * length / 1000
    for number, (name, runs) in enumerate(by_arm.items()):
        color = f"C{number}"
        style = "--" if name == "gpt" else "-"
        for i, found in enumerate(runs):
            label = name if i == 0 else None
            steps = range(1, len(found["curve"]) + 1)
            curves.plot([step * per_step for step in steps], found["curve"], style, color=color, label=label, lw=1.2)
            middles = [(j + 0.5) * length / 4 for j in range(len(found["stretches"]))]
            positions.plot(middles, found["stretches"], style, color=color, label=label, lw=1.2, marker=".", ms=4)
    last = [found["curve"][-1] for runs in by_arm.values() for found in runs]
    first = max(found["curve"][len(found["curve"]) // 8] for runs in by_arm.values() for found in runs)
    curves.set_ylim(min(last) - 0.05, first)
    curves.set(xlabel="thousand tokens", ylabel="bits per byte", title="training loss (running mean), one line a seed")
    positions.axvline(length, color="gray", lw=0.8, ls=":")
    positions.set(
        xlabel="position (dotted: training length)", ylabel="bits per byte", title="held-out loss by position"
    )
    for axes in (curves, positions):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


REPRODUCTION = Reproduction(
    name="rwkv-families",
    claim="Each RWKV learns more from the same tokens than the one before, RWKV-7 more than a transformer of its size, "
    "and its loss does not rise beyond the training length.",
    source="RWKV-7, arXiv 2503.14456; RWKV-5 and 6, arXiv 2404.05892",
    experiment=experiment,
)
