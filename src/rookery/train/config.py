"""What a training run is: dataclasses, overlaid strictly by TOML files and `--set` flags."""

import ast
import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from rookery.adapt.config import AdaptConfig
from rookery.data.augment import Augment
from rookery.errors import UnknownName, unknown


def check_choices(config: Any) -> None:
    """ValueError where a field of a `Literal` type has a value of none of its choices."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise ValueError(f"{name} must be one of {choices}; got {getattr(config, name)!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that is learned."""

    path: str = ""
    """Sources separated by commas: .txt, .jsonl with a "text" field per line, .json with a list of strings, .parquet
    with a "text" column, tokens that `rookery data build` wrote (.bin), or "hf:NAME:SPLIT", a data set of the Hub."""
    weights: str = ""
    """How often each source of `path` is drawn from, its share of rows or documents, numbers separated by commas; where
    empty, by its size."""
    order: Literal["shuffle", "official", "documents"] = "shuffle"
    """Windows of the running text, shuffled; the same in the order of RWKV-LM (core.md 1.10); or whole documents packed
    into a row, each with a state of its own."""
    tokenizer: str = "bytes"
    """"bytes", "world", "20b", or the path of a vocabulary file."""
    validation: str = ""
    """Files of held-out text; where empty, a share of `path` is held out instead."""
    validation_share: float = 0.01
    """Part of the documents of `path` that is held out, taken from the end of each file; 0 for none."""
    sequence_length: int = 512
    """Tokens a row predicts in one step."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, with the official parameter groups, and its schedule."""

    name: Literal["adamw", "muon", "adamw-8bit", "schedule-free"] = "adamw"
    """AdamW; Muon for the matrices of the blocks and AdamW for the rest; AdamW whose moments have 8 bits; AdamW that
    averages weights in place of a schedule."""
    lr: float = 6e-4
    """Peak learning rate."""
    final_lr: float = 6e-5
    """Learning rate of the last step."""
    schedule: Literal["cosine", "wsd", "linear", "exponential", "quarter-cosine"] = "cosine"
    """From the peak to the end: a cosine; stable, then a line; a line; lr · (final_lr / lr)^progress, RWKV-4's; the
    first quarter of a cosine, RADLADS', which stays high for longer."""
    warmup_steps: int = 10
    """Steps in which the rate rises from 1% of the peak."""
    decay_share: float = 0.3
    """Last part of the steps in which a "wsd" schedule decays."""
    weight_decay: float = 0.1
    """On matrices only; see `rookery.train.optim.parameter_groups`."""
    layerwise: bool = False
    """RWKV-LM's layerwise_lr of RWKV-4 to 6: decays at twice the rate, RWKV-4's first-token bonus at three times."""
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    """The official epsilon: so small that rarely used embedding rows still move."""
    clip: float = 1.0
    """Largest global gradient norm."""
    momentum: float = 0.95
    """Of Muon."""
    mixer_lr: float = 0.0
    """Rate of converted models' mixers (names with ".self_attn."), where it is one of their own; 0 for `lr`. It stays
    until `mixer_hold` of the steps and falls by a quarter of a cosine to `mixer_final_lr` at `mixer_end` (RADLADS)."""
    mixer_final_lr: float = 1e-5
    """What the mixers' own rate falls to."""
    mixer_hold: float = 0.833
    """Share of the steps after which it begins to fall."""
    mixer_end: float = 0.875
    """Share of the steps at which it has fallen."""
    ema: float = 0.0
    """What an average of the weights keeps of itself at each step, (1 + steps) / (10 + steps) where that is less; the
    average is what is judged and written. 0 for none."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.schedule == "exponential" and not (self.lr > 0 and self.final_lr > 0):
            raise ValueError("an exponential schedule needs lr and final_lr above 0")
        if self.name == "adamw-8bit" and self.eps < 1e-8:
            # a second moment that 8 bits round to 0 would make a step as large as 1 / eps
            raise ValueError(f"adamw-8bit needs optim.eps of at least 1e-8, got {self.eps}")
        if not 0 <= self.mixer_hold < self.mixer_end <= 1 or self.mixer_lr < 0:
            raise ValueError(
                f"optim.mixer_hold ({self.mixer_hold}) and mixer_end ({self.mixer_end}) must rise within 0 and 1, and "
                f"mixer_lr ({self.mixer_lr}) be 0 or more"
            )
        if not 0 <= self.ema < 1 or (self.ema and self.name == "schedule-free"):
            raise ValueError("optim.ema must lie in [0, 1), and be 0 for schedule-free, which averages by itself")


@dataclass(frozen=True, kw_only=True)
class LongCEConfig:
    """LongCE (arXiv 2410.23771, as RWKV-X trains): tokens that need a long context weigh more.

    A token's weight is exp(its loss after few tokens − its loss after all), between `floor` and `cap`; the first
    2 · `truncation` tokens of a row weigh 1.
    """

    truncation: int = 0
    """Tokens, at least, that the loss after few tokens has before it; 0 for the plain loss."""
    stride: int = 0
    """Tokens that a reading with few tokens before it weighs; 0 means `truncation`."""
    cap: float = 10.0
    floor: float = 0.0
    """1 never weighs a token less than the plain loss does."""
    normalise: bool = False
    """Whether to divide by the mean weight."""

    def __post_init__(self) -> None:
        if self.truncation < 0 or self.stride < 0:
            raise ValueError(f"longce.truncation ({self.truncation}) and stride ({self.stride}) must be 0 or more")
        if not 0 <= self.floor <= self.cap:
            raise ValueError(f"longce.floor ({self.floor}) must lie between 0 and longce.cap ({self.cap})")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    task: ClassVar[str] = "rookery.train.tasks.language:LanguageTask"
    """The class that makes model, data and loss of such a config."""
    model: str = "rwkv7-test"
    """Registered name."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config to replace; the vocabulary size follows the tokenizer unless given."""
    initial: str = ""
    """Model file to start from; where empty, the model's published initial weights. An RWKV-7 gets sparse blocks where
    `model` is an RWKV-X; `overrides` are the sizes that these add."""
    expand_init: Literal["zero", "copy"] = "zero"
    """How blocks put into a model begin: adding nothing to what it computes, or as copies of the blocks before them."""
    train_only: str = ""
    """Patterns of names of the parameters that are trained, separated by commas ("moba.*"); all where empty."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    out: str = "out"
    """Folder of checkpoints, metrics and the finished model; the same command continues what it finds there."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Rows a step, whatever the number of processes."""
    accumulate: int = 1
    """Parts of a process's rows that go through the model one after the other: less memory, the same step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and gradients; master weights are float32 always."""
    longce: LongCEConfig = field(default_factory=LongCEConfig)
    """Weights of tokens in windows of a long text."""
    l2wrap: float = 1e-4
    """Pull on the largest logit (core.md 1.10)."""
    seed: int = 0
    """Of the initial weights and the sample order."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    validate_every: int = 200
    """Steps between measurements on the held-out text; 0 for none."""
    piece_length: int = 0
    """Tokens of a row that go through the model at a time, the state carried on: long rows in little memory; 0 for all.
    """
    piece_gradient: Literal["cut", "through"] = "cut"
    """Whether gradients end where a piece begins (truncated backpropagation) or are those of whole rows, for the time
    of one more reading."""
    context_parallel: int = 1
    """Processes that share each row, with a part of its length each."""
    recompute: bool = False
    """Whether to keep only what goes into each mixer and compute the rest again in the backward pass: less memory."""
    compile: str = ""
    """Backend of torch.compile, for example "inductor"; empty for none."""
    bad_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, each of them skipped, after which the run stops."""
    track: str = ""
    """Where metrics go besides metrics.jsonl, separated by commas: "tensorboard", "trackio", "wandb"."""
    device: str = "auto"
    """Where to train: "cpu", "cuda"; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch_size", "accumulate", "context_parallel", "save_every", "keep", "bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_choices(self.data)
        if self.piece_length < 0:
            raise ValueError(f"piece_length must be 0 or more, got {self.piece_length}")
        if self.piece_length and not isinstance(self, FinetuneConfig | DistillConfig) and type(self) is not TrainConfig:
            raise ValueError("piece_length is for models that learn text")
        if self.piece_length and self.context_parallel > 1:
            raise ValueError("rows are cut in pieces (piece_length) or shared (context_parallel), not both")
        if type(self) is not TrainConfig and self.longce.truncation:
            raise ValueError("longce is for models that learn running text (`rookery train`)")
        if self.train_only and not isinstance(self, FinetuneConfig) and type(self) is not TrainConfig:
            raise ValueError("train_only is for models that learn text (`rookery train`, `rookery finetune`)")
        if self.longce.truncation and (self.piece_length or self.context_parallel > 1):
            raise ValueError("longce weighs tokens of whole rows: use piece_length=0 and context_parallel=1")
        if self.longce.truncation and self.data.order == "documents":
            raise ValueError('longce weighs tokens of windows: use data.order="shuffle" or "official"')
        if not 0 <= self.data.validation_share < 1:
            raise ValueError(f"data.validation_share must lie in [0, 1), got {self.data.validation_share}")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How answers are preferred."""

    beta: float = 0.1
    """DPO: how much a preference may move the model away from what it was."""
    smoothing: float = 0.0
    """DPO: share of pairs that may be the wrong way round."""
    weight: float = 0.1
    """ORPO: weight of the preference beside the loss on the chosen answers (λ)."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """One fine-tuning run. A step reads whole documents of up to batch_size × sequence_length tokens together."""

    task: ClassVar[str] = "rookery.train.tasks.finetune:FinetuneTask"
    base: str = ""
    """Model to start from: a file, a folder, a Hub id, or "embedded" for the one that ships with the package."""
    learn: Literal["sft", "dpo", "orpo"] = "sft"
    """Answers and texts themselves, or which of two answers to prefer."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """What of the model is trained."""
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer=""))
    """`path` may hold text or conversations, see `rookery.data.jsonl`; no tokenizer: the base model's own."""
    template: str = "g1"
    """Chat template that conversations are written in."""
    mask: Literal["assistant", "qa", "none"] = "assistant"
    """Learned are: answers; answers of a `text` with "User:" and "Assistant:" in it; everything."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    merge: bool = False
    """Whether to write the model with its adapter merged, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial or self.overrides:
            raise ValueError("a fine-tuning run starts from `base`: leave out `initial` and `overrides`")
        if self.train_only and self.adapt.method != "full":
            raise ValueError(
                f'train_only chooses among all weights: adapt.method must be "full", not {self.adapt.method!r}'
            )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What a transformer becomes."""

    to: Literal["arwkv", "rad-rwkv6", "rad-rwkv7"] = "rad-rwkv7"
    """RWKV-7's own time mix, begun anew (ARWKV); or the attention's projections around RWKV-6's or RWKV-7's recurrence
    (RADLADS)."""
    keep_attention: str = ""
    """Blocks that keep softmax attention: "last:4", "first:2", or "0,3-5" counted from 0."""
    untie: bool = True
    """Whether a student whose teacher's head is its embedding gets a head of its own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the student's config, such as head_dim or decay_rank."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """One stage of turning a transformer into an RWKV."""

    task: ClassVar[str] = "rookery.train.tasks.distill:DistillTask"
    teacher: str = ""
    """The transformer: a folder of Hugging Face's shape, a file, or a Hub id."""
    student: str = ""
    """Model file to go on from, the result of an earlier stage; where empty, the teacher is converted."""
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    """How, where no student is given."""
    stage: Literal["align", "distill"] = "align"
    """The time mixes learn to answer as the attention did, everything else standing still; or the whole model learns
    the teacher's distribution of every next token."""
    distance: Literal["norm", "square"] = "norm"
    """Of "align": the mean over tokens of the outputs' distance, or their mean square difference."""
    divergence: Literal["forward", "adaptive"] = "forward"
    """Of "distill": KL(teacher ‖ student); or a mixture with the reverse by where both differ (arXiv 2404.02657)."""
    text_weight: float = 0.0
    """Of "distill": weight of the cross-entropy of the text itself beside the divergence."""
    freeze_mlp: bool = False
    """Of "distill": whether the MLPs stay as the teacher's."""
    top_k: int = 0
    """Of "distill": learn from the teacher's likeliest tokens and the mass of the rest alone, computed before training
    and kept on the disk, so that teacher and student never share the memory; 0 for the whole distribution."""
    cache: str = ""
    """Folder of what "top_k" keeps; where empty, one in `out`. Runs on the same data and teacher may share it."""
    detach_v_first: bool = False
    """Whether no gradient flows into the first time mix through its values, as in ARWKV's trainer."""
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer=""))
    """No tokenizer: the teacher's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial or self.overrides:
            raise ValueError("distilling starts from `teacher` or `student`: leave out `initial` and `overrides`")
        if self.top_k < 0 or self.text_weight < 0:
            raise ValueError(f"top_k and text_weight must be 0 or more, got {self.top_k} and {self.text_weight}")
        if self.top_k and (self.stage, self.divergence) != ("distill", "forward"):
            raise ValueError("top_k keeps enough for the forward divergence only: stage=distill, divergence=forward")


@dataclass(frozen=True, kw_only=True)
class SeriesConfig(TrainConfig):
    """One run of a forecaster. `data.path` is a CSV file, a row of the batch a window of all its channels."""

    task: ClassVar[str] = "rookery.train.tasks.forecast:ForecastTask"


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """The pictures that are learned."""

    path: str = ""
    """A folder with train/CLASS and val/CLASS, a folder of classes, a .tar with train/CLASS/NAME and test/CLASS/NAME, a
    .npz with train_images, train_labels, test_images and test_labels, or "digits", those of scikit-learn."""
    validation_share: float = 0.1
    """Part of each class that is held out where `path` has no part of its own for that."""
    normalise: Literal["imagenet", "plain"] = "plain"
    """By ImageNet's mean and deviation, or to values of −1 to 1. The model file says which."""
    crop: float = 1.0
    """Share of the shorter side of held-out pictures that is kept, from the middle."""
    workers: int = 0
    """Threads that read the pictures of the next step meanwhile; 0 reads them when they are needed."""


@dataclass(frozen=True, kw_only=True)
class ImageOptimConfig(OptimConfig):
    """The optimiser for models of images, which group their own parameters."""

    eps: float = 1e-8
    beta2: float = 0.999
    layer_decay: float = 1.0
    """Each block's rate relative to that of the block above it: 0.65 to 0.95 when a trained model goes on."""
    decay_vectors: bool = False
    """Whether decays, mixes, factors and positions get weight decay, as the authors of Vision-RWKV have it."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig(TrainConfig):
    """One run of a classifier of images."""

    task: ClassVar[str] = "rookery.train.tasks.images:ImageTask"
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    augment: Augment = field(default_factory=Augment)
    """How pictures are changed before they are learned from."""
    optim: ImageOptimConfig = field(default_factory=ImageOptimConfig)
    smoothing: float = 0.1
    """Share of the target that is spread over all classes."""


@dataclass(frozen=True, kw_only=True)
class DiffusionOptimConfig(OptimConfig):
    """The optimiser for diffusion models: no weight decay, averaged weights (arXiv 2404.04478)."""

    lr: float = 1e-4
    final_lr: float = 1e-6
    weight_decay: float = 0.0
    eps: float = 1e-8
    beta2: float = 0.999
    ema: float = 0.9999


@dataclass(frozen=True, kw_only=True)
class ImagineConfig(TrainConfig):
    """One run of a diffusion model. A row of the batch is a picture with a caption, or with the number of its class."""

    task: ClassVar[str] = "rookery.train.tasks.diffusion:DiffusionTask"
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    augment: Augment = field(default_factory=Augment)
    """How pictures are changed before they are learned from."""
    optim: DiffusionOptimConfig = field(default_factory=DiffusionOptimConfig)
    captions: str = "{}|a {}|a picture of {}"
    """Captions of a picture, one of which is drawn each time, "|" between them; {} is the name of its class."""
    drop: float = 0.1
    """Share of the captions or classes that are withheld, which guidance needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a share from 0 to 1, got {self.drop}")
        if "{}" not in self.captions or not all(caption.strip() for caption in self.captions.split("|")):
            raise ValueError(
                f"captions need {{}} for the name of a class, and none may be empty; got {self.captions!r}"
            )


@dataclass(frozen=True, kw_only=True)
class MaskedImageConfig(ImageConfig):
    """One run of a masked autoencoder: the encoder learns from pictures alone. `smoothing` is of no use here."""

    task: ClassVar[str] = "rookery.train.tasks.masked:MaskedTask"
    hidden_share: float = 0.75
    """Part of the patches that the encoder does not see."""
    decoder_size: int = 512
    """Width of the decoder, which the run does not keep."""
    decoder_layers: int = 8
    """Its blocks."""


@dataclass(frozen=True, kw_only=True)
class PairDataConfig:
    """The pictures and texts that are learned."""

    path: str = ""
    """A .jsonl with "image" and "raw", "synthetic", "generated" or "tags" a line, a .csv or .tsv with such columns, or
    a .tar of webdataset."""
    validation: str = ""
    """Such a file of held-out pairs; none where empty."""
    validation_share: float = 0.0
    """Not used: held-out pairs have a file of their own."""
    text: str = "uniform"
    """Which text a step reads: any that the picture has, one kind, or weights as in "raw=1,generated=2"."""
    tokenizer: str = "words"
    """A vocabulary of the words of the texts, or CLIP's: its tokenizer.json or bpe_simple_vocab_16e6.txt.gz."""
    normalise: Literal["clip", "imagenet", "plain"] = "clip"
    """By CLIP's mean and deviation, by ImageNet's, or to values of −1 to 1."""


@dataclass(frozen=True, kw_only=True)
class PairConfig(TrainConfig):
    """One run of a model of images and texts."""

    task: ClassVar[str] = "rookery.train.tasks.contrastive:ContrastiveTask"
    data: PairDataConfig = field(default_factory=PairDataConfig)
    augment: Augment = field(default_factory=Augment)
    """How pictures are changed before they are learned from; not `mixup` and `cutmix`."""
    optim: ImageOptimConfig = field(default_factory=lambda: ImageOptimConfig(beta2=0.98, decay_vectors=True))
    loss: Literal["clip", "siglip"] = "clip"
    """A choice among the texts of the batch, or a yes or no for each of them."""


def overlay(config: Any, values: dict[str, Any], where: str = "") -> Any:
    """`config` with `values` applied, nested dictionaries going into nested dataclasses.

    An unknown key or a value of the wrong type is an error that names its place.
    """
    known = {f.name: f for f in fields(config)}
    changes = {}
    for key, value in values.items():
        if key not in known:
            raise unknown("setting", where + key, [where + name for name in known], "`rookery train RECIPE --dry-run`")
        old = getattr(config, key)
        if is_dataclass(old) and isinstance(value, dict):
            changes[key] = overlay(old, value, f"{where}{key}.")
        elif isinstance(old, dict) and isinstance(value, dict):
            changes[key] = {**old, **value}
        else:
            changes[key] = _checked(where + key, old, value)
    return replace(config, **changes)


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Nested values of both; `other` wins."""
    both = {**one, **other}
    nested = [key for key in one if isinstance(one[key], dict) and isinstance(other.get(key), dict)]
    return both | {key: merged(one[key], other[key]) for key in nested}


def _checked(name: str, old: Any, value: Any) -> Any:
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(old):
        raise UnknownName(f"{name} is {type(old).__name__}, for example {old!r}; got {value!r}")
    return value


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Nested values of "a.b=c" strings; what Python reads as a literal is one, the rest is text."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, for example --set optim.lr=1e-3; got {setting!r}")
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = _literal(text)
    return values


def _literal(text: str) -> Any:
    if text in ("true", "false"):  # as TOML spells them
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_toml(path: Path) -> dict[str, Any]:
    """Values of a TOML file, to be overlaid."""
    with path.open("rb") as file:
        return tomllib.load(file)


def describe(config: TrainConfig) -> str:
    """The whole configuration as "key = value" lines, as `--dry-run` prints it."""
    return "\n".join(_lines(asdict(config), ""))


def _lines(values: dict[str, Any], where: str) -> list[str]:
    lines = []
    for key, value in values.items():
        lines += _lines(value, f"{where}{key}.") if isinstance(value, dict) and value else [f"{where}{key} = {value!r}"]
    return lines
