"""A softmax transformer becomes an RWKV: RADLADS' way, ARWKV's way, and from nothing, on equal numbers of tokens."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rookery.adapt.convert_transformer import align, convert, load_teacher, mixers
from rookery.adapt.distillation import distillation_loss, forward_kl
from rookery.models import create_model
from rookery.models.arwkv import Converted
from rookery.models.rad_rwkv6 import init_projections
from rookery.models.transformer import Transformer
from rookery.ops.linear_cross_entropy import linear_cross_entropy
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread
from rookery.train.config import OptimConfig
from rookery.train.optim import Optimizer, learning_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
BOS = 1
RANKS = {"decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 32}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to get a student."""

    name: str
    to: str
    copied: bool = True
    """Everything that student and teacher share is taken over."""
    redrawn: bool = False
    """But the attention's projections, which begin anew."""
    aligned: bool = True
    """The first stage is run; otherwise its tokens go to the second."""
    frozen_mlp: bool = False
    on_text: bool = False
    """The second stage learns the sampled tokens instead of the teacher's distribution."""

    def create(self, teacher: Transformer, seed: int) -> Converted:
        """The student before training."""
        ranks = RANKS | ({} if self.to == "rad-rwkv7" else {"head_dim": teacher.config.head_dim})
        student = convert(teacher, self.to, untie=False, seed=seed, **ranks)
        if not self.copied:
            student.init_weights(seed)
        if self.redrawn:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for mixer in mixers(student).values():
                    init_projections(mixer, generator)
        return student


DEFAULT = [
    Arm(name="radlads", to="rad-rwkv7"),
    Arm(name="arwkv", to="arwkv"),
    Arm(name="scratch", to="arwkv", copied=False, aligned=False),
]
MORE = [
    Arm(name="radlads-redrawn", to="rad-rwkv7", redrawn=True),
    Arm(name="radlads-skip1", to="rad-rwkv7", aligned=False),
    Arm(name="arwkv-frozen-mlp", to="arwkv", frozen_mlp=True),
    Arm(name="scratch-ce", to="arwkv", copied=False, aligned=False, on_text=True),
]
RATES = {"radlads": (1e-3, 1e-3), "arwkv": (4e-3, 2e-3), "scratch": (1e-3, 4e-3)}
"""Peak rates of alignment and of what follows."""
ALIGN_RATES, RATES_AFTER = (1e-3, 4e-3), (1e-3, 2e-3, 4e-3)
"""Those that --full tries on the first seed, for each arm."""
Rates = tuple[float, float]
TRIED = """Peak rates are the best that were tried on the first seed: after alignment 2e-3 and 4e-3 for `arwkv` (0.565
and 0.568 nats) and `scratch` (0.656 and 0.544), 1e-3 and 4e-3 for `radlads` (0.268 and 0.385); in alignment
1e-3 and 4e-3 for `arwkv` (0.596 and 0.565), 1e-3 for `radlads`. A first run, with 2e-3 for `scratch`,
fulfilled the rule; the rate that suits that arm better undid it. `--full` tries all pairs for every arm."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    rows: int
    held_out: int
    length: int
    batch: int
    align: int
    distill: int
    points: int
    """Measurements in the second stage."""


def teacher_of(work: Work) -> Transformer:
    """BabyLlama; a random one of a few weights for --quick, which shows that everything runs."""
    if work.scale != "quick":
        return load_teacher(str(work.data("models/babyllama/model5000.bin")[0]), dtype=torch.float32)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
    tiny = create_model("transformer", hidden_size=32, num_hidden_layers=2, vocab_size=64, **sizes)
    return tiny.requires_grad_(False).eval()


@torch.inference_mode()
def sampled(teacher: Transformer, rows: int, length: int, seed: int) -> list[list[int]]:
    """The teacher's own text at temperature 1, rows of `length` tokens that begin with BOS and end nowhere else."""
    generator, state = torch.Generator().manual_seed(seed), None
    columns = [torch.full((rows, 1), BOS)]
    for _ in range(length - 1):
        logits, state = teacher(columns[-1], state)
        columns.append(torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator))
    return torch.cat(columns, dim=1).tolist()


@torch.no_grad()
def measured(student: Converted, rows: Tensor, answers: Tensor) -> dict[str, float]:
    """Held-out figures; `answers` [n, t − 1, v] are the teacher's logits."""
    sums = {"kl": 0.0, "accuracy": 0.0, "agreement": 0.0}
    for some, wanted in zip(rows.split(8), answers.split(8)):
        logits = student(some[:, :-1])[0]
        best = logits.argmax(-1)
        sums["kl"] += float(forward_kl(logits, wanted).sum())
        sums["accuracy"] += float((best == some[:, 1:]).sum())
        sums["agreement"] += float((best == wanted.argmax(-1)).sum())
    return {name: value / rows[:, 1:].numel() for name, value in sums.items()}


def optim(stage: str, rate: float) -> OptimConfig:
    """adaptation.md E.1.2: a quarter cosine to 1e-5 for alignment, half a cosine to a tenth for what follows."""
    shape = {"schedule": "quarter-cosine", "final_lr": 1e-5} if stage == "align" else {"final_lr": rate / 10}
    return OptimConfig(lr=rate, warmup_steps=20, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=1e-8, **shape)


class Lesson:
    """One student's training."""

    def __init__(self, work: Work, arm: Arm, seed: int, teacher: Transformer, rows: Tensor, sizes: Sizes) -> None:
        self.work, self.arm, self.seed, self.teacher, self.sizes = work, arm, seed, teacher, sizes
        self.student = arm.create(teacher, seed)
        self.rows, self.held_out = rows[: sizes.rows], rows[sizes.rows :]
        with torch.no_grad():
            self.answers = teacher(self.held_out[:, :-1])[0]
        self.step, self.curve = 0, []

    def batch(self) -> Tensor:
        """The next rows: another order in every pass and for every seed, the same for all arms."""
        per_pass = len(self.rows) // self.sizes.batch
        turn, place = divmod(self.step, per_pass)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(1000 * self.seed + turn))
        return self.rows[order[place * self.sizes.batch :][: self.sizes.batch]]

    def measure(self) -> None:
        tokens = self.step * self.sizes.batch * self.sizes.length
        found = {"tokens": tokens, **measured(self.student, self.held_out, self.answers)}
        self.curve.append(found)
        self.work.say(f"  {tokens:>9,} tokens  KL {found['kl']:.3f}  accuracy {found['accuracy']:.1%}")

    def stage(self, name: str, steps: int, rate: float, loss: Callable[[Tensor], Tensor], points: int) -> None:
        """Trains what requires gradients for `steps`, measured `points` times on the way."""
        settings = optim(name, rate)
        optimizer = Optimizer(self.student, settings, torch.float32)
        for i in range(1, steps + 1):
            value = loss(self.batch())
            value.backward()
            optimizer.step(learning_rate(settings, i, steps))
            self.step += 1
            if i * points // steps > (i - 1) * points // steps:
                self.measure()

    def relative(self) -> list[float]:
        """Distance of each mixer from its attention, by the size of the attention's output."""
        with torch.no_grad():
            found = align(self.teacher, self.student, self.held_out[:8, :-1])
        return (found.errors / found.scales).tolist()

    def distance(self, rows: Tensor) -> Tensor:
        return align(self.teacher, self.student, rows[:, :-1]).loss

    def divergence(self, rows: Tensor) -> Tensor:
        inputs = rows[:, :-1]
        features = self.student.features(inputs, None, None)[0].flatten(0, 1)
        weight = self.student.head.weight
        if self.arm.on_text:
            return linear_cross_entropy(features=features, weight=weight, targets=rows[:, 1:].flatten())
        with torch.no_grad():
            wanted = self.teacher.features(inputs, None, None)[0].flatten(0, 1)
        return distillation_loss(features, weight, wanted, self.teacher.head.weight, chunk=len(features))

    def run(self, rates: Rates) -> dict[str, Any]:
        arm, sizes, began = self.arm, self.sizes, time.perf_counter()
        self.measure()
        distances = {"before": self.relative()}
        distill = sizes.distill
        if arm.aligned:
            self.student.requires_grad_(False)
            for mixer in mixers(self.student).values():
                mixer.requires_grad_(True)
            self.stage("align", sizes.align, rates[0], self.distance, 1)
            distances["aligned"] = self.relative()
        else:
            distill += sizes.align
        self.student.requires_grad_(True)
        for block in self.student.model.layers:
            block.mlp.requires_grad_(not arm.frozen_mlp)
        self.stage("distill", distill, rates[1], self.divergence, sizes.points + (not arm.aligned))
        distances["end"] = self.relative()
        return {"curve": self.curve, "relative": distances, "seconds": time.perf_counter() - began}


def experiment(work: Work) -> Outcome:
    sizes = Sizes(
        rows=work.size(quick=8, default=448, full=768),
        held_out=work.size(quick=4, default=32, full=64),
        length=work.size(quick=17, default=257, full=257),
        batch=work.size(quick=2, default=4, full=8),
        align=work.size(quick=2, default=60, full=300),
        distill=work.size(quick=2, default=140, full=500),
        points=work.size(quick=2, default=4, full=5),
    )
    arms = work.size(quick=DEFAULT, default=DEFAULT, full=DEFAULT + MORE)
    searched = work.scale == "full"
    teacher = teacher_of(work)
    work.planned = 1 + len(arms) * (len(SEEDS) + (5 if searched else 0))
    kept = work.part("samples", lambda: sampled(teacher, sizes.rows + sizes.held_out, sizes.length, seed=1))
    rows, found = torch.tensor(kept), {}
    for arm in arms:

        def trained(seed: int, rates: Rates, arm: Arm = arm) -> dict[str, Any]:
            key = f"{arm.name}-{seed}-{rates[0]:g}-{rates[1]:g}"
            work.say(key)
            return work.part(key, lambda: Lesson(work, arm, seed, teacher, rows, sizes).run(rates))

        rates = RATES.get(arm.name, (1e-3, 1e-3))
        if searched:
            first = ALIGN_RATES if arm.aligned else ALIGN_RATES[:1]
            tried = {pair: trained(SEEDS[0], pair)["curve"][-1]["kl"] for pair in product(first, RATES_AFTER)}
            rates = min(tried, key=tried.__getitem__)
        found[arm.name] = (rates, [trained(seed, rates) for seed in SEEDS])
    ceiling = ceiling_of(teacher, rows[sizes.rows :])
    table = [row(arm, teacher, *found[arm.name]) for arm in arms]
    shown, findings = judge(found, ceiling)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(teacher, sizes, searched),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, {name: runs for name, (_, runs) in found.items()}, ceiling),
        figure_size=(9, 4),
    )


@torch.no_grad()
def ceiling_of(teacher: Transformer, rows: Tensor) -> float:
    """The teacher's own accuracy on its samples."""
    return float((teacher(rows[:, :-1])[0].argmax(-1) == rows[:, 1:]).double().mean())


def row(arm: Arm, teacher: Transformer, rates: Rates, runs: list[dict[str, Any]]) -> dict[str, Any]:
    student = arm.create(teacher, 0)
    sizes = {"tokens_seen": 256, "batch": 1, "itemsize": 4}
    before = [run["curve"][0]["kl"] for run in runs]
    after = [run["curve"][1]["kl"] for run in runs]
    last = [run["curve"][-1] for run in runs]
    return {
        "student": arm.name,
        "baseline": arm.name == "scratch",
        "parameters": sum(p.numel() for p in student.parameters()),
        "state bytes": student.config.state_nbytes(**sizes),
        "tokens": last[0]["tokens"],
        "rates": f"{rates[0]:g}, {rates[1]:g}" if arm.aligned else f"{rates[1]:g}",
        **mean_spread("KL at first", before),
        **(
            mean_spread("KL when aligned", after) if arm.aligned else dict.fromkeys(mean_spread("KL when aligned", [0]))
        ),
        **mean_spread("KL", [point["kl"] for point in last]),
        **mean_spread("accuracy", [point["accuracy"] for point in last]),
        **mean_spread("agreement", [point["agreement"] for point in last]),
    }


def judge(found: dict[str, tuple[Rates, list[dict[str, Any]]]], ceiling: float) -> tuple[bool, str]:
    """The rule of adaptation.md E.1.3, on every seed."""
    last = {name: [run["curve"][-1] for run in runs] for name, (_, runs) in found.items()}
    pairs = list(zip(last["radlads"], last["arwkv"], last["scratch"], strict=True))
    first = all(radlads["kl"] <= 0.6 * arwkv["kl"] for radlads, arwkv, _ in pairs)
    second = all(arwkv["kl"] <= 0.9 * scratch["kl"] for _, arwkv, scratch in pairs)
    falls = [fall(run["curve"]) for _, runs in found.values() for run in runs]
    third = max(falls) <= 0.003
    figures = "; ".join(
        f"{radlads['kl']:.3f}, {arwkv['kl']:.3f} and {scratch['kl']:.3f} nats" for radlads, arwkv, scratch in pairs
    )
    aligned = [found[name][1][0]["relative"]["aligned"] for name in ("radlads", "arwkv")]
    mean = [sum(layers) / len(layers) for layers in aligned]
    behind = "" if second else BEHIND
    text = f"""The rule, on every seed: KL(teacher‖student) after equal tokens is for RADLADS' student at most 0.6 of
ARWKV's ({_said(first)}), for ARWKV's at most 0.9 of that of a student from nothing ({_said(second)}), and
no student's accuracy falls by more than 0.3 points from one measurement to the next ({_said(third)}: the
least it rises is {-100 * max(falls):.2f} points).

KL of `radlads`, `arwkv` and `scratch`, by seed: {figures}. The teacher itself finds {100 * ceiling:.1f}%
of the tokens that it has sampled: more than that nobody can. After alignment the mixers' outputs are off
by {mean[0]:.2f} (`radlads`) and {mean[1]:.2f} (`arwkv`) of the attention's size; one that says nothing is
off by about 1.

{behind}The ways differ in more than the copied projections (grouped keys, positions, gate, token shift, scale),
so the gap is not the copy's alone; `--full` has an arm that draws them anew. Agreement with a teacher of
short texts says nothing about what a conversion of a large model forgets, nor about long contexts."""
    return first and second and third, text


BEHIND = """So few weights are learned anew, it seems, in the time that new mixers take to catch up with the
embeddings and MLPs that they were given.

"""


def fall(curve: list[dict[str, Any]]) -> float:
    """The largest loss of accuracy from one measurement to the next."""
    return max(before["accuracy"] - after["accuracy"] for before, after in zip(curve, curve[1:]))


def _said(held: bool) -> str:
    return "holds" if held else "does not hold"


def setup(teacher: Transformer, sizes: Sizes, searched: bool) -> str:
    c = teacher.config
    firsts, seconds = (", ".join(f"{rate:g}" for rate in rates) for rates in (ALIGN_RATES, RATES_AFTER))
    chosen = (
        f"Peak rates of each arm are the best of {firsts} for alignment and {seconds} after it on the first seed."
        if searched
        else TRIED
    )
    return f"""The teacher is BabyLlama: {c.num_hidden_layers} blocks of width {c.hidden_size}, {c.num_attention_heads}
query heads of {c.head_dim}, {c.num_key_value_heads} key heads, {c.vocab_size} characters, tied head. The
text is its own: {sizes.rows} rows to learn from and {sizes.held_out} to measure on, {sizes.length} tokens
each, sampled at temperature 1.

The student `radlads` takes everything from the teacher, the attention's projections included, around
RWKV-7's recurrence (balanced state, rotary positions, no token shift, no norm); `arwkv` all but the
attention, for which RWKV-7's time mix starts anew; `scratch` is the same model with nothing taken. Heads of
{c.head_dim} and low ranks of 16 (gate 32) for all, so that states are equally large.

A step reads {sizes.batch} rows. {sizes.align} steps align the mixers (a quarter cosine to 1e-5), then
{sizes.distill} learn the teacher's distribution with all weights (half a cosine to a tenth of the peak);
arms without alignment learn the distribution in all {sizes.align + sizes.distill}. AdamW (0.9, 0.95),
warm-up 20, clip 1, no decay of weights. {chosen}"""


def draw(figure: "Figure", runs: dict[str, list[dict[str, Any]]], ceiling: float) -> None:
    left, right = figure.subplots(1, 2)
    for number, (name, found) in enumerate(runs.items()):
        for i, run in enumerate(found):
            tokens = [point["tokens"] / 1000 for point in run["curve"]]
            style = {"color": f"C{number}", "label": name if i == 0 else None, "marker": ".", "lw": 1.2}
            left.plot(tokens, [point["kl"] for point in run["curve"]], **style)
            right.plot(tokens, [point["accuracy"] for point in run["curve"]], **style)
    left.set(xlabel="thousand tokens", ylabel="KL(teacher‖student), nats", yscale="log", title="one line a seed")
    right.axhline(ceiling, color="grey", ls=":", lw=1, label="teacher")
    right.set(xlabel="thousand tokens", ylabel="next-token accuracy", ylim=(0, 1), title="sampled text, held out")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


REPRODUCTION = Reproduction(
    name="arwkv",
    claim="A trained transformer turns into an RWKV that says nearly the same after far fewer tokens than training "
    "from nothing takes; taking over the attention's projections (RADLADS) helps more than new mixers (ARWKV).",
    source="ARWKV, arXiv 2501.15570, table 1; RADLADS, arXiv 2505.03005, table of conversions",
    experiment=experiment,
)
