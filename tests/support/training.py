"""What tests of training share: a run that is interrupted and goes on."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

from rookery.models import load
from rookery.train.config import TrainConfig
from rookery.train.loop import train


def assert_resumes_exactly(whole: TrainConfig, half: TrainConfig, task: type, *, step: int) -> None:
    """`half`, interrupted after `step` by its task and started again, ends with the weights that `whole` has."""
    after: Callable[..., None] = task.after_step

    def interrupted(self: object) -> None:
        after(self)
        if self.step == step:
            raise KeyboardInterrupt

    with patch.object(task, "after_step", interrupted), pytest.raises(KeyboardInterrupt):
        train(half)
    train(half)
    weights, resumed = (load(f"{config.out}/model.safetensors").state_dict() for config in (whole, half))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
