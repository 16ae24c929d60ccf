"""The optimiser as RWKV's own trainer groups it, its schedule, and float32 master weights under a bfloat16 model."""

import math

import torch
from torch import Tensor, nn

from rookery.train.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The official groups (core.md 1.10): decayed matrices, the decay bias at twice the rate, everything else.

    Weight decay goes to parameters with ".weight" in their name and at least two dimensions longer than 1: projections,
    embedding and head, not the low-rank factors. Frozen parameters are in none.
    """
    groups: dict[str, list[Tensor]] = {"decayed": [], "fast": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "att.w0" in name:
            groups["fast"].append(parameter)
        elif parameter.squeeze().dim() >= 2 and ".weight" in name:
            groups["decayed"].append(parameter)
        else:
            groups["plain"].append(parameter)
    settings = {
        "decayed": {"weight_decay": weight_decay, "lr_scale": 1.0},
        "fast": {"weight_decay": 0.0, "lr_scale": 2.0},
        "plain": {"weight_decay": 0.0, "lr_scale": 1.0},
    }
    return [{"params": params, "name": name, **settings[name]} for name, params in groups.items() if params]


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of `step` (from 1) of `steps`, before a group's `lr_scale`.

    Warm-up multiplies by 0.01 + 0.99 · step / warmup_steps, as the official trainer does.
    """
    warmup = min(1.0, 0.01 + 0.99 * step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_share * steps))
        progress = max(0.0, (step - (steps - decay_steps)) / decay_steps)
        rate = config.lr + (config.final_lr - config.lr) * progress
    else:
        progress = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        rate = config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return rate * warmup


class Optimizer:
    """AdamW over float32 master weights of a model that may compute in bfloat16."""

    def __init__(self, model: nn.Module, config: OptimConfig, dtype: torch.dtype) -> None:
        """`model` holds float32 weights; its parameters become `dtype`, the masters stay behind."""
        self.config = config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().clone().requires_grad_() for p in self.parameters]
        master_of = dict(zip(map(id, self.parameters), self.masters))
        groups = parameter_groups(model, config.weight_decay)
        for group in groups:
            group["params"] = [master_of[id(p)] for p in group["params"]]
        self.adam = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        model.to(dtype)

    def step(self, rate: float) -> float:
        """One update at learning rate `rate` from the gradients, which are then cleared; gives their unclipped norm."""
        for parameter, master in zip(self.parameters, self.masters):
            master.grad = parameter.grad.to(torch.float32)
            parameter.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.config.clip))
        for group in self.adam.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return norm

    def state_dict(self) -> dict:
        return {"masters": [m.detach() for m in self.masters], "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.parameters, self.masters)
        self.adam.load_state_dict(state["adam"])
