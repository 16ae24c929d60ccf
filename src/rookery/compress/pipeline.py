"""All of RWKV-Lite in its order: low-rank projections, hierarchical head, sparse channel mixes, embedding cache, int8.

The order matters: what guesses learns from the model as it is after the steps before it, and must be made again when
the model is trained further.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rookery.checkpoints.checkpoint import Checkpoint, open_checkpoint
from rookery.checkpoints.lite import Head, LowRank, Manifest, Sparsity
from rookery.compress import hierarchical_head as heads
from rookery.compress import low_rank, sparsity
from rookery.compress.file import save
from rookery.errors import BadCheckpoint
from rookery.models import load

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is done to a model; each technique can be left out."""

    low_rank: int = 0
    """Projections keep rank width // this (8 or 4 in the paper); 0: they stay whole."""
    train_steps: int = 0
    """Steps of training all weights after that."""
    lr: float = 5e-4
    """Its peak learning rate."""
    predictor: int = 64
    """Hidden units of the networks that guess hidden units; 0: none."""
    threshold: float = 0.7
    """A unit is used if its predicted probability is above this."""
    shadow_bits: int = 1
    """Bits of a number in the shadows of key matrices, 1, 2 or 4; 0: none, and without predictors nothing is sparse."""
    shadow_quantile: float = 0.95
    """Share of the units that a shadow does not choose."""
    shadow_levels: str = "minmax"
    """"minmax" or "row": see `sparsity.Shadow`."""
    least_zeros: float = 0.5
    """A layer with fewer zeros than this share stays dense."""
    clusters: int = 200
    """Of the head; 0: it stays whole."""
    largest_cluster: float = 0.0
    """The most tokens that one may have, in multiples of their mean number; 0: any number."""
    mass: float = 0.95
    fewest: int = 3
    most: int = 100
    """See `rookery.checkpoints.lite.Head`."""
    embedding_rows: int = 1000
    """Rows of the embedding that are kept in memory; 0: no cache."""
    int8: bool = False
    epochs: int = 100
    """Times that predictors see all that they learn from."""
    head_steps: int = 300
    """Steps of training the head's first level."""
    samples: int = 5_000
    """Tokens that predictors learn from, and that the model writes where no text is given."""
    head_samples: int = 20_000
    """The most tokens that the head's first level learns from."""
    train_rows: int = 8
    """Pieces of 128 tokens of a step of training."""
    seed: int = 0


@dataclass
class Compressed:
    """A compressed model and what was found on the way."""

    model: nn.Module
    manifest: Manifest
    zeros: list[float] = field(default_factory=list)
    """Share of hidden units that are zero, by layer."""
    quality: list[sparsity.Quality | None] = field(default_factory=list)
    """Of the guesses, by layer; None where the layer stays dense."""
    largest_cluster: int = 0


def compress(
    source: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    tokens: Tensor | None = None,
    say: Say = lambda text: None,
) -> Compressed:
    """Compresses the model in `source` into the file `out`, whole or absent, and says on `say` what it finds.

    `tokens` [n] are text to learn from; without them the model writes its own. Numbers keep the precision of the file,
    float16 or bfloat16. Raises ValueError for settings out of range, BadCheckpoint for a model that is compressed
    already or of another family than RWKV-4 to 7.
    """
    settings = settings or Settings()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if checkpoint.lite:
        raise BadCheckpoint(f"{checkpoint.path!r} is compressed already; compress the original model")
    checked(settings, getattr(checkpoint.config, "num_hidden_layers", 1))
    if checkpoint.family.name not in low_rank.FAMILIES:
        raise BadCheckpoint(
            f"{checkpoint.path!r} is of the family {checkpoint.family.name}, which cannot be compressed; "
            f"{', '.join(low_rank.FAMILIES)} can"
        )
    model = load(checkpoint, dtype=torch.float32)
    made = compress_model(model, settings, tokens=tokens, say=say)
    dtype = checkpoint.dtype if checkpoint.dtype.itemsize == 2 else None
    metadata = {"tokenizer": checkpoint.metadata["tokenizer"]} if "tokenizer" in checkpoint.metadata else {}
    trained = settings.low_rank and settings.train_steps
    name = None if trained else checkpoint.metadata.get("fingerprint")
    save(model, out, made.manifest, dtype=dtype, metadata=_beside(checkpoint, Path(out), metadata), fingerprint=name)
    return made


def _beside(checkpoint: Checkpoint, out: Path, metadata: dict[str, str]) -> dict[str, str]:
    """`metadata`, and the vocabulary that they name copied beside `out` where it is a file beside the model."""
    name = metadata.get("tokenizer", "")
    folder = Path(checkpoint.path) if Path(checkpoint.path).is_dir() else Path(checkpoint.path).parent
    if name and Path(name).name == name and (folder / name).is_file() and folder.resolve() != out.parent.resolve():
        own = f"{out.name}.{name}"
        (out.parent / own).write_bytes((folder / name).read_bytes())
        return {**metadata, "tokenizer": own}
    return metadata


def checked(settings: Settings, layers: int) -> Manifest:
    """The manifest that the settings ask for, all layers sparse; ValueError where a number is out of its range."""
    for name in ("low_rank", "train_steps", "epochs", "head_steps", "clusters", "samples"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name}={getattr(settings, name)} must be 0 or more")
    if not 0 <= settings.least_zeros <= 1:
        raise ValueError(f"least_zeros={settings.least_zeros} must lie between 0 and 1")
    guesses = settings.predictor != 0 or settings.shadow_bits != 0
    return Manifest(
        low_rank=LowRank(divisor=settings.low_rank) if settings.low_rank else None,
        sparsity=Sparsity(
            rank=settings.predictor,
            bits=settings.shadow_bits,
            levels=settings.shadow_levels,
            thresholds=[settings.threshold if settings.predictor else None] * layers,
            quantiles=[settings.shadow_quantile if settings.shadow_bits else None] * layers,
        )
        if guesses
        else None,
        embedding_rows=settings.embedding_rows,
        head=Head(clusters=settings.clusters, mass=settings.mass, fewest=settings.fewest, most=settings.most)
        if settings.clusters
        else None,
        int8=settings.int8,
    )


def compress_model(
    model: Any, settings: Settings, *, tokens: Tensor | None = None, say: Say = lambda text: None
) -> Compressed:
    """Compresses a float32 model in place; see `compress`."""
    low_rank.check_family(model)
    made = Compressed(model, checked(settings, len(model.blocks)))
    if tokens is None and (made.manifest.sparsity or made.manifest.head or settings.train_steps):
        say(f"the model writes {settings.samples:,} tokens to learn from")
        tokens = written(model, settings.samples, settings.seed)
    if settings.low_rank:
        low_rank.factorise(model, settings.low_rank)
        say(f"projections have rank {model.config.hidden_size // settings.low_rank}")
        if settings.train_steps and tokens is not None:
            low_rank.train_on(
                model,
                tokens,
                steps=settings.train_steps,
                rows=settings.train_rows,
                lr=settings.lr,
                seed=settings.seed,
                say=say,
            )
    model.requires_grad_(False)
    if tokens is not None:
        rows = _rows(tokens, settings.samples)
        if made.manifest.head:
            _head(made, settings, _rows(tokens, settings.head_samples), say)
        if made.manifest.sparsity:
            _sparse(made, settings, rows, say)
    return made


def _rows(tokens: Tensor, samples: int) -> Tensor:
    """int64 [b, 128] or less: the first tokens in pieces."""
    length = min(128, len(tokens))
    if length < 1:
        raise ValueError("there is no text to learn from")
    count = max(1, min(samples, len(tokens)) // length)
    return tokens[: count * length].long().view(count, length)


@torch.no_grad()
def written(model: Any, count: int, seed: int = 0, rows: int = 32) -> Tensor:
    """int64 [≥ count]: texts that the model writes from token 0 on, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    token, state, found = torch.zeros(rows, 1, dtype=torch.int64), None, []
    for _ in range(-(-count // rows)):
        logits, state = model(token, state)
        token = torch.multinomial(logits[:, -1].float().softmax(-1), 1, generator=generator)
        found.append(token)
    return torch.cat(found, dim=1).flatten()


def _head(made: Compressed, settings: Settings, rows: Tensor, say: Say) -> None:
    model = made.model
    labels = heads.cluster(model.emb.weight, settings.clusters, seed=settings.seed, largest=settings.largest_cluster)
    with torch.no_grad():
        features = torch.cat([model.features(some, None, None)[0].flatten(0, 1) for some in rows.split(8)])
    first = heads.train_first(model.head, labels, features, steps=settings.head_steps, seed=settings.seed)
    count = first.out_features
    made.manifest = replace(made.manifest, head=replace(made.manifest.head, clusters=count))
    model.head = heads.HierarchicalHead(
        model.head, first, labels, mass=settings.mass, fewest=settings.fewest, most=settings.most
    )
    made.largest_cluster = int(model.head.sizes.max())
    say(f"the head has {count} clusters, the largest of {made.largest_cluster:,} tokens")


def _sparse(made: Compressed, settings: Settings, rows: Tensor, say: Say) -> None:
    model, wanted = made.model, made.manifest.sparsity
    assert wanted is not None
    guesses: list[sparsity.Guess | None] = []
    for layer, inputs in enumerate(sparsity.collect(model, rows, settings.samples)):
        key = model.blocks[layer].ffn.key
        made.zeros.append(sparsity.share_of_zeros(key, inputs))
        if made.zeros[-1] < settings.least_zeros:
            guesses.append(None)
            made.quality.append(None)
            say(f"layer {layer}: {made.zeros[-1]:.1%} of the hidden units are zero, too few; it stays dense")
            continue
        guess = guess_for(key, inputs, settings)
        guesses.append(guess)
        made.quality.append(found := sparsity.quality(key, guess, inputs))
        say(
            f"layer {layer}: {made.zeros[-1]:.1%} of the hidden units are zero; {found.loaded:.1%} are used, "
            f"which finds {found.weighted_recall:.1%} of the squared outputs"
        )
    sparsity.sparsify(model, guesses)
    if all(guess is None for guess in guesses):
        made.manifest = replace(made.manifest, sparsity=None)
        return
    made.manifest = replace(
        made.manifest,
        sparsity=replace(
            wanted,
            thresholds=[value if guess else None for value, guess in zip(wanted.thresholds, guesses)],
            quantiles=[value if guess else None for value, guess in zip(wanted.quantiles, guesses)],
        ),
    )


def guess_for(key: nn.Linear, inputs: Tensor, settings: Settings) -> sparsity.Guess:
    """A trained guess for one layer's key matrix."""
    predictor = shadow = None
    if settings.predictor:
        predictor = sparsity.train_predictor(
            key, inputs, rank=settings.predictor, epochs=settings.epochs, seed=settings.seed
        )
    if settings.shadow_bits:
        shadow = sparsity.Shadow.of(key.weight, settings.shadow_bits, settings.shadow_levels)
    return sparsity.Guess(predictor, shadow, threshold=settings.threshold, quantile=settings.shadow_quantile)
