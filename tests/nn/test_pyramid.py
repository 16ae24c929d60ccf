"""Feature maps at several resolutions: it is true that …"""

import pytest
import torch

from rookery.models import create_model
from rookery.nn.pyramid import Pyramid


def test_an_encoder_gives_maps_at_four_resolutions_of_images_of_any_size():
    model = create_model("vision-rwkv-pre-test", num_hidden_layers=4)
    pyramid = Pyramid(32, out=8)
    maps = pyramid(model.forward_intermediates(torch.randn(2, 3, 20, 12), [0, 1, 2, 3]))
    assert [tuple(x.shape) for x in maps] == [(2, 8, 20, 12), (2, 8, 10, 6), (2, 8, 5, 3), (2, 8, 3, 2)]
    sum(x.square().sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_another_number_of_maps_is_refused():
    with pytest.raises(ValueError, match="a pyramid takes 4 maps, there are 2"):
        Pyramid(4)([torch.zeros(1, 4, 2, 2)] * 2)
