"""Loss by position: it is true that …"""

import pytest
import torch

from rookery.evaluate.positions import loss_by_position, mean_by_stretch
from rookery.models import create_model


def test_loss_by_position_is_the_loss():
    model = create_model("rwkv7-test", dtype=torch.float64)
    tokens = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
    losses = loss_by_position(model, tokens[:, :-1], tokens[:, 1:], batch=2)
    logits, _ = model(tokens[:, :4])
    wanted = torch.nn.functional.cross_entropy(logits[:, 3].detach(), tokens[:, 4])
    assert losses.shape == (8,)
    assert losses[3] == pytest.approx(float(wanted), abs=1e-6)
    assert mean_by_stretch(losses, 3).tolist() == pytest.approx([losses[:3].mean(), losses[3:6].mean()])
