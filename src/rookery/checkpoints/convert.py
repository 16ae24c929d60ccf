"""Any readable model file into any writable format, one tensor in memory at a time."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rookery.checkpoints import pack
from rookery.checkpoints.atomic import replacing, replacing_folder
from rookery.checkpoints.checkpoint import Checkpoint, open_checkpoint
from rookery.checkpoints.layout import to_foreign
from rookery.checkpoints.safetensors import CONVENTION, write_safetensors
from rookery.checkpoints.source import BFLOAT16, Stored
from rookery.errors import BadTokenizer, MissingDependency, unknown

TARGETS = ("official", "pth", "hf", "fla", "ggmf", "gguf")
SUFFIXES = {".safetensors": "official", ".pth": "pth", ".pt": "pth", ".bin": "ggmf", ".gguf": "gguf"}
"""Ending of a destination -> target; a name without any of them is a folder."""
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
PACKED = ("q8_0", "q4_0")
"""Further types, for GGUF alone."""
QUANTISED = pack.FORMATS
"""Further types, for official names alone."""
_GENERAL = ("architecture", "file_type", "alignment", "quantization_version")
OF_THE_FILE = {"version", "packed", "lite", "tokenizer", *(f"general.{key}" for key in _GENERAL)}
"""Metadata that say how the source is written, not what it is."""
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, counted as in the source."""


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: str
    target: str
    nbytes: int
    """Bytes of the tensors read."""
    left_out: tuple[str, ...] = ()
    """Tensors that the model does not use and the target has no place for."""
    beside: tuple[str, ...] = ()
    """Further files: the sidecar, the tokenizer."""
    remarks: tuple[str, ...] = ()
    """What the user should know."""


def convert(
    source: str | os.PathLike[str] | Checkpoint,
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the model in `source`, a path or an open checkpoint, to `destination`, whole or not at all.

    `to` is one of TARGETS; left out, the ending of `destination` tells, a name without a known one is a folder. `dtype`
    is one of DTYPES, for GGUF also q8_0 or q4_0, for a .safetensors file int8 or int4 (see `pack`); left out, every
    tensor keeps its precision where the target can hold it, and widens where it cannot. Metadata and the tokenizer go
    along; what the target cannot carry is written beside it, to DESTINATION.json. Raises BadCheckpoint for a bad
    source, ValueError for a target that cannot hold the model.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    path = Path(destination)
    target = _target(checkpoint, path, to)
    _check_dtype(target, dtype)
    if path.exists() and Path(checkpoint.path).exists() and path.samefile(checkpoint.path):
        raise ValueError(f"{str(path)!r} is the source itself; give the result another name")
    checkpoint, remarks = _for_target(checkpoint, target)
    tensors, left_out = _with_unused(checkpoint, target)
    total = sum(tensor.nbytes for tensor in tensors.values())
    tensors = _counted(tensors, progress, total)
    tokenizer = _tokenizer(checkpoint)
    beside = WRITERS[target](_Job(checkpoint, tensors, path, dtype, tokenizer, _metadata(checkpoint)))
    return Conversion(str(path), target, total, left_out, beside, remarks)


@dataclass(frozen=True)
class _Job:
    """What a writer needs."""

    checkpoint: Checkpoint
    tensors: Mapping[str, Stored]
    """Official names, values as the target means them."""
    path: Path
    dtype: str | None
    tokenizer: Any
    metadata: dict[str, str]

    def typed(self, foreign: Mapping[str, Stored] | None = None) -> dict[str, Stored]:
        """Tensors of the type asked for."""
        tensors = self.tensors if foreign is None else foreign
        dtype = DTYPES.get(self.dtype or "")
        return {name: _cast(tensor, dtype or tensor.dtype, name) for name, tensor in tensors.items()}


def _target(checkpoint: Checkpoint, path: Path, to: str | None) -> str:
    family = checkpoint.family
    if to is None:
        folder = "hf" if "hf" in family.layouts else "fla"
        to = SUFFIXES.get(path.suffix.lower(), folder)
    elif to not in TARGETS:
        raise unknown("target", to, TARGETS, "`rookery convert --help`")
    if to == "hf" and "hf" not in family.layouts and "fla" in family.layouts:
        to = "fla"  # the models on the Hub have these names
    if to in ("official", "pth"):
        return to
    able = [name for name in TARGETS if name in ("official", "pth") or name in family.layouts]
    if to not in able or _variant_without(checkpoint, to):
        raise ValueError(f"{_kind(checkpoint)} cannot be written as {to}; it can as {', '.join(able)}")
    if to in ("hf", "fla") and path.suffix.lower() in SUFFIXES:
        raise ValueError(f"{to} is a folder with config.json; give a name without {path.suffix!r}")
    return to


def _kind(checkpoint: Checkpoint) -> str:
    if kept := getattr(checkpoint.config, "attention_layers", ()):
        return f"{checkpoint.family.name} with softmax attention in {len(kept)} blocks"
    return getattr(checkpoint.config, "variant", checkpoint.family.name)


def _variant_without(checkpoint: Checkpoint, target: str) -> bool:
    """True for what no other program runs: the variants of RWKV-6, and converted models outside of their folders."""
    config = checkpoint.config
    if target == "gguf" and getattr(config, "attention_layers", ()):
        return True  # no architecture of llama.cpp mixes these blocks with attention
    if target == "gguf" and checkpoint.family.name == "rad-rwkv6":
        return config.gate != "full" or not config.balance_state or config.mixed_width != config.hidden_size
    if target == "gguf" and checkpoint.family.name == "arwkv":
        return config.gate == "delta"
    return getattr(config, "variant", "x060") != "x060"


def _check_dtype(target: str, dtype: str | None) -> None:
    known = (*DTYPES, *{"gguf": PACKED, "official": QUANTISED}.get(target, ()))
    if dtype is None or (dtype in known and not (target == "ggmf" and dtype == "bfloat16")):
        return
    if dtype in (*DTYPES, *PACKED, *QUANTISED):
        known = tuple(name for name in known if target != "ggmf" or name != "bfloat16")
        raise ValueError(f"{target} files cannot hold {dtype}; they can {', '.join(known)}")
    raise unknown("dtype", dtype, (*DTYPES, *PACKED, *QUANTISED), "`rookery convert --help`")


def _for_target(checkpoint: Checkpoint, target: str) -> tuple[Checkpoint, tuple[str, ...]]:
    """The same function with the settings that readers of the target assume; and what it cannot say."""
    if target == "official" or checkpoint.family.kind != "language":  # our metadata say everything
        return checkpoint, ()
    if getattr(checkpoint.config, "rescale_every", 0):
        checkpoint = _undivided(checkpoint)
    family, config = checkpoint.family, checkpoint.config
    known = {name: getattr(config, name) for name in family.not_in_shapes}
    assumed = family.config_from_shapes(checkpoint.shapes, **known)
    layout = family.layouts.get(target)
    assumed = replace(assumed, **layout.config) if layout else assumed
    theirs, ours = (getattr(c, "group_norm_eps", None) for c in (assumed, config))
    if theirs != ours:
        checkpoint = _with_eps(checkpoint, theirs)
        config = checkpoint.config
    carried = {"layer_norm_eps"} if target in ("hf", "fla", "gguf") else set()
    silent = [
        f"{key}={value!r}"
        for key, value in asdict(config).items()
        if getattr(assumed, key) != value and key not in {*carried, "init", "value_rank", "gate_rank"}
    ]
    if not silent:
        return checkpoint, ()
    return checkpoint, (f"only rookery will know of {', '.join(silent)}: {target} files do not say it",)


def _undivided(checkpoint: Checkpoint) -> Checkpoint:
    """The same function without halving the stream on the way (`nn.rwkv.rescale`), of which other files do not tell."""
    every = checkpoint.config.rescale_every

    def whole(name: str, tensor: Stored) -> Stored:
        if not name.endswith((".att.output.weight", ".ffn.value.weight")):
            return tensor
        factor = 2.0 ** (int(name.split(".")[1]) // every)  # a power of two: exact
        values = lambda: (tensor.read() * np.asarray(factor, tensor.dtype)).astype(tensor.dtype)  # noqa: E731
        return replace(tensor, read=values, packed=None)

    tensors = {name: whole(name, tensor) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, config=replace(checkpoint.config, rescale_every=0), tensors=tensors)


def _with_eps(checkpoint: Checkpoint, eps: float) -> Checkpoint:
    """Another epsilon of the norm over heads: norm(y, e) is norm(c·y, c²e), and y is linear in the values.

    RWKV-7 adds a bonus behind the norm, which would be scaled along.
    """
    config = checkpoint.config
    factor = math.sqrt(eps / config.group_norm_eps)
    if checkpoint.family.name not in ("rwkv5", "rwkv6"):
        raise ValueError(f"{_kind(checkpoint)} with group_norm_eps={config.group_norm_eps} fits official files only")
    factor = round(factor, 9)  # 8 and 1/8 are meant: exact in every type

    def scaled(name: str, tensor: Stored) -> Stored:
        if not name.endswith(".att.value.weight"):
            return tensor
        values = lambda: (tensor.read() * np.asarray(factor, tensor.dtype)).astype(tensor.dtype)  # noqa: E731
        return replace(tensor, read=values, packed=None)

    tensors = {name: scaled(name, tensor) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, config=replace(config, group_norm_eps=eps), tensors=tensors)


def _with_unused(checkpoint: Checkpoint, target: str) -> tuple[dict[str, Stored], tuple[str, ...]]:
    if target in ("official", "pth"):
        return {**checkpoint.tensors, **checkpoint.kept}, ()
    return dict(checkpoint.tensors), checkpoint.unused


def _counted(tensors: Mapping[str, Stored], progress: Progress | None, total: int) -> dict[str, Stored]:
    """Tensors that report when they are read for the first time."""
    if progress is None:
        return dict(tensors)
    done: dict[str, int] = {}

    def read(name: str, tensor: Stored) -> np.ndarray:
        values = tensor.read()
        done[name] = tensor.nbytes
        progress(sum(done.values()), total)
        return values

    def copied(name: str, tensor: Stored) -> np.ndarray:
        done[name] = tensor.nbytes
        progress(sum(done.values()), total)
        return tensor.packed.data()

    def counted(name: str, tensor: Stored) -> Stored:
        packed = tensor.packed and replace(tensor.packed, data=partial(copied, name, tensor))
        return replace(tensor, read=partial(read, name, tensor), packed=packed)

    return {name: counted(name, tensor) for name, tensor in tensors.items()}


def _cast(tensor: Stored, dtype: np.dtype, name: str) -> Stored:
    """`tensor` with numbers of `dtype`; ValueError when it is read if a number is too large for that."""
    if tensor.dtype == dtype:
        return tensor

    def read() -> np.ndarray:
        values = tensor.read()
        with np.errstate(over="ignore", invalid="ignore"):
            cast = values.astype(dtype)
        if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(values).all():
            largest = float(np.abs(values).max())
            raise ValueError(
                f"{name!r} has numbers up to {largest:.6g}, and float16 ends at 65504; use bfloat16 or float32"
            )
        return cast

    return Stored(tensor.shape, dtype, read, dtype.name, math.prod(tensor.shape) * dtype.itemsize)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's tokenizer, None if nothing tells."""
    from rookery.tokenizers import resolve

    try:
        return resolve(vocab_size=checkpoint.config.vocab_size, path=checkpoint.path, metadata=checkpoint.metadata)
    except (BadTokenizer, MissingDependency, AttributeError):
        return None


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the source says of itself, and our own marks; each writer names the tokenizer that it wrote."""
    told = {
        key: value
        for key, value in checkpoint.metadata.items()
        if isinstance(value, str) and key not in OF_THE_FILE and not key.startswith("tokenizer.")
    }
    return told | {
        "format": "pt",
        "rookery": CONVENTION,
        "family": checkpoint.family.name,
        "config": json.dumps(asdict(checkpoint.config)),
        "fingerprint": checkpoint.fingerprint(),
    }


def _with_tokenizer(job: _Job) -> tuple[dict[str, str], tuple[str, ...]]:
    """Metadata that name the tokenizer, and the file that was written beside for one that we do not ship."""
    from rookery.tokenizers.pairing import NAMES

    if job.tokenizer is None:
        return job.metadata, ()
    if job.tokenizer.name in NAMES:
        return job.metadata | {"tokenizer": job.tokenizer.name}, ()
    file = job.path.with_name(f"{job.path.name}.{_file_of(job.tokenizer)}")
    job.tokenizer.save(file)
    return job.metadata | {"tokenizer": file.name}, (str(file),)


def _file_of(tokenizer: Any) -> str:
    """Name under which a tokenizer is looked for in a folder."""
    from rookery.tokenizers.trie import TrieTokenizer

    if tokenizer.name == "world":
        return "rwkv_vocab_v20230424.txt"  # what llama.cpp's converter looks for
    return "vocab.txt" if isinstance(tokenizer, TrieTokenizer) else "tokenizer.json"


def _with_sidecar(job: _Job, metadata: Mapping[str, str]) -> tuple[str, ...]:
    sidecar = job.path.with_name(job.path.name + ".json")
    metadata = {**metadata, "bytes": str(job.path.stat().st_size)}  # by which another file of that name is told
    with replacing(sidecar) as temporary:
        temporary.write_text(json.dumps(metadata, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return (str(sidecar),)


def _official(job: _Job) -> tuple[str, ...]:
    metadata, beside = _with_tokenizer(job)
    if job.dtype in QUANTISED or job.dtype is None:
        tensors, described = pack.packed_tensors(job.checkpoint, job.tensors, job.dtype)
    else:
        tensors, described = job.typed(), {}
    write_safetensors(job.path, tensors, metadata | described)
    return beside


def _pth(job: _Job) -> tuple[str, ...]:
    from rookery.checkpoints.pth_writer import write_pth

    write_pth(job.path, job.typed())
    metadata, beside = _with_tokenizer(job)
    return (*_with_sidecar(job, metadata), *beside)


def _ggmf(job: _Job) -> tuple[str, ...]:
    from rookery.checkpoints.ggmf import write_ggmf

    config = job.checkpoint.config
    foreign = to_foreign(job.checkpoint.family.layouts["ggmf"], job.tensors)
    tensors = {name: _as_rwkv_cpp(name, tensor, job) for name, tensor in foreign.items()}
    write_ggmf(
        job.path, tensors, vocab_size=config.vocab_size, width=config.hidden_size, layers=config.num_hidden_layers
    )
    metadata, beside = _with_tokenizer(job)
    return (*_with_sidecar(job, metadata), *beside)


def _as_rwkv_cpp(name: str, tensor: Stored, job: _Job) -> Stored:
    """Shape and type that rwkv.cpp expects: float16 for matrices alone, signals of RWKV-4 to 6 without ones."""
    shape = tensor.shape
    part = name.split(".")[-1]
    if part.startswith("time_"):
        shape = tuple(n for n in shape if n != 1) or (1,)
    if part in ("time_decay", "time_first", "time_faaaa") and job.checkpoint.family.name != "rwkv4":
        per_channel = math.prod(shape) == job.checkpoint.config.hidden_size
        shape = (job.checkpoint.config.num_heads, job.checkpoint.config.head_dim if per_channel else 1, 1)
    matrix = len(shape) == 2 and not part.startswith("time_") and part != "r_k"
    half = matrix and (job.dtype == "float16" or (job.dtype is None and tensor.dtype == np.float16))
    typed = _cast(tensor, np.dtype(np.float16 if half else np.float32), name)
    return replace(typed, shape=shape, read=lambda: typed.read().reshape(shape))


def _gguf(job: _Job) -> tuple[str, ...]:
    from rookery.checkpoints.gguf_writer import write_gguf
    from rookery.tokenizers.pairing import NAMES

    family, config = job.checkpoint.family, job.checkpoint.config
    foreign = to_foreign(family.layouts["gguf"], job.tensors)
    if job.dtype == "float16":
        foreign = job.typed(foreign)
    pieces, bpe = _pieces(job.tokenizer), _bpe(job.tokenizer, config.vocab_size)
    carried = pieces is not None or bpe is not None
    metadata, beside = (job.metadata, ()) if carried else _with_tokenizer(job)
    if carried and job.tokenizer.name in NAMES:
        metadata = metadata | {"tokenizer": job.tokenizer.name}
    options = {"family": family.name, "config": config, "dtype": job.dtype, "pieces": pieces, "bpe": bpe}
    write_gguf(job.path, foreign, metadata=metadata, **options)
    return beside


def _pieces(tokenizer: Any) -> dict[int, bytes] | None:
    """The vocabulary by id where llama.cpp's "rwkv" tokenizer can have it: longest match, id 0 ends a text."""
    from rookery.tokenizers.byte_level import ByteTokenizer
    from rookery.tokenizers.trie import TrieTokenizer

    if isinstance(tokenizer, ByteTokenizer):
        return {i: bytes([i]) for i in range(1, 256)}
    return tokenizer.pieces if isinstance(tokenizer, TrieTokenizer) else None


def _bpe(tokenizer: Any, vocab_size: int) -> dict[str, Any] | None:
    """The vocabulary as llama.cpp's "gpt2" tokenizer has it, where it is a byte-level BPE that it knows."""
    if not hasattr(tokenizer, "to_json"):
        return None
    from rookery.tokenizers.gguf_bpe import to_gguf

    return to_gguf(tokenizer, vocab_size)


def _folder(layout: str, job: _Job) -> tuple[str, ...]:
    from rookery.checkpoints.folder_config import config_json

    family, config = job.checkpoint.family, job.checkpoint.config
    tensors = job.typed(to_foreign(family.layouts[layout], job.tensors))
    dtype = job.dtype or job.checkpoint.dtype.name
    with replacing_folder(job.path) as folder:
        inside = replace(job, path=folder / "model.safetensors")
        metadata = dict(job.metadata)
        if job.tokenizer is not None and job.tokenizer.name != "bytes":
            job.tokenizer.save(folder / _file_of(job.tokenizer))
            metadata["tokenizer"] = _file_of(job.tokenizer)
        elif job.tokenizer is not None:
            metadata["tokenizer"] = "bytes"
        write_safetensors(inside.path, tensors, metadata)
        settings = config_json(family.name, layout, config, dtype)
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return ()


WRITERS: dict[str, Callable[[_Job], tuple[str, ...]]] = {
    "official": _official,
    "pth": _pth,
    "ggmf": _ggmf,
    "gguf": _gguf,
    "hf": partial(_folder, "hf"),
    "fla": partial(_folder, "fla"),
}
