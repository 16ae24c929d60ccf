"""Tuned states: the state that a model starts from instead of zeros, trained while the weights stay as they are.

Files hold `blocks.<i>.att.time_state`, one matrix [value, key] per head: `.pth` and safetensors of RWKV-PEFT and
RWKV-LM, or a model's file that carries them along (core.md 1.4, 2.1). web-rwkv's `.st` files hold [key, value]. Newer
trainers add `ts_state`, the vectors that stand for the token before the first. RWKV-4 has the sums `aa` and `bb`
([2, width], their exponent 0, or [3, width]).

Our own safetensors may also hold a kernel-upscaled state (`kstate` [head, value, feature], `kstate_support`
[head, feature, key], `kstate_rule` [head, 4]; see rookery.models.kernel_state), or, to be smaller, matrices as
products of two (`time_state_left` [head, value, rank], `time_state_right` [head, rank, key]).
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rookery.checkpoints import hub
from rookery.checkpoints.detect import read_file
from rookery.checkpoints.source import Stored, in_memory, short
from rookery.checkpoints.state_file import FORMAT as SESSION_FORMAT
from rookery.checkpoints.state_file import read_state, sizes
from rookery.errors import BadCheckpoint, BadState
from rookery.registry import families

FORMAT = "rookery-tuned-state-1"
"""Marks our own files; anybody else's have no metadata."""
KINDS = "(?:time_state|kstate)(?:_left|_right)?|ts_state|kstate_support|kstate_rule"
NAME = re.compile(rf"(?:.*\.)?blocks\.([0-9]{{1,4}})\.(?:att\.|ffn\.)?({KINDS})")
Order = Literal["value_key", "key_value"]
"""Which axis of a stored matrix comes first."""


@dataclass(frozen=True)
class TunedState:
    """A start state as it lies in a file."""

    path: str
    tensors: Mapping[str, np.ndarray]
    """Names of state files ("layers.0.wkv" [head, value, key], "layers.0.att_shift" [width]) -> float32 values."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the file says of the model; empty for files of other programs."""

    def onto(self, fresh: Mapping[str, np.ndarray], *, family: str, config: Any, model: str) -> dict[str, np.ndarray]:
        """The arrays of a fresh state [1, …] with these values in their place; BadState for another model's.

        `model` is the fingerprint of the model that is to start here. A kernel-upscaled state brings arrays along that
        a fresh state does not have.
        """
        self._check(family, config, model)
        arrays = dict(fresh)
        wanted = [name for name in fresh if name.endswith(".wkv")]
        upscaled = [f"{name[:-4]}.{part}" for name in wanted for part in UPSCALED] if self.is_upscaled else []
        missing = [name for name in upscaled or wanted if name not in self.tensors]
        unknown = [name for name in self.tensors if name not in fresh and name not in upscaled]
        if missing or unknown:
            layers = sum(name.endswith(".wkv") for name in self.tensors)
            raise self._other(f"it has {layers} layers, this model's state has {len(wanted)}")
        shapes = {name: array.shape[1:] for name, array in fresh.items()}
        if upscaled:
            shapes |= self._upscaled_shapes(config)
        for name, values in self.tensors.items():
            values = _completed(values, shapes[name])
            if values.shape != shapes[name]:
                have, want = (" × ".join(map(str, shape)) for shape in (values.shape, shapes[name]))
                raise self._other(f"its {name} is {have}, this model's is {want}")
            arrays[name] = values[None].astype(fresh[name].dtype if name in fresh else np.float32)
        return arrays

    @property
    def is_upscaled(self) -> bool:
        """True if it has a kernel-upscaled state, which the torch runner alone hosts."""
        return any(name.endswith(".kstate") for name in self.tensors)

    def _upscaled_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        heads, value, key = config.wkv_shape
        features = next(values.shape[-1] for name, values in self.tensors.items() if name.endswith(".kstate"))
        one = {"kstate": (heads, value, features), "support": (heads, features, key), "rule": (heads, 4)}
        return {f"layers.{i}.{part}": one[part] for i in range(config.num_hidden_layers) for part in one}

    def _check(self, family: str, config: Any, model: str) -> None:
        told = self.metadata
        if told.get("family", family) != family:
            raise self._other(f"it starts a model of family {told['family']}, this one is {family}")
        theirs, ours = json.loads(told.get("config", "{}")), sizes(config)
        apart = [f"{key} {theirs[key]} against {ours.get(key)}" for key in theirs if theirs[key] != ours.get(key)]
        if apart:
            raise self._other(", ".join(apart))
        if told.get("model", model) != model:
            raise self._other(f"it was trained for the weights {told['model']}, these are {model}")

    def _other(self, why: str) -> BadState:
        return BadState(f"{self.path!r} is the tuned state of another model: {why}; use the model it was trained with")


def read_tuned_state(path: str | os.PathLike[str], *, order: Order | None = None) -> TunedState:
    """The tuned state in a file of any format above; BadState where there is none.

    `order` says which axis of the matrices comes first; left out, `.st` files are [key, value], all others
    [value, key], as they are published.
    """
    found = find_tuned_state(path, order=order)
    if found is None:
        raise BadState(f"{os.fspath(path)!r} holds no tuned state: tensors named 'blocks.0.att.time_state' are missing")
    return found


def find_tuned_state(path: str | os.PathLike[str], *, order: Order | None = None) -> TunedState | None:
    """As `read_tuned_state`, but None where the file is of another kind or holds no such tensors."""
    where = os.fspath(path)
    try:
        source = read_file(path)
    except BadCheckpoint:
        return None
    if source.metadata.get("format") == SESSION_FORMAT:
        return None
    tensors = states_among(source.tensors)
    if not tensors:
        return None
    turned = (order or ("key_value" if where.endswith(".st") else "value_key")) == "key_value"
    return TunedState(where, _named(tensors, turned, where), _told(source.metadata, where))


def start_arrays(
    path: str | os.PathLike[str], fresh: Callable[[], Mapping[str, np.ndarray]], *, family: str, config: Any, model: str
) -> dict[str, np.ndarray]:
    """The arrays of the state in a file, be it tuned or one that a session or a `State` wrote.

    `fresh` gives the arrays of the state before the first token; `family`, `config` and `model` (its fingerprint) say
    which model asks. BadState for another model's.
    """
    path = hub.local(path)
    ours = Path(path).suffix not in (".pth", ".pt", ".st")  # endings of other programs: say what these lack
    tuned = find_tuned_state(path) if ours or not os.path.exists(path) else read_tuned_state(path)
    if tuned is None:
        return read_state(path, model=model)
    return tuned.onto(fresh(), family=family, config=config, model=model)


def tuned_state_of(checkpoint: Any) -> TunedState | None:
    """The start state that a model's file carries along, if it does."""
    tensors = states_among(checkpoint.kept)
    return TunedState(checkpoint.path, _named(tensors, False, checkpoint.path)) if tensors else None


def states_among(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors that belong to a start state, without any prefix of a wrapper."""
    found = {name: NAME.fullmatch(name) for name in tensors}
    states = {name[match.string.index("blocks.") :]: tensors[name] for name, match in found.items() if match}
    return states if any("ts_state" not in name for name in states) else {}


def save_tuned_state(
    path: str | os.PathLike[str],
    state: Any,
    config: Any,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a start state as a small file that every way to load a state takes; the file is whole or absent.

    `state` is a `State` of one row, or a mapping of its arrays: "layers.<i>.wkv" ([1, …] or without the row) or
    "blocks.<i>.att.time_state", as numpy arrays or torch tensors. Shift vectors that are zero and token counts are
    left out. `config` is the model's; `model` its fingerprint, where the state should fit these weights alone. The
    ending of `path` names the format: `.pth` for other programs, `.st` for web-rwkv (float16), else safetensors with
    the model's sizes in the metadata. Raises BadState where the state is not one of this config.
    """
    family = next(family for family in families().values() if family.config is type(config))
    if not hasattr(config, "wkv_shape"):
        raise BadState(f"{family.name} has no recurrent state that could be tuned")
    arrays = _checked(_arrays(state, len(config.wkv_shape)), config, family.name)
    where = Path(path)
    if where.suffix in (".pth", ".pt", ".st") and (own := next((n for n in arrays if "kstate" in n), None)):
        raise BadState(f"{where.suffix} files have no place for {own}; name the file .safetensors")
    if where.suffix in (".pth", ".pt"):
        from rookery.checkpoints.pth_writer import write_pth

        return write_pth(path, {name: in_memory(array) for name, array in arrays.items()})
    from rookery.checkpoints.safetensors import write_safetensors

    if where.suffix == ".st":
        turned = {
            name: (array.swapaxes(-1, -2) if name.endswith("time_state") else array).astype(np.float16)
            for name, array in arrays.items()
        }
        return write_safetensors(path, turned, {})
    ours = {"format": FORMAT, "family": family.name, "config": json.dumps(sizes(config))}
    return write_safetensors(path, arrays, {**(metadata or {}), **ours, **({"model": model} if model else {})})


UPSCALED = ("kstate", "support", "rule")
"""Fields of a layer's state that a kernel-upscaled state brings along."""
FIELDS = {
    "wkv": "att.time_state",
    "att_shift": "att.ts_state",
    "ffn_shift": "ffn.ts_state",
    "kstate": "att.kstate",
    "support": "att.kstate_support",
    "rule": "att.kstate_rule",
}
"""Field of a layer's state -> its name in files."""


def _arrays(state: Any, rank: int) -> dict[str, np.ndarray]:
    """Names of files -> float32 arrays; `rank` is the number of axes of one recurrent state."""
    found: dict[str, np.ndarray] = {}
    for name, values in (state.arrays() if hasattr(state, "arrays") else state).items():
        values = np.asarray(values.detach().cpu().float() if hasattr(values, "detach") else values)
        layer, _, part = name.removeprefix("layers.").partition(".")
        if name.startswith("layers.") and part in FIELDS:
            if values.ndim > {"wkv": rank, "kstate": 3, "support": 3, "rule": 2}.get(part, 1):
                if len(values) != 1:
                    raise BadState(f"a tuned state has one row, {name} has {len(values)}; select one")
                values = values[0]
            if part.endswith("_shift") and not values.any():
                continue
            name = f"blocks.{layer}.{FIELDS[part]}"
        elif name == "tokens_seen":
            continue
        found[name] = np.ascontiguousarray(values, np.float32)
    return found


def _checked(arrays: dict[str, np.ndarray], config: Any, family: str) -> dict[str, np.ndarray]:
    states = {name for name in arrays if name.endswith(".time_state")}
    upscaled = {name for name in arrays if ".kstate" in name}
    parts = [FIELDS[part] for part in UPSCALED] if upscaled else ["att.time_state"]
    wanted = {f"blocks.{i}.{part}" for i in range(config.num_hidden_layers) for part in parts}
    others = sorted(name for name in arrays if not NAME.fullmatch(name)) + sorted((upscaled or states) ^ wanted)
    if others:
        raise BadState(f"no tuned state of {family} with {config.num_hidden_layers} layers: see {short(others[0])}")
    for name in sorted(states):
        if arrays[name].shape != tuple(config.wkv_shape):
            have, want = list(arrays[name].shape), list(config.wkv_shape)
            raise BadState(f"{name} has shape {have}, this model's recurrent state has {want}")
    return arrays


def _named(tensors: Mapping[str, Stored], turned: bool, where: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        layer, kind = NAME.fullmatch(name).groups()
        if tensor.dtype.kind in "biu":
            raise BadState(f"{where!r}: {short(name)} holds {tensor.dtype} numbers; a state holds floats")
        values = tensor.read().astype(np.float32)
        if kind.endswith("_right"):
            continue
        if kind.endswith("_left"):
            right = tensors.get(f"{name.removesuffix('left')}right")
            if right is None or right.shape[:-1] != (*values.shape[:-2], values.shape[-1]):
                raise BadState(f"{where!r}: {short(name)} has no second factor that fits it")
            part = "kstate" if kind.startswith("kstate") else "wkv"
            found[f"layers.{layer}.{part}"] = values @ right.read().astype(np.float32)
        elif kind.startswith("kstate"):
            found[f"layers.{layer}.{kind.removeprefix('kstate_')}"] = values
        elif kind == "time_state":
            found[f"layers.{layer}.wkv"] = values.swapaxes(-1, -2) if turned and values.ndim == 3 else values
        elif ".ffn." in name:
            found[f"layers.{layer}.ffn_shift"] = values.reshape(-1)
        else:  # one vector is the time mix's; a second one the channel mix's
            rows = values.reshape(-1, values.shape[-1])
            found |= {f"layers.{layer}.{part}_shift": row for part, row in zip(("att", "ffn"), rows)}
    return found


def _told(metadata: Mapping[str, str], where: str) -> dict[str, str]:
    if metadata.get("format") != FORMAT:
        return {}
    try:
        if not isinstance(json.loads(metadata.get("config", "{}")), dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise BadState(f"{where!r} is damaged: the sizes in its metadata cannot be read") from None
    return dict(metadata)


def _completed(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """RWKV-4's two sums with their exponent, 0; everything else as it is."""
    if len(shape) == 2 and shape[0] == 3 and values.shape == (2, shape[1]):
        return np.concatenate([values[:1], values[1:].clip(min=0), np.zeros((1, shape[1]), np.float32)])
    return values
