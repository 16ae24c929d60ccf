"""What every model of images and texts promises, over the registry, and RWKV-CLIP beyond it: it is true that …"""

import math
import re

import pytest
import torch
from support.files import assert_comes_back, assert_refused_by_name, assert_same_weights, assert_shapes_on_meta, tiny
from support.language import assert_close, randomised

import rookery
from rookery.errors import BadCheckpoint
from rookery.families.clip import FAMILY, config_from_shapes, tensor_shapes
from rookery.models import create_model
from rookery.registry import families, list_models

NAMES = [name for f in families().values() if f.kind == "pair" for name in list_models(f"{f.name}*-test")]
every = pytest.mark.parametrize("name", NAMES)
END = 59


def images(*size, batch=3):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def texts(batch=3, length=7):
    tokens = torch.randint(1, 58, (batch, length), generator=torch.Generator().manual_seed(5))
    tokens[:, 0], tokens[:, -1] = 58, END
    return tokens


# the contract of all models of pairs


@every
def test_every_parameter_gets_a_gradient(name):
    model = randomised(name)
    image, text, scale = model(images(20, 12), texts())
    target = torch.linspace(-1, 1, image.numel()).view_as(image)
    (scale * (image * target).sum() + (text * target).square().sum()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@every
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (5, 31), (40, 12)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_images_of_any_size_and_texts_of_any_length_meet_in_one_space(name, size, length):
    model = create_model(name)
    image, text, scale = model(images(*size).float(), texts(length=length))
    assert image.shape == text.shape == (3, model.config.hidden_size)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    torch.testing.assert_close(torch.stack([image, text]).norm(dim=2), torch.ones(2, 3))


@every
@torch.no_grad()
def test_a_pair_alone_is_the_pair_in_the_batch(name):
    model = randomised(name).eval()
    together = model(images(20, 12), texts())
    alone = model(images(20, 12)[1:2], texts()[1:2])
    for many, one in zip(together[:2], alone[:2]):
        assert_close(one, many[1:2])
    assert model.encode_text(texts()[:0]).shape == (0, 32)


@every
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(name, tmp_path):
    model = tiny(name)
    back = assert_comes_back(model, tmp_path / "m.safetensors")
    for again, first in zip(back(images(8, 8).float(), texts()), model.eval()(images(8, 8).float(), texts())):
        assert torch.equal(again, first)


@every
def test_weights_missing_or_unknown_are_refused_by_name(name, tmp_path):
    weights = tiny(name).state_dict()
    assert_refused_by_name(
        weights, tmp_path, unknown="text_model.extra", missing="image_model.layers.1.ffn.value.weight"
    )


@every
def test_a_model_on_the_meta_device_has_the_shapes_that_its_family_lists(name):
    assert_shapes_on_meta(name)


@every
def test_the_same_seed_gives_the_same_weights_whatever_the_dtype(name):
    first, again, other = create_model(name, seed=3), create_model(name, seed=3), create_model(name, seed=4)
    assert_same_weights(again, first.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    narrow = create_model(name, seed=3, dtype=torch.bfloat16)
    assert narrow.encode_image(images(8, 8).bfloat16()).isfinite().all()
    assert narrow.encode_text(texts()).isfinite().all()


@every
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 10, dtype=torch.int64), "texts must be token ids [batch, 1 to 9], got torch.int64 [2, 10]"),
        (torch.zeros(9, dtype=torch.int64), "texts must be token ids [batch, 1 to 9], got torch.int64 [9]"),
        (torch.zeros(2, 9), "texts must be token ids [batch, 1 to 9], got torch.float32 [2, 9]"),
        (torch.full((2, 9), 60), "token ids must lie in 0 to 59; these lie in 60 to 60"),
    ],
)
def test_what_is_no_batch_of_texts_is_refused(name, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(name).encode_text(wrong)


# sizes and files of RWKV-CLIP


@pytest.mark.parametrize(
    ("size", "image", "total"), [("b32", 84_207_360, 149_561_601), ("b16", 82_826_880, 148_181_121)]
)
def test_published_sizes_are_right_to_the_parameter(size, image, total):
    model = create_model(f"rwkv-clip-{size}", device="meta")
    assert sum(p.numel() for p in model.image_model.parameters()) == image
    assert sum(p.numel() for p in model.text_model.parameters()) == 65_354_240
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("preset", FAMILY.presets)
def test_sizes_are_read_off_the_tensors(preset):
    shapes = tensor_shapes(FAMILY.presets[preset])
    assert tensor_shapes(config_from_shapes(shapes)) == shapes
    assert [f.name for f in families().values() if f.recognise(shapes)] == ["rwkv-clip"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_published_files_load_with_any_prefix_and_read_their_padding(tmp_path, prefix):
    weights = tiny("rwkv-clip-test").state_dict()
    torch.save({prefix + key: weight for key, weight in weights.items()}, tmp_path / "model_31.pt")
    model = rookery.load(tmp_path / "model_31.pt")
    assert_same_weights(model, weights)
    assert (model.config.pad_mode, model.config.context_length) == ("clip77", 77)


def test_files_of_one_tower_and_sizes_that_do_not_fit_are_refused(tmp_path):
    weights = tiny("rwkv-clip-test").state_dict()
    for missing in ("text_model.blocks.0.att.time_faaaa", "image_model.layers.0.att.time_maa_x"):
        torch.save({key: w for key, w in weights.items() if key != missing}, tmp_path / "less.pth")
        with pytest.raises(BadCheckpoint, match="not a whole RWKV-CLIP checkpoint"):
            rookery.load(tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"hidden_size \(96\) must be a multiple of image_head_dim \(80\)"):
        create_model("rwkv-clip", hidden_size=96, image_head_dim=80)
    with pytest.raises(ValueError, match="pad_mode must be"):
        create_model("rwkv-clip", pad_mode="none")
    with pytest.raises(ValueError, match="two tokens at least"):
        create_model("rwkv-clip", context_length=1)


# texts


@torch.no_grad()
def test_what_fills_a_text_up_has_no_effect_where_it_is_masked():
    model = randomised("rwkv-clip-test").eval()
    short = texts(length=5)
    longer = torch.nn.functional.pad(short, (0, 4))
    assert_close(model.encode_text(longer), model.encode_text(short))
    noise = longer.clone()
    noise[:, 5:] = 17
    assert_close(model.encode_text(noise), model.encode_text(short))


@torch.no_grad()
def test_what_fills_a_text_up_is_read_in_the_published_mode():
    model = randomised("rwkv-clip-clip77-test").eval()
    other = randomised("rwkv-clip-clip77-test", context_length=12).eval()
    short = texts(length=5)
    assert_close(model.encode_text(short), model.encode_text(torch.nn.functional.pad(short, (0, 4))))
    assert (model.encode_text(short) - other.encode_text(short)).abs().max() > 1e-3


@every
@torch.no_grad()
def test_a_later_word_changes_an_earlier_token_and_order_matters(name):
    model = randomised(name).eval()
    one = texts()
    other = one.clone()
    other[:, 5] = (one[:, 5] % 50) + 1
    first = [model.text_model.tokens(tokens, None)[:, 0] for tokens in (one, other)]
    assert (first[0] - first[1]).abs().max() > 1e-4
    swapped = one.clone()
    swapped[:, [2, 4]] = one[:, [4, 2]]
    assert (model.encode_text(one) - model.encode_text(swapped)).abs().max() > 1e-3


@torch.no_grad()
def test_the_scale_stays_between_1_and_100():
    model = create_model("rwkv-clip-test")
    for value, scale in ((-3.0, 1.0), (9.0, 100.0), (1.0, math.e)):
        model.logit_scale.fill_(value)
        assert float(model.scale()) == pytest.approx(scale, rel=1e-6)


def test_groups_decay_everything_or_matrices_alone():
    model = create_model("rwkv-clip-test")
    (everything,) = model.parameter_groups(weight_decay=0.2)
    assert len(everything["params"]) == len(list(model.parameters()))
    matrices, rest = model.parameter_groups(weight_decay=0.2, decay_vectors=False)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    assert any(p is model.logit_scale for p in rest["params"])
    with pytest.raises(ValueError, match="leave optim.layer_decay at 1"):
        model.parameter_groups(layer_decay=0.5)


def test_initial_values_are_those_of_the_table():
    model = create_model("rwkv-clip-test")
    block = model.text_model.blocks[1]
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for name in ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight", "att.time_maa_w1"):
        assert not block.get_parameter(name).any()
    key = block.ffn.key.weight
    torch.testing.assert_close(key.T @ key, 0.25 * torch.eye(32))
    assert 0 < model.text_model.emb.weight.abs().max().item() <= 1e-4
    assert torch.equal(block.att.ln_x.weight, torch.ones(32))
    torch.testing.assert_close(model.text_model.blocks[0].att.ln_x.weight, torch.full((32,), 0.5**0.7))
