"""DIR-7: does a picture follow its text, by the way in which it reads it, and can a text drive the state?"""

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rookery.data.images import Images, digits, mnist
from rookery.evaluate.generated import Neighbours, Principal, fd_score, prompt_accuracy
from rookery.imaging.pipeline import DIR7Pipeline
from rookery.imaging.sample import sample
from rookery.imaging.samplers import DDIM
from rookery.models import create_model
from rookery.nn.noise import Noise
from rookery.recipes.diffusion import DIGIT_CAPTIONS, dir7_digits, dir7_mnist
from rookery.registry import configure
from rookery.reproduce import text_driven_s5
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread
from rookery.train.config import overlay
from rookery.train.loop import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
GUIDANCE = 2.0
WORDS = (8, 512)
"""Lengths of prompts whose memory is compared."""
LEAST, NEAR, TRACKED, CHANCE = 0.6, 0.15, 0.95, 0.3
"""The rule's thresholds: prompt accuracy, distance to cross-attention, things found after 12 swaps, and by the paper's
form."""


def modes(work: Work) -> tuple[str, ...]:
    return work.size(
        quick=("text_r", "text_kv", "softmax"),
        default=("text_r", "text_kv", "softmax"),
        full=("none", "text_r", "text_read", "text_kv", "softmax"),
    )


def experiment(work: Work) -> Outcome:
    arms = modes(work)
    tracked = [(mode, removal) for mode in arms if mode != "none" for removal in removals(work, mode)]
    work.planned = (len(arms) + len(tracked)) * len(SEEDS)
    drawn = {
        mode: [work.part(f"digits-{mode}-{seed}", lambda m=mode, s=seed: picture(work, m, s)) for seed in SEEDS]
        for mode in arms
    }
    sizes = {
        "steps": work.size(quick=2, default=600, full=1500),
        "batch": work.size(quick=2, default=32, full=64),
        "rows": work.size(quick=8, default=256, full=512),
    }
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for arm in tracked:
        for seed in SEEDS:
            key = f"s5-{arm[0]}-{arm[1]:g}-{seed}"
            work.say(f"S5 in words, {arm[0]}, removal {arm[1]:g}, seed {seed}")
            part = work.part(key, lambda a=arm, s=seed: text_driven_s5.measure(*a, s, **sizes))
            found.setdefault(arm, []).append(part)
    table = [row(mode, drawn[mode], found.get((mode, 2.0 if mode != "softmax" else 1.0))) for mode in arms]
    shown, findings = judge(table, found, drawn)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(work, sizes),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, drawn, found),
        figure_size=(12, 4.2),
    )


def removals(work: Work, mode: str) -> tuple[float, ...]:
    """Factors of removal that S5 is tried with: the stock one, and attention, are for --full."""
    if mode == "softmax":
        return work.size(quick=(), default=(), full=(1.0,))
    return work.size(quick=(2.0,), default=(2.0,), full=(2.0, 1.0))


def real(work: Work) -> Images:
    """The digits that are learned and compared with."""
    if work.scale != "full":
        return digits()
    train_set, _ = mnist(work.data("vision/mnist.npz")[0])
    return train_set.select(np.arange(10_000))


def picture(work: Work, mode: str, seed: int) -> dict[str, Any]:
    """Trains one arm on captions of digits; how well it draws what it is asked for."""
    work.say(f"digits, {mode}, seed {seed}")
    full = work.scale == "full"
    recipe, path = (dir7_mnist(), str(work.data("vision/mnist.npz")[0])) if full else (dir7_digits(), "digits")
    config = overlay(
        recipe,
        {
            "overrides": {"cross": mode},
            "data": {"path": path},
            "optim": {"warmup_steps": work.size(quick=1, default=50, full=50)},
            "out": str(work.folder / "runs" / f"{mode}-{seed}"),
            "steps": work.size(quick=2, default=300, full=3000),
            "batch_size": work.size(quick=2, default=32, full=64),
            "save_every": 10_000,
            "validate_every": 0,
            "seed": seed,
        },
    )
    if train(config).signal is not None:
        raise KeyboardInterrupt
    pipeline = DIR7Pipeline.from_pretrained(config.out)
    return judged(
        pipeline,
        real(work),
        each=work.size(quick=1, default=20, full=50),
        steps=work.size(quick=1, default=20, full=25),
        seed=seed,
    )


def judged(pipeline: DIR7Pipeline, images: Images, *, each: int, steps: int, seed: int) -> dict[str, Any]:
    """Prompt accuracy and Fréchet distance of `each` pictures of every digit, and a picture of each."""
    pixels = np.stack([images[i] for i in range(len(images))]).astype(np.float64) / 255 * 16
    templates = DIGIT_CAPTIONS.split("|")
    # a model that reads nothing draws as many, told nothing
    asked = np.repeat(np.arange(10), each)
    prompts = [templates[i % len(templates)].format(digit) for i, digit in enumerate(asked)]
    reads = pipeline.model.config.cross != "none"
    told = pipeline.cache_prompt(prompts) if reads else None
    drawn = sampled(pipeline, told, len(prompts), steps, seed).astype(np.float64) * 16
    features = Principal.of(pixels)
    return {
        "accuracy": prompt_accuracy(drawn, asked, Neighbours.of(pixels, images.labels)),
        "distance": fd_score(features(pixels), features(drawn)),
        "between halves": fd_score(features(pixels[::2]), features(pixels[1::2])),
        "pictures": np.rint(drawn[::each, ..., 0]).astype(int).tolist(),
    }


def sampled(pipeline: DIR7Pipeline, told: Any, count: int, steps: int, seed: int) -> np.ndarray:
    """float [count, h, w, 1], 0 to 1; without a prompt the model itself is sampled."""
    if told is not None:
        settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "np"}
        return pipeline(told, generator=seed, **settings).images
    sampler = DDIM(Noise.of(pipeline.model.config))
    sampler.set_timesteps(steps)
    shape = (count, pipeline.size, pipeline.size)
    generator = torch.Generator().manual_seed(seed)
    found = sample(pipeline.model, None, shape=shape, sampler=sampler, generator=generator)
    return (found / 2 + 0.5).clamp(0, 1).movedim(1, 3).numpy()


def kept(mode: str, words: int) -> int:
    """Bytes that a model keeps of a prompt of so many words."""
    model = create_model("dir-7-digits", cross=mode)
    with torch.no_grad():
        return model.read(model.words(["three " * words])).nbytes


def row(mode: str, drawn: list[dict[str, Any]], found: list[dict[str, Any]] | None) -> dict[str, Any]:
    family, config = configure("dir-7-digits", cross=mode)
    figures = {
        **mean_spread("prompt accuracy", [run["accuracy"] for run in drawn]),
        **mean_spread("Fréchet distance", [run["distance"] for run in drawn]),
    }
    for length in text_driven_s5.TRIED:
        name = f"found after {length} swaps"
        figures |= mean_spread(name, [run[str(length)] for run in found]) if found else {name: None, f"{name} ±": None}
    return {
        "reading": mode,
        "baseline": mode == "softmax",
        "parameters": sum(prod(shape) for shape in family.tensor_shapes(config).values()),
        **figures,
        **{f"bytes kept of {words} words": kept(mode, words) if mode != "none" else 0 for words in WORDS},
    }


def judge(
    table: list[dict[str, Any]],
    found: dict[tuple[str, float], list[dict[str, Any]]],
    drawn: dict[str, list[dict[str, Any]]],
) -> tuple[bool, str]:
    """The rule: text that writes the state is followed as with attention, drives S5, and costs one size."""
    by_mode = {row["reading"]: row for row in table}
    ours, paper, attention = by_mode["text_kv"], by_mode["text_r"], by_mode["softmax"]
    accuracy, other = ours["prompt accuracy"], attention["prompt accuracy"]
    follows = accuracy >= LEAST and accuracy >= other - NEAR
    swaps = "found after 12 swaps"
    tracks = ours[swaps] >= TRACKED and paper[swaps] <= CHANCE
    sizes = [ours[f"bytes kept of {words} words"] for words in WORDS]
    constant = sizes[0] == sizes[1]
    halves = drawn["softmax"][0]["between halves"]
    others = [
        f"{mode}, removal {removal:g}: {np.mean([run['12'] for run in runs]):.2f}"
        for (mode, removal), runs in found.items()
        if (mode, removal) not in (("text_kv", 2.0), ("text_r", 2.0))
    ]
    more = f"\nAfter 12 swaps the others find: {'; '.join(others)}." if others else ""
    none = f", a model without text {by_mode['none']['prompt accuracy']:.2f}" if "none" in by_mode else ""
    words = {n: [row[f"bytes kept of {n} words"] for row in (ours, attention)] for n in WORDS}
    met = {part: "met" if holds else "not met" for part, holds in zip("123", (follows, tracks, constant))}
    text = f"""The rule has three parts. `text_kv` draws what it is asked for with an accuracy of at least {LEAST}, no
more than {NEAR} below cross-attention; told of swaps in words, it finds at least {TRACKED} of five things after 12
of them, where the paper's form, `text_r`, stays at or below {CHANCE} (chance 0.2); and what it keeps of a prompt has
one size.

The first part is {met["1"]}: {accuracy:.2f}, cross-attention {other:.2f}. The second is {met["2"]}:
{ours[swaps]:.2f} after 12 swaps, {ours["found after 48 swaps"]:.2f} after 48, four times the longest in training;
`text_r` {paper[swaps]:.2f} after 12. The third is {met["3"]}: {words[WORDS[0]][0]:,} bytes for {WORDS[0]} words and
{words[WORDS[1]][0]:,} for {WORDS[1]}; cross-attention goes from {words[WORDS[0]][1]:,} to
{words[WORDS[1]][1]:,}.{more}

In the paper's form the text only says what is read of a state that the image has written, at the last few of the
image's tokens: its accuracy is {paper["prompt accuracy"]:.2f} (chance 0.1{none}). The claim is judged by the form of
ours in which the text writes the state.

The distance between two halves of the real digits is {halves:.1f}. It is one of principal components, not FID. The
paper's figures for ImageNet (FID 2.88, CLIP score 0.33) are preliminary by its own account; nothing here confirms or
denies them."""
    return follows and tracks and constant, text


def setup(work: Work, sizes: dict[str, int]) -> str:
    steps, batch = work.size(quick=2, default=300, full=3000), work.size(quick=2, default=32, full=64)
    data, grid = (
        ("MNIST, 28 × 28", "patches of 4") if work.scale == "full" else ("scikit-learn's digits, 8 × 8", "patches of 2")
    )
    s5 = text_driven_s5
    again = (
        " Learning this is not stable: a second run of the committed experiment, of 1,000 steps, found 0.91 after 12 "
        "swaps with the first seed and 0.33 with the second; the table has the run that was planned."
    )
    again = again if work.scale == "default" else ""
    return f"""Pictures: {data}, {grid}, captions such as "a handwritten three", 10% withheld; width 64, two heads,
three blocks, nothing of the text pooled, so that it acts through the cross layers alone; rectified flow. {steps:,}
steps of {batch}, AdamW, learning rate 0.003 with warm-up and cosine for all arms; averaged weights. DDIM, guidance
{GUIDANCE:g}, the same noise for all arms. Accuracy: five nearest neighbours among the real digits; distance: twenty
principal components. The flow (of three kinds of prediction), the rate (of two) and the steps were chosen by looking
at `text_kv` with the first seed.

S5: five words that name the things, then up to {s5.LENGTH} words that each swap two, drawn anew every step; one cross
layer and one MLP, width {s5.WIDTH}, two heads, removal 2, no decay; five image tokens that are the same for every text
ask where each thing is, after every word of the text. {sizes["steps"]:,} steps of {sizes["batch"]} texts, AdamW,
learning rate 0.003. `text_r` stretches the text over the five tokens. Measured after all swaps, on {sizes["rows"]}
texts that training never saw.{again}"""


def draw(
    figure: "Figure", drawn: dict[str, list[dict[str, Any]]], found: dict[tuple[str, float], list[dict[str, Any]]]
) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(2.2, 1, 1.3))
    framed = {mode: [np.pad(one, 1, constant_values=0) for one in runs[0]["pictures"]] for mode, runs in drawn.items()}
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in framed.values()], axis=0)
    left.imshow(sheet, cmap="gray_r", vmin=0, vmax=16)
    side = len(next(iter(framed.values()))[0])
    left.set_yticks([side * (i + 0.5) for i in range(len(drawn))], list(drawn))
    left.set_xticks([side * (i + 0.5) for i in range(10)], [str(i) for i in range(10)])
    left.set_title("drawn when asked for …")
    names = list(drawn)
    middle.bar(names, [np.mean([run["accuracy"] for run in drawn[name]]) for name in names], color="C0", alpha=0.6)
    for i, name in enumerate(names):
        middle.plot([i] * len(SEEDS), [run["accuracy"] for run in drawn[name]], "k.")
    middle.axhline(0.1, color="gray", lw=0.8, ls=":")
    middle.set(ylim=(0, 1.02), title="shows what was asked for")
    middle.tick_params(axis="x", rotation=45)
    for mode, removal in found:
        values = [np.mean([run[str(n)] for run in found[mode, removal]]) for n in text_driven_s5.TRIED]
        label = mode if mode == "softmax" else f"{mode}, removal {removal:g}"
        right.plot(text_driven_s5.TRIED, values, marker="o", label=label)
    right.axhline(0.2, color="gray", lw=0.8, ls=":")
    right.set(ylim=(0, 1.02), xticks=text_driven_s5.TRIED, xlabel="swaps (12: most in training)")
    right.set_title("S5 in words: things found")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)


REPRODUCTION = Reproduction(
    name="dir-7",
    claim="CrossWKV lets an image follow a text in one pass with a state of constant size, and its non-diagonal "
    "transition gives the text the power to track states.",
    source="CrossWKV and DIR-7, arXiv 2504.14260",
    experiment=experiment,
)
