"""LoRA, PiSSA, MiSS, BAT and their kin on our models, through Hugging Face peft, and the files that hold them.

LoRA: arXiv 2106.09685. rsLoRA: arXiv 2312.03732. DoRA: arXiv 2402.09353. PiSSA: arXiv 2404.02948. MiSS, mini and BAT:
arXiv 2409.15371. A finished model gets its adapters from outside and keeps its class: `logits, state = model(tokens,
state)` as before, only slower and trainable elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rookery.adapt.config import ADAPTERS, IN_RWKV_PEFT, LOW_RANK, AdaptConfig
from rookery.checkpoints.atomic import replacing
from rookery.checkpoints.pth_writer import write_pth
from rookery.checkpoints.source import in_memory
from rookery.errors import MissingDependency
from rookery.nn.language_model import LanguageModel
from rookery.state import to_numpy

NAME = "default"
"""What peft calls the one adapter in its modules."""
PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules in files."""
INITIAL = "pissa_initial.safetensors"
"""The pair that PiSSA took out of the weights, beside the adapter."""


BLOCK = re.compile(r"((?:.*\.)?(?:blocks|layers))\.\d+\.(.+)")
"""A module of a block: where the blocks are, and its name within one."""
PARTS = {"att": ("att", "self_attn", "mixer"), "ffn": ("ffn", "mlp")}
"""Names of a block's two parts, and what the families call them."""


def target_names(model: LanguageModel, targets: str = "att,ffn") -> list[str]:
    """Full names of the matrices that `targets` means, as "blocks.0.att.key".

    All linear layers of a block's parts: receptance, key, value and output of the time mix (and gate in RWKV-5 and 6),
    key and value of the channel mix (and receptance in RWKV-4, 5 and 6). "att" and "ffn" also mean a transformer's
    `self_attn` and `mlp`, and BASED's `mixer` and `mlp`. ValueError where a target means nothing.
    """
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    # of a model with adapters: each matrix once, and not those that the adapter is made of
    linear = [n.removesuffix(".base_layer") for n in linear if ".lora_" not in n]
    inner = {name: found[2] for name in linear if (found := BLOCK.fullmatch(name))}
    chosen: set[str] = set()
    for target in filter(None, (part.strip() for part in targets.split(","))):
        wanted = PARTS.get(target, (target,))
        found = {name for name, path in inner.items() if any(f".{part}." in f".{path}." for part in wanted)}
        if not found:
            known = ", ".join(sorted(set(inner.values()))) or "none that can be adapted"
            raise ValueError(f"{model.family} has no matrices {target!r}; its blocks have {known}")
        chosen |= found
    if not chosen:
        raise ValueError("adapt.targets names nothing to adapt; give for example att,ffn")
    return [name for name in linear if name in chosen]


def attach(model: LanguageModel, config: AdaptConfig, seed: int = 0) -> dict[str, Tensor]:
    """Freezes the model and gives it adapters as `config` says, in place; the same for the same seed.

    What it returns is PiSSA's initial pair by name (empty for other methods): it has been taken out of the weights, and
    without it the adapter cannot be merged into the original model.
    """
    if config.method not in ADAPTERS:
        raise ValueError(f"{config.method!r} adds no adapter; methods that do: {', '.join(ADAPTERS)}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(_peft_config(model, config), model, adapter_name=NAME)
    if config.method != "pissa":
        return {}
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}


def restart_pissa(model: LanguageModel, config: AdaptConfig, initial: Mapping[str, Tensor]) -> None:
    """As `attach`, with the pair that an earlier `attach` returned: the decomposition is random, a resumed run must not
    draw another."""
    attach(model, AdaptConfig(method="lora", rank=config.rank, dropout=config.dropout, targets=config.targets))
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            a, b = (initial[f"{name}.lora_{part}.weight"] for part in "AB")
            layer.lora_A[NAME].weight.copy_(a)
            layer.lora_B[NAME].weight.copy_(b)
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() - b.float() @ a.float())


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters under peft's names, without its prefix: "blocks.0.att.key.lora_A.weight"."""
    return {
        f"{name}.{_told(inner)}": parameter
        for name, layer in adapted_layers(model).items()
        for inner, parameter in layer.named_parameters()
        if not inner.startswith("base_layer.")
    }


def _told(name: str) -> str:
    """A parameter's name in peft's files: DoRA's lengths are a module in memory and a tensor there."""
    name = name.replace(f".{NAME}", "")
    return name.removesuffix(".weight") if name.startswith("lora_magnitude_vector") else name


def fingerprint_of(model: LanguageModel) -> str:
    """Names the model with its adapter in state files: its states are not those of the model without."""
    digest = hashlib.sha256(model.fingerprint().encode())
    for name, tensor in sorted(adapter_tensors(model).items()):
        digest.update(name.encode() + to_numpy(tensor).tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def merge(model: LanguageModel) -> None:
    """Puts the adapter into the weights, in place: the model is as if it never had one, and computes the same.

    Sums are made in float32 and rounded once.
    """
    for name, layer in adapted_layers(model).items():
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        layer.merge()
        base.to(dtype).requires_grad_(True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def save_adapter(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    config: AdaptConfig,
    *,
    base: str = "",
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a folder that peft reads: adapter_config.json and adapter_model.safetensors.

    `base` names the model that the adapter belongs to. A PiSSA adapter is written as the LoRA of twice the rank that
    does the same to the original weights, B·A − B₀·A₀, with the `initial` pair that `attach` returned.
    """
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}
    settings = _peft_config(model, config)
    if config.method == "pissa":
        tensors = _difference(tensors, _given(initial))
        settings = _peft_config(model, AdaptConfig(method="lora", rank=2 * config.rank, targets=config.targets))
    settings.base_model_name_or_path, settings.inference_mode = base, True
    with replacing(path / "adapter_model.safetensors") as temporary:
        save_file({PREFIX + n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata={"format": "pt"})
    with replacing(path / "adapter_config.json") as temporary:
        plain = {key: _plain(value) for key, value in settings.to_dict().items()}
        Path(temporary).write_text(json.dumps(plain, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Attaches the adapter in a folder that `save_adapter` or peft wrote; ValueError where it does not fit."""
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        raise ValueError(f"{str(path)!r} holds no adapter: adapter_config.json is missing")
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(path))
    if getattr(settings, "init_lora_weights", True) not in (True, False):
        settings.init_lora_weights = True  # the values come from the file, nothing may be taken out of the weights
    model.requires_grad_(False)
    peft.inject_adapter_in_model(settings, model, adapter_name=NAME)
    begin_from(model, path)


def begin_from(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Gives the adapter that the model has the values of the one in a folder; ValueError where it does not fit."""
    from safetensors.torch import load_file

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{os.fspath(folder)!r} holds no adapter: {path.name} is missing")
    saved = {n.removeprefix(PREFIX): t for n, t in load_file(path).items()}
    ours = adapter_tensors(model)
    wrong = sorted(saved.keys() ^ ours.keys()) or [n for n in ours if ours[n].shape != saved[n].shape]
    if wrong:
        raise ValueError(f"the adapter {str(path.parent)!r} does not fit this {model.family} model: see {wrong[0]}")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(saved[name])


def save_rwkv_peft(
    model: LanguageModel,
    path: str | os.PathLike[str],
    config: AdaptConfig,
    *,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter as a `.pth` with RWKV-PEFT's names: `blocks.0.att.key.lora_A`, `.disha`.

    PiSSA's initial pair goes to "init_pissa.pth" beside it, as that program has it. LoRA
    files do not say alpha: its merge tool asks for it. BAT is refused: RWKV-PEFT shares its blocks along the other axis
    (adaptation.md C.2.4).
    """
    if config.method not in IN_RWKV_PEFT:
        kind = config.method.upper() if config.method == "bat" else config.method
        raise ValueError(f"RWKV-PEFT's files cannot hold this {kind} adapter: merge it, or keep the peft folder")
    target = Path(path)
    write_pth(target, {_rwkv_peft_name(n): _stored(t) for n, t in adapter_tensors(model).items()})
    if config.method == "pissa":
        pair = {_rwkv_peft_name(n).replace(".lora_", ".init_lora_"): _stored(t) for n, t in _given(initial).items()}
        write_pth(target.with_name("init_pissa.pth"), pair)


def _rwkv_peft_name(name: str) -> str:
    return name.removesuffix(".weight").replace(".miss_block", ".disha")


def _stored(tensor: Tensor) -> Any:
    return in_memory(to_numpy(tensor))


def _difference(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B·A − B₀·A₀ as one pair of twice the rank."""
    joined = {}
    for name, tensor in tensors.items():
        first = initial[name].to(tensor)
        is_a = name.endswith("lora_A.weight")
        joined[name] = torch.cat([tensor, first]) if is_a else torch.cat([tensor, -first], dim=1)
    return joined


def _given(initial: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if not initial:
        raise ValueError("a PiSSA adapter means nothing without the initial pair that `attach` returned: give it")
    return initial


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The modules that peft put in the place of linear layers, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not found:
        raise ValueError("the model has no adapter")
    return found


def _peft_config(model: LanguageModel, config: AdaptConfig) -> Any:
    peft = _peft()
    names = sorted(target_names(model, config.targets))
    if config.method not in LOW_RANK:
        kind = True if config.method == "miss" else config.method
        own = {"mini_r": config.mini_r or config.rank} if config.method == "mini" else {}
        return peft.MissConfig(
            r=config.rank, init_weights=kind, miss_dropout=config.dropout, target_modules=_pattern(names), **own
        )
    start = "pissa_niter_4" if config.method == "pissa" else True
    alpha = config.rank if config.method == "pissa" or not config.alpha else config.alpha
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        init_lora_weights=start,
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
        target_modules=_pattern(names),
    )


def _pattern(names: list[str]) -> str:
    """A regular expression for exactly these names of one model; short, for it stands in the adapter's file."""
    found = [BLOCK.fullmatch(name) for name in names]
    where = re.escape(found[0][1])
    return rf"{where}\.\d+\.(" + "|".join(sorted({re.escape(match[2]) for match in found})) + ")"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", value)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingDependency('adapters need peft: pip install "rookery[train]"') from None
    return peft
