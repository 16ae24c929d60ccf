"""Writers of model files for tests: small, and able to lie where a test needs a lie."""

import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from rookery.checkpoints import open_checkpoint
from rookery.errors import BadCheckpoint
from rookery.families.rwkv7 import AT
from rookery.models import create_model, load, save_model
from rookery.registry import families

GGMF_KINDS = {"float32": 0, "float16": 1}


def tiny(name: str = "rwkv7-test", **overrides) -> torch.nn.Module:
    """A model whose every number is its own, so that a swapped or transposed tensor shows."""
    model = create_model(name, **overrides)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def assert_same_weights(model: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    got = model.state_dict()
    assert list(got) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def assert_comes_back(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """What is loaded after `model` was saved at `path`, which has the same config, weights and fingerprint."""
    save_model(model, path)
    back = load(path).eval()
    assert back.config == model.config
    assert_same_weights(back, model.state_dict())
    assert back.fingerprint() == open_checkpoint(path).fingerprint()
    return back


def assert_refused_by_name(weights: Mapping[str, torch.Tensor], folder: Path, *, unknown: str, missing: str) -> None:
    """Files of all `weights` and a tensor `unknown`, and of all but `missing`, are refused with these names."""
    torch.save({**weights, unknown: torch.ones(3)}, folder / "more.pth")
    torch.save({name: weight for name, weight in weights.items() if name != missing}, folder / "less.pth")
    for file, reason in (("more.pth", f"1 unknown: '{unknown}'"), ("less.pth", f"1 missing: '{missing}'")):
        with pytest.raises(BadCheckpoint, match=re.escape(reason)):
            load(folder / file)


def assert_shapes_on_meta(name: str) -> None:
    """A model on the meta device allocates nothing and has the shapes that its family lists."""
    model = create_model(name, device="meta")
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert shapes == families()[model.family].tensor_shapes(model.config)
    assert all(parameter.is_meta for parameter in model.parameters())


def write_ggmf(path: Path, tensors: Mapping[str, np.ndarray | tuple[int, tuple[int, ...], bytes]], version: int = 101):
    """A ggmf file of arrays, or of (type number, shape, bytes)."""
    parts = [struct.pack("<6i", 0x67676D66, version, 0, 0, 0, 0)]
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = GGMF_KINDS[tensor.dtype.name], tensor.shape, tensor.tobytes()
        kind, shape, raw = tensor
        parts.append(struct.pack(f"<3i{len(shape)}i", len(shape), len(name.encode()), kind, *reversed(shape)))
        parts.append(name.encode() + raw)
    path.write_bytes(b"".join(parts))
    return path


def ggmf_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """An RWKV-7 model's weights as rwkv.cpp converts them, written from the format's description."""
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    found: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        layer = name.split(".")[1]
        at = AT.format(layer=layer)
        if name == at + "x_r":
            found[at + "x_rwkvag"] = np.stack([weights[f"{at}x_{part}"].reshape(1, -1) for part in "rwkvag"])
        elif name in {f"{at}{part}{i}" for part in "wavg" for i in "12"}:
            found[name] = np.ascontiguousarray(weight.T)
        elif not name.startswith(at + "x_"):
            found[name] = weight
    return found


def repack(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """Rewrites a zip file with every file's contents changed; None leaves a file out."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)
    return path
