"""Meta-State: two links in one block by a second reading of the state; a model that grows against ones that do not."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rookery.data.generated import row_generator
from rookery.data.passkey_text import filler
from rookery.families.meta_state import MetaStateConfig
from rookery.models import create_model
from rookery.models.meta_state import MetaMix, MetaState
from rookery.models.rwkv7 import Signals
from rookery.ops.wkv7 import wkv7
from rookery.reproduce.base import Outcome, Reproduction, Work
from rookery.reproduce.report import mean_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1)
SYMBOLS = 16
"""Symbols of each of the alphabets a, b and c."""
PAIRS = 8
"""Pairs a b, and as many b c, of a sequence."""
LENGTH = 64
BATCH = 16
WIDTH = 64
LR = 4e-3


def two_hops(queries: int, seed: int) -> dict[str, float]:
    """Accuracy of one block with constructed weights that is asked for c, given a, with its encoder and without.

    A sequence holds pairs a b and b c in random order, a separator after each. Embeddings are unit vectors, a token's
    key is the token before it, its value itself, nothing fades: S = Σ e(now) e(before)ᵀ. Asked with a, the time mix
    adds 2 S e(a), which is b; the encoder asks with what then is in the stream and finds c.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(queries, 3, SYMBOLS, generator=generator).argsort(-1)
    a, b, c = (chosen[:, i, :PAIRS] + i * SYMBOLS for i in range(3))
    separator = torch.full((queries, PAIRS), 3 * SYMBOLS)
    triples = torch.cat([torch.stack([a, b, separator], -1), torch.stack([b, c, separator], -1)], 1)
    order = torch.rand(queries, 2 * PAIRS, generator=generator).argsort(1)
    tokens = triples.gather(1, order[..., None].expand(-1, -1, 3)).flatten(1)
    asked = torch.randint(PAIRS, (queries, 1), generator=generator)
    query, answer = a.gather(1, asked), c.gather(1, asked)[:, 0] - 2 * SYMBOLS
    embedding = torch.eye(WIDTH)
    seen = embedding[torch.cat([tokens, query], 1)]
    before = torch.nn.functional.pad(seen, (0, 0, 1, 0))[:, :-1]
    # the question itself is not written down
    before[:, -1] = 0
    still = torch.zeros_like(seen)[:, :, None]
    inputs = {"log_w": still, "k": before[:, :, None], "v": seen[:, :, None], "a": still, "b": still}
    state = torch.zeros(queries, 1, WIDTH, WIDTH)
    y, after = wkv7(r=seen[:, :, None], **inputs, state=state)
    stream = (seen + 2 * y[:, :, 0])[:, -1:]
    config = MetaStateConfig(vocab_size=2, hidden_size=WIDTH, head_dim=WIDTH, num_hidden_layers=1, sse_ratio=1.0)
    mix = MetaMix(config)
    last = {name: part[:, -1:] for name, part in inputs.items()}
    signals = Signals(r=still[:, -1:], **last, gate=still[:, -1:, 0], rate_logit=still[:, -1:, 0])
    found = {}
    with torch.no_grad():
        for name, eta in (("with", 4.0), ("without", 0.0)):
            mix.sse_eta.fill_(eta)
            u = mix.encoded(stream, mix.read(stream, signals, after, None))
            # alike where nothing was found: a tie is broken by chance
            logits = (u @ embedding.T)[:, 0, 2 * SYMBOLS : 3 * SYMBOLS]
            logits = logits + 1e-6 * torch.rand(logits.shape, generator=generator)
            found[name] = float((logits.argmax(-1) == answer).float().mean())
    return found


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to spend the tokens; lengths are in halves of the whole."""

    name: str
    tokens: int
    """Parameter tokens at first, in widths."""
    halves: int = 2
    grows: dict[str, int] | None = None
    """What is added after the first half."""
    ratio: float = 0.0
    """Share of heads that are read by the channel mix."""
    baseline: bool = False


RUNS = (
    Run(name="large from scratch", tokens=4, baseline=True),
    Run(name="grown: parameter tokens", tokens=1, grows={"tokens": 3 * WIDTH}),
    Run(name="grown: parameter tokens and heads", tokens=1, grows={"tokens": 3 * WIDTH, "heads": 2}),
    Run(name="small", tokens=1),
    Run(name="large from scratch, half the tokens", tokens=4, halves=1),
    Run(name="large with the encoder", tokens=4, ratio=0.5),
)


def text(work: Work) -> tuple[Tensor, Tensor]:
    """Bytes to learn from and to be measured on: Shakespeare, or made-up sentences for --quick."""
    if work.scale == "quick":
        found = filler(20_000, row_generator(0, "train", 0)).encode()
    else:
        found = work.data("text/tinyshakespeare.txt")[0].read_bytes()
    corpus = torch.tensor(list(found))
    cut = int(0.95 * len(corpus))
    return corpus[:cut], corpus[cut:]


def model_of(run: Run, seed: int) -> MetaState:
    ranks = {"decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 16}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": run.tokens * WIDTH}
    return create_model("meta-state", vocab_size=128, sse_ratio=run.ratio, seed=seed, **sizes, **ranks)


def bits(model: MetaState, rows: Tensor) -> Tensor:
    logits, _ = model(rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / math.log(2)


def train(work: Work, run: Run, seed: int) -> dict[str, Any]:
    """Trains one run; its curve on held-out rows, sizes, and what growth did to its loss."""
    half = work.size(quick=2, default=200, full=1500)
    learned, held_out = text(work)
    count = work.size(quick=8, default=96, full=256)
    test = held_out[: len(held_out) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)[:count]
    model, steps = model_of(run, seed), run.halves * half
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.1)
    every = max(1, half // 10)
    curve, cost, jump = [], 0.0, None

    def measured() -> float:
        with torch.no_grad():
            return float(bits(model, test))

    for step in range(steps):
        if run.grows and step == half:
            before = measured()
            model.grow(**run.grows, optimizer=optimizer, seed=seed)
            jump = measured() - before
        share = step / steps
        rate = LR * min(1.0, (step + 1) / 10) * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(1_000_000 * seed + step)
        starts = torch.randint(len(learned) - LENGTH - 1, (BATCH, 1), generator=generator)
        loss = bits(model, learned[starts + torch.arange(LENGTH + 1)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cost += sum(p.numel() for p in model.parameters())
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append((step + 1, measured()))
    parameters = sum(p.numel() for p in model.parameters())
    return {"curve": curve, "parameters": parameters, "cost": cost, "jump": jump, "half": half}


def experiment(work: Work) -> Outcome:
    work.planned = len(SEEDS) * (len(RUNS) + 1)
    queries = work.size(quick=100, default=4000, full=4000)
    hops = [work.part(f"two-hops-{seed}", lambda: two_hops(queries, seed)) for seed in SEEDS]  # noqa: B023
    found = {
        run.name: [work.part(f"run{number}-{seed}", lambda: train(work, run, seed)) for seed in SEEDS]  # noqa: B023
        for number, run in enumerate(RUNS)
    }
    table = [row(run, found[run.name]) for run in RUNS]
    shown, findings = judge(table, found, hops)
    return Outcome(
        table=table,
        shown=shown,
        findings=findings,
        setup=setup(work, queries),
        seeds=SEEDS,
        plot=lambda figure: draw(figure, found, hops),
        figure_size=(10, 4.2),
    )


def row(run: Run, parts: list[dict[str, Any]]) -> dict[str, Any]:
    jumps = [abs(part["jump"]) for part in parts if part["jump"] is not None]
    return {
        "run": run.name,
        "baseline": run.baseline,
        "parameters at the end": parts[0]["parameters"],
        **mean_spread("bits per byte", [part["curve"][-1][1] for part in parts]),
        "largest jump at the growth": max(jumps, default=None),
        "parameters × steps, of the baseline's": parts[0]["cost"],
    }


def judge(table: list[dict[str, Any]], found: dict[str, list], hops: list[dict[str, float]]) -> tuple[bool, str]:
    """The rule: see its text."""
    whole = table[0]["parameters × steps, of the baseline's"]
    for line in table:
        line["parameters × steps, of the baseline's"] /= whole
        if line["largest jump at the growth"] is not None:
            line["largest jump at the growth"] = f"{line['largest jump at the growth']:.1e}"
    by_name = {line["run"]: line for line in table}
    grown, small = by_name["grown: parameter tokens"], by_name["small"]
    large, encoder = by_name["large from scratch"], by_name["large with the encoder"]
    name = "bits per byte"
    lead = small[name] - grown[name]
    reused = lead > small[f"{name} ±"] + grown[f"{name} ±"]
    jumps = [abs(part["jump"]) for parts in found.values() for part in parts if part["jump"] is not None]
    smooth = max(jumps) < 1e-4
    links = min(one["with"] for one in hops), max(one["without"] for one in hops)
    second = links[0] > 0.99 and links[1] < 2 / SYMBOLS
    gap = grown[name] - large[name]
    difference = encoder[name] - large[name]
    text = f"""The rule, fixed before the run: (1) the constructed block answers two links with its encoder (above 99%)
and not without (below {100 * 2 / SYMBOLS:.1f}%); (2) growth moves the held-out loss by less than 1e-4 bits; (3) after
equal tokens the model whose parameter tokens grew lies below the one that stayed small by more than both spreads.

(1) {100 * links[0]:.1f}% with the encoder, {100 * links[1]:.1f}% without (chance {100 / SYMBOLS:.2f}%). (2) The largest
jump is {max(jumps):.1e} bits. (3) Grown: {grown[name]:.3f}, small: {small[name]:.3f} bits per byte. From scratch, large
from the first token on: {large[name]:.3f}; growth is {abs(gap):.3f} bits {"behind" if gap > 0 else "ahead"} at equal
tokens for {100 * grown["parameters × steps, of the baseline's"]:.0f}% of its parameters × steps.

The encoder alone, trained from scratch at equal tokens, changes the loss by {difference:+.3f} bits
(spread {encoder[f"{name} ±"]:.3f}); nothing was expected of it at this size.

An interpretation: the paper has no public code, weights or tables to compare with. (1) says what a second reading of
the state can do in kind; that training finds it is not shown here."""
    return second and smooth and reused, text


def setup(work: Work, queries: int) -> str:
    half = work.size(quick=2, default=200, full=1500)
    return f"""Two links: {PAIRS} pairs a b and {PAIRS} pairs b c of alphabets of {SYMBOLS} symbols in random order, one
head of {WIDTH} channels, constructed weights, {queries:,} sequences a seed; the answer is the likeliest symbol of c.

Growth: Meta-State with two blocks of width {WIDTH}, heads of 16, low ranks of 8 (gate 16), bytes of tinyshakespeare,
the last 5% held out. {2 * half} steps of {BATCH} rows of {LENGTH} bytes, AdamW {LR:g} falling to 10% by a cosine,
clipped at 1; growth after {half} steps, with the optimiser's moments. "Small" has {WIDTH} parameter tokens, "large"
{4 * WIDTH};
η = 0.1 at first where there is an encoder, and none otherwise. Every run of a seed reads the same rows."""


def draw(figure: "Figure", found: dict[str, list[dict[str, Any]]], hops: list[dict[str, float]]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for number, (name, parts) in enumerate(found.items()):
        for i, part in enumerate(parts):
            steps, values = zip(*part["curve"])
            left.plot(steps, values, color=f"C{number}", label=name if i == 0 else None, lw=1.1)
    half = next(iter(found.values()))[0]["half"]
    left.axvline(half, color="grey", lw=0.8, ls=":")
    lowest = min(part["curve"][-1][1] for parts in found.values() for part in parts)
    left.set(xlabel="steps", ylabel="held-out bits per byte", ylim=(lowest - 0.03, lowest + 0.4))
    left.set_xlim(0.6 * half, 2.02 * half)
    left.set_title("one line a seed; dotted: growth")
    left.legend(fontsize=7)
    for i, name in enumerate(("with", "without")):
        right.bar([i + 0.2 * k for k in range(len(hops))], [one[name] for one in hops], width=0.18, color=f"C{i}")
    right.axhline(1 / SYMBOLS, color="grey", lw=0.8, ls=":")
    right.set(xticks=[0.1, 1.1], xticklabels=["with encoder", "without"], ylim=(0, 1.03))
    right.set_title("two links in one block")
    for axes in (left, right):
        axes.grid(alpha=0.3)


REPRODUCTION = Reproduction(
    name="meta-state",
    claim="A channel mix that reads the matrix state follows two links in one block, and a model can be enlarged while "
    "it is trained, with all that it has learned.",
    source="Meta-State, arXiv 2504.08247; an interpretation, no public code, weights or tables to compare with",
    experiment=experiment,
)
