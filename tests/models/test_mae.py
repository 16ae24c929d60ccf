"""Masked autoencoding: it is true that …"""

import pytest
import torch
from support.language import assert_close, randomise

from rookery.models import create_model
from rookery.models.mae import MaskedAutoencoder, MaskedConfig
from rookery.models.vision import Kept, neighbours
from rookery.nn.grid import q_shift


def autoencoder(name="vision-rwkv-test", dtype=torch.float64, **sizes):
    encoder = create_model(name, num_classes=0, dtype=dtype)
    model = MaskedAutoencoder(encoder, MaskedConfig(decoder_size=24, decoder_layers=2, **sizes)).to(dtype)
    model.init_weights(1)
    return model


def images(*size, batch=3):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["vision-rwkv-test", "vision-rwkv-v6-test"])
def test_every_parameter_gets_a_gradient(name):
    model = randomise(autoencoder(name))
    loss, predicted, hidden = model(images(16, 16), seeded())
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert predicted.shape == (3, 16, 48)
    assert hidden.sum(1).tolist() == [12, 12, 12]


@torch.no_grad()
def test_what_is_hidden_is_not_seen_and_alone_is_judged():
    model = randomise(autoencoder()).eval()
    x = images(16, 16)
    loss, predicted, hidden = model(x, seeded())
    changed = x.clone()
    place = int(hidden[0].nonzero()[0])
    row, column = divmod(place, 4)
    changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += torch.randn(4, 4)
    other_loss, other, _ = model(changed, seeded())
    assert_close(other, predicted)
    assert not torch.isclose(other_loss, loss)
    errors = (predicted - model.targets(x)).square().mean(-1)
    assert_close(loss, errors[hidden].mean())


@torch.no_grad()
def test_with_all_patches_kept_the_encoder_is_the_model():
    model = randomise(autoencoder()).eval()
    x, grid = model.encoder.embed(images(16, 16))
    encoded = model.encode(x, grid, torch.arange(16).expand(3, -1))
    assert_close(encoded, model.encoder.forward_features(images(16, 16)).flatten(2).mT)


def test_neighbours_that_are_hidden_are_zeros():
    config = create_model("vision-rwkv-test", device="meta").config
    x = torch.randn(1, 15, 32)
    places = torch.tensor([[0, 1, 4, 7, 8, 14]])
    kept = x[:, places[0]]
    alone = torch.zeros_like(x)
    alone[:, places[0]] = kept
    want = q_shift(alone, (3, 5), heads=config.num_heads)[:, places[0]]
    assert torch.equal(neighbours(kept, Kept(3, 5, places), config), want)


def test_patches_are_kept_in_the_order_of_the_image_and_at_random():
    model = autoencoder(hidden_share=0.5)
    kept = model.choose(200, 16, seeded())
    assert kept.shape == (200, 8)
    assert (kept.diff(dim=1) > 0).all()
    assert (torch.bincount(kept.flatten(), minlength=16) > 60).all()
    assert autoencoder(hidden_share=0.99).choose(2, 16, None).shape == (2, 1)


def test_targets_are_patches_of_mean_0_and_deviation_1():
    targets = autoencoder().targets(images(16, 16) * 7 + 3)
    assert targets.mean(-1).abs().max() < 1e-9
    torch.testing.assert_close(targets.std(-1), torch.ones(3, 16, dtype=torch.float64))


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(ValueError, match="needs Vision-RWKV v4 or v6"):
        autoencoder("vision-rwkv-v7-test")
    with pytest.raises(ValueError, match="hidden_share must lie between 0 and 1"):
        MaskedConfig(hidden_share=1.0)
    with pytest.raises(ValueError, match=r"images of 16 × 16, got \[3, 3, 12, 16\]"):
        autoencoder()(images(12, 16))


def test_groups_cover_encoder_and_decoder_once():
    model = autoencoder()
    groups = model.parameter_groups(weight_decay=0.1, layer_decay=0.5)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    (matrices,) = [g for g in groups if any(p is model.predict.weight for p in g["params"])]
    assert matrices["weight_decay"] == 0.1
