"""The optimiser as RWKV's own trainer groups it, its schedule, and float32 master weights under a bfloat16 model."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rookery.errors import MissingDependency
from rookery.train.config import OptimConfig

OUTSIDE = ("emb", "head", "embed_tokens", "lm_head", "word_embeddings")
"""Modules whose matrices are tables or read-outs, which Muon is not for (https://kellerjordan.github.io/posts/muon)."""


def parameter_groups(model: nn.Module, weight_decay: float, layerwise: bool = False) -> list[dict]:
    """The official groups (core.md 1.10): decayed matrices, the decay bias at twice the rate, everything else.

    `layerwise` is what RWKV-LM calls layerwise_lr, of RWKV-4 to 6: their decays at twice the rate, too, and RWKV-4's
    bonus of the first token (`time_first`) at three times.
    Weight decay goes to parameters with ".weight" in their name and at least two dimensions longer than 1: projections,
    embedding and head, not the low-rank factors. Frozen parameters are in none.
    """
    groups: dict[str, list[Tensor]] = {"decayed": [], "fast": [], "first": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        by_rate = layerwise and not name.endswith(("_w1", "_w2"))
        if "att.w0" in name or (by_rate and "time_decay" in name):
            groups["fast"].append(parameter)
        elif by_rate and "time_first" in name:
            groups["first"].append(parameter)
        elif sum(length > 1 for length in parameter.shape) >= 2 and ".weight" in name and "convert3" not in name:
            groups["decayed"].append(parameter)
        else:
            groups["plain"].append(parameter)
    settings = {
        "decayed": {"weight_decay": weight_decay, "lr_scale": 1.0},
        "fast": {"weight_decay": 0.0, "lr_scale": 2.0},
        "first": {"weight_decay": 0.0, "lr_scale": 3.0},
        "plain": {"weight_decay": 0.0, "lr_scale": 1.0},
    }
    return [{"params": params, "name": name, **settings[name]} for name, params in groups.items() if params]


def groups_of(model: nn.Module, config: OptimConfig) -> list[dict]:
    """The model's own groups where it has some, as models of images do, else the official ones."""
    if not hasattr(model, "parameter_groups"):
        groups = parameter_groups(model, config.weight_decay, config.layerwise)
        return _mixers_apart(model, groups) if config.mixer_lr else groups
    chosen = {name: getattr(config, name) for name in ("layer_decay", "decay_vectors") if hasattr(config, name)}
    return model.parameter_groups(weight_decay=config.weight_decay, **chosen)


def _mixers_apart(model: nn.Module, groups: list[dict]) -> list[dict]:
    """Groups in two: the mixers', which have a rate of their own, and the rest; ValueError where there are none."""
    mixers = {id(p) for name, p in model.named_parameters() if ".self_attn." in name}
    if not mixers:
        raise ValueError("optim.mixer_lr is for converted transformers: no weight here has .self_attn. in its name")
    apart = []
    for group in groups:
        for mine in (False, True):
            params = [p for p in group["params"] if (id(p) in mixers) == mine]
            apart += [{**group, "params": params, "is_mixer": mine}] if params else []
    return apart


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the matrices inside the blocks, which Muon moves: decayed ones that are neither table nor read-out."""
    return {
        id(p)
        for name, p in model.named_parameters()
        if p.requires_grad and p.dim() == 2 and ".weight" in name and not set(OUTSIDE) & set(name.split("."))
    }


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of `step` (from 1) of `steps`, before a group's `lr_scale`.

    Warm-up multiplies by 0.01 + 0.99 · step / warmup_steps, as the official trainer does. "schedule-free" knows no
    other schedule than the warm-up.
    """
    warmup = _warmup(config, step)
    if config.name == "schedule-free":
        return config.lr * warmup
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_share * steps))
        progress = max(0.0, (step - (steps - decay_steps)) / decay_steps)
        return (config.lr + (config.final_lr - config.lr) * progress) * warmup
    progress = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        rate = config.lr + (config.final_lr - config.lr) * progress
    elif config.schedule == "exponential":
        rate = config.lr * (config.final_lr / config.lr) ** progress
    elif config.schedule == "quarter-cosine":
        rate = config.final_lr + (config.lr - config.final_lr) * math.cos(math.pi * progress / 2)
    else:
        rate = config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return rate * warmup


def mixer_rate(config: OptimConfig, step: int, steps: int) -> float:
    """That of the mixers where they have one of their own (adaptation.md B.2.4, step 2a)."""
    progress = (step / steps - config.mixer_hold) / (config.mixer_end - config.mixer_hold)
    fall = math.cos(math.pi * min(1.0, max(0.0, progress)) / 2)
    return (config.mixer_final_lr + (config.mixer_lr - config.mixer_final_lr) * fall) * _warmup(config, step)


def _warmup(config: OptimConfig, step: int) -> float:
    return min(1.0, 0.01 + 0.99 * step / config.warmup_steps) if config.warmup_steps else 1.0


class Optimizer:
    """Moves float32 master weights of a model that may compute in bfloat16."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        dtype: torch.dtype,
        add_up: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        """`model` holds float32 weights; its parameters become `dtype`, the masters stay behind.

        `add_up` sums gradients, in place, over processes that have copies of the model.
        """
        self.config, self._add_up = config, add_up
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # where the model computes in float32 its parameters are the masters
        self.apart = dtype != torch.float32 or any(p.dtype != torch.float32 for p in self.parameters)
        self.masters = self.parameters
        if self.apart:
            self.masters = [p.detach().clone().requires_grad_() for p in self.parameters]
        master_of = dict(zip(map(id, self.parameters), self.masters))
        matrices = hidden_matrices(model) if config.name == "muon" else set()
        groups, hidden = [], []
        for group in groups_of(model, config):
            hidden += [master_of[id(p)] for p in group["params"] if id(p) in matrices]
            rest = [master_of[id(p)] for p in group["params"] if id(p) not in matrices]
            groups += [{**group, "params": rest}] if rest else []
        self.inner = [_adam(config, groups)] if groups else []
        if hidden:
            self.inner.append(_muon(config, hidden))
        self.average = [m.detach().clone() for m in self.masters] if config.ema else []
        self.taken = torch.zeros(())
        model.to(dtype)

    def step(self, rate: float) -> float:
        """One update at learning rate `rate` from the gradients, which are then cleared; gives their unclipped norm.

        Where the norm is not finite nothing is moved.
        """
        norm = float(self.clip())
        if math.isfinite(norm):
            self.take(rate)
        self.clear()
        return norm

    def clip(self) -> Tensor:
        """Makes the gradients ready for `take`; gives their norm before clipping, on their device, unseen."""
        if self.apart:
            for parameter, master in zip(self.parameters, self.masters):
                master.grad = None if parameter.grad is None else parameter.grad.to(torch.float32)
                parameter.grad = None
        if self._add_up:
            self._add_up([master.grad for master in self.masters if master.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.masters, self.config.clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def take(self, rate: float, mixer_rate: float = 0.0) -> None:
        """Moves the weights by the gradients that `clip` has left, which are then cleared.

        `mixer_rate` is for the mixers where the config gives them a rate of their own.
        """
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                _set_rate(group, (mixer_rate if group.get("is_mixer") else rate) * group["lr_scale"])
            optimizer.step()
        self._publish()
        self._follow()
        self.clear()

    def clear(self) -> None:
        """Forgets the gradients."""
        for weight in (*self.parameters, *self.masters):
            weight.grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the weights to be judged and kept: averages with `ema` and schedule-free, else its own."""
        if self.average:
            own = [m.detach().clone() for m in self.masters]
            self._become(self.average)
            try:
                yield
            finally:
                self._become(own)
            return
        if self.config.name != "schedule-free" or not self.inner[0].state:
            yield
            return
        self.inner[0].eval()
        self._publish()
        try:
            yield
        finally:
            self.inner[0].train()
            self._publish()

    def fill(self) -> None:
        """Gives every weight its moments, as a first step does, so that a checkpoint's can be read into them."""
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                _set_rate(group, 0.0)
            optimizer.step()
        self.clear()

    def state_dict(self) -> dict[str, Any]:
        state = {"masters": [m.detach() for m in self.masters], "inner": [o.state_dict() for o in self.inner]}
        return state | ({"average": self.average, "taken": self.taken} if self.average else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for master, stored in zip(self.masters, state["masters"], strict=True):
            master.detach().copy_(stored)
        self._publish()
        for optimizer, inner in zip(self.inner, state["inner"], strict=True):
            optimizer.load_state_dict(inner)
        for average, stored in zip(self.average, state.get("average", [])):
            average.copy_(stored)
        self.taken.copy_(state.get("taken", self.taken))

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the averages towards the weights: less and less, so that the first steps are soon forgotten."""
        if self.average:
            self.taken += 1
            steps = float(self.taken)
            decay = min(self.config.ema, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(_here(self.average), _here(self.masters), 1 - decay)

    @torch.no_grad()
    def _become(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_(_here(self.masters), _here(weights))
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        if self.apart:
            torch._foreach_copy_(self.parameters, self.masters)


def _here(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or this process's pieces of them, without gradients; they share memory."""
    return [t.detach().to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's compiled step reads it from memory
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _adam(config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer:
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw-8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise MissingDependency('optim.name="adamw-8bit" needs torchao: pip install "rookery[train]"') from None
        return AdamW8bit(groups, **settings)
    if config.name == "schedule-free":
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError:
            message = 'optim.name="schedule-free" needs schedulefree: pip install "rookery[train]"'
            raise MissingDependency(message) from None
        optimizer = AdamWScheduleFree(groups, **settings)
        optimizer.train()
        return optimizer
    return torch.optim.AdamW(groups, fused=True, **settings)


def _muon(config: OptimConfig, matrices: list[Tensor]) -> torch.optim.Optimizer:
    # its updates are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both
    group = {"params": matrices, "name": "matrices", "lr_scale": 1.0, "weight_decay": config.weight_decay}
    return torch.optim.Muon([group], lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
