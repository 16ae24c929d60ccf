"""What every model of images promises, over the registry, and Vision-RWKV beyond it: it is true that …"""

import copy
import re

import pytest
import torch
from support.files import assert_comes_back, assert_refused_by_name, assert_same_weights, assert_shapes_on_meta, tiny
from support.language import assert_close, randomised

import rookery
from rookery.checkpoints import open_checkpoint
from rookery.errors import BadCheckpoint
from rookery.families.vision_rwkv import FAMILY, config_from_shapes, tensor_shapes
from rookery.models import create_model, save_model
from rookery.models.vision import SpatialMix4
from rookery.registry import families, list_models

NAMES = [name for f in families().values() if f.kind == "image" for name in list_models(f"{f.name}*-test")]
every = pytest.mark.parametrize("name", NAMES)
SIZES = [(16, 16), (1, 1), (5, 31), (40, 12)]


def images(*size, batch=2, channels=3):
    drawn = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return drawn


# the contract of all models of images


@every
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_size_are_classified(name, size):
    model = create_model(name)
    logits = model(images(*size).float())
    assert logits.shape == (2, model.config.num_classes)
    assert logits.isfinite().all()


@every
def test_every_parameter_gets_a_gradient(name):
    model = randomised(name)
    model(images(20, 12)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@every
@torch.no_grad()
def test_an_image_alone_is_the_image_in_the_batch(name):
    model = randomised(name).eval()
    batch = images(20, 12, batch=3)
    assert_close(model(batch[1:2]), model(batch)[1:2])
    assert model(batch[:0]).shape == (0, model.config.num_classes)


@every
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(name, tmp_path):
    model = tiny(name)
    back = assert_comes_back(model, tmp_path / "m.safetensors")
    assert torch.equal(back(images(8, 8).float()), model.eval()(images(8, 8).float()))


@every
def test_weights_missing_or_unknown_are_refused_by_name(name, tmp_path):
    weights = tiny(name).state_dict()
    assert_refused_by_name(weights, tmp_path, unknown="layers.0.att.extra", missing="layers.1.ffn.value.weight")


@every
def test_a_model_on_the_meta_device_has_the_shapes_that_its_family_lists(name):
    assert_shapes_on_meta(name)


@every
def test_the_same_seed_gives_the_same_weights_whatever_the_dtype(name):
    first, again, other = create_model(name, seed=3), create_model(name, seed=3), create_model(name, seed=4)
    assert_same_weights(again, first.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    narrow = create_model(name, seed=3, dtype=torch.bfloat16)
    assert_same_weights(narrow, {key: weight.bfloat16() for key, weight in first.state_dict().items()})
    assert narrow(images(8, 8).bfloat16()).dtype == torch.bfloat16


@every
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "images must be [batch, 3, height, width] of at least one pixel, got [2, 1, 8, 8]"),
        (torch.zeros(3, 8, 8), "images must be [batch, 3, height, width] of at least one pixel, got [3, 8, 8]"),
        (torch.zeros(1, 3, 0, 8), "images must be [batch, 3, height, width] of at least one pixel, got [1, 3, 0, 8]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "images must be normalised floats, got torch.uint8; divide bytes"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(name, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(name)(wrong)


# sizes and files of Vision-RWKV

PUBLISHED = {
    "tiny": 6_155_176,
    "small": 23_820_136,
    "base": 93_645_544,
    "large": 334_881_768,
    "v6-tiny": 7_641_256,
    "v6-small": 27_677_032,
    "v6-base": 104_898_280,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_right_to_the_parameter(size):
    model = create_model(f"vision-rwkv-{size}", device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[size]
    head = sum(parameter.numel() for parameter in model.get_classifier().parameters())
    backbone = create_model(f"vision-rwkv-{size}", device="meta", num_classes=0)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == PUBLISHED[size] - head


@pytest.mark.parametrize("preset", FAMILY.presets)
def test_sizes_and_variant_are_read_off_the_tensors(preset):
    config = FAMILY.presets[preset]
    shapes = tensor_shapes(config)
    assert FAMILY.recognise(shapes)
    assert tensor_shapes(config_from_shapes(shapes)) == shapes
    assert not [f.name for f in families().values() if f is not FAMILY and f.recognise(shapes)]


@pytest.mark.parametrize("name", ["vision-rwkv-test", "vision-rwkv-v6-test"])
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema", "module.", None])
def test_published_files_load_from_any_wrapping(tmp_path, name, wrapper):
    weights = tiny(name).state_dict()
    published = {key if key.startswith("head.") else f"backbone.{key}": weight for key, weight in weights.items()}
    if wrapper == "module.":
        published = {f"module.{key}": weight for key, weight in published.items()}
    content = (
        {wrapper: published, "meta": {"epoch": 300}} if wrapper in ("state_dict", "model", "model_ema") else published
    )
    torch.save(content, tmp_path / "published.pth")
    checkpoint = open_checkpoint(tmp_path / "published.pth")
    assert (checkpoint.family.name, checkpoint.layout) == ("vision-rwkv", "openmmlab")
    assert_same_weights(rookery.load(tmp_path / "published.pth"), weights)


def test_a_backbone_without_head_gives_features(tmp_path):
    weights = {k: w for k, w in tiny("vision-rwkv-test").state_dict().items() if not k.startswith("head.")}
    torch.save({f"backbone.{key}": weight for key, weight in weights.items()}, tmp_path / "backbone.pth")
    model = rookery.load(tmp_path / "backbone.pth")
    assert model.config.num_classes == 0
    assert model(images(8, 8).float()).shape == (2, 32)


def test_files_that_make_no_model_say_why(tmp_path):
    weights = tiny("vision-rwkv-test").state_dict()
    torch.save(weights | {"pos_embed": torch.zeros(1, 15, 32)}, tmp_path / "odd.pth")
    with pytest.raises(BadCheckpoint, match="pos_embed is for 15 tokens, which are no square"):
        rookery.load(tmp_path / "odd.pth")
    del weights["pos_embed"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(BadCheckpoint, match="not a whole Vision-RWKV checkpoint: 'pos_embed' is missing"):
        rookery.load(tmp_path / "less.pth")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"image_size \(225\) must be a multiple of patch_size \(16\)"):
        create_model("vision-rwkv", image_size=225)
    with pytest.raises(ValueError, match=r"hidden_size \(192\) must be a multiple of head_dim \(80\)"):
        create_model("vision-rwkv-v6-tiny", head_dim=80)


# positions and patches


def test_positions_are_themselves_at_their_own_size_and_resized_at_others():
    model = randomised("vision-rwkv-test")
    assert model.positions((4, 4)) is model.pos_embed
    resized = model.positions((6, 3))
    assert resized.shape == (1, 18, 32)
    want = model.pos_embed.mT.unflatten(2, (4, 4))
    want = torch.nn.functional.interpolate(want, size=(6, 3), mode="bicubic", align_corners=False)
    assert torch.equal(resized, want.flatten(2).mT)


@torch.no_grad()
def test_images_that_patches_do_not_divide_are_filled_up_with_zeros_right_and_below():
    model = randomised("vision-rwkv-test").eval()
    image = images(13, 10)
    filled = torch.zeros(2, 3, 16, 12, dtype=torch.float64)
    filled[:, :, :13, :10] = image
    assert torch.equal(model(image), model(filled))
    large = create_model("vision-rwkv-tiny", num_hidden_layers=1).eval()
    assert large.forward_features(images(225, 230, batch=1).float()).shape == (1, 192, 15, 15)


# blocks


@torch.no_grad()
def test_the_exact_attention_turns_with_the_image():
    # half a turn reverses the tokens; neighbours left and right, above and below change places with it
    model = randomised("vision-rwkv-pre-test")
    mix = model.layers[1].att
    x = torch.randn(2, 15, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    order = torch.arange(32).view(4, 8)[[1, 0, 3, 2]].flatten()
    swapped = copy.deepcopy(mix)
    for parameter in swapped.parameters():
        for dim, size in enumerate(parameter.shape):
            if size == 32:
                parameter.copy_(parameter.index_select(dim, order))
    assert isinstance(mix, SpatialMix4)
    y, _ = mix(x, (3, 5), None)
    turned, _ = swapped(x.flip(1)[..., order], (3, 5), None)
    assert_close(turned.flip(1)[..., order.argsort()], y)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vision-rwkv-pre-test", "vision-rwkv-v6-test"])
def test_a_mix_of_the_token_alone_makes_the_shift_of_no_effect(name):
    models = [randomised(name, shift=shift) for shift in ("q", "none")]
    for model in models:
        for parameter_name, parameter in model.named_parameters():
            if "spatial_mix" in parameter_name:
                parameter.fill_(1)  # mixes weigh the token itself, those of v6's attention the neighbour
            elif "time_maa" in parameter_name:
                parameter.zero_()
    assert_close(models[0](images(12, 8)), models[1](images(12, 8)))


def test_a_single_block_has_finite_initial_values():
    for variant in ("v4", "v6", "v7"):
        model = create_model("vision-rwkv-test", variant=variant, num_hidden_layers=1, group_norm_eps=64e-5)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_a_factor_of_zero_makes_a_block_the_identity():
    model = randomised("vision-rwkv-test")
    x = torch.randn(2, 15, 32, dtype=torch.float64)
    for i in (0, 1):
        block = model.layers[i]
        block.gamma1.zero_()
        block.gamma2.zero_()
        assert_close(block(x, (3, 5), None)[0], block.ln0(x) if i == 0 else x)


def test_blocks_are_dropped_in_training_alone_and_more_often_the_later():
    model = create_model("vision-rwkv-pre-test", drop_path=0.5)
    assert [block.drop_path for block in model.layers] == [0, 0.25, 0.5]
    mixed = torch.ones(4000, 1, 1)
    assert torch.equal(model.eval().layers[2].finish(mixed, 1), mixed)
    torch.manual_seed(1)
    kept = model.train().layers[2].finish(mixed, 1)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert abs(float(kept.mean()) - 1) < 0.1


@torch.no_grad()
def test_the_released_attention_differs_from_the_exact_one():
    exact = randomised("vision-rwkv-test")
    released = randomised("vision-rwkv-test", compat="cuda32")
    difference = (exact(images(16, 16)) - released(images(16, 16))).abs().max()
    assert 1e-6 < difference < 1


@pytest.mark.parametrize("shift", ["1d", "none"])
def test_shifts_of_the_ablation_run(shift):
    logits = [randomised("vision-rwkv-test", shift=kind)(images(16, 16)) for kind in ("q", shift)]
    assert not torch.equal(*logits)


@torch.no_grad()
def test_blocks_of_the_seventh_variant_go_through_the_image_in_turns():
    model = create_model("vision-rwkv-v7-test", num_hidden_layers=5, device="meta")
    orders = [block.att.order for block in model.layers]
    assert orders == ["rows", "rows backwards", "columns", "columns backwards", "rows"]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_initial_values_are_those_of_the_table(name):
    model = create_model(name, dtype=torch.float64)
    block, channel, width = model.layers[1], 5, 32  # of three: ρ = 0.5, ρ₁ = 2/3
    close = lambda got, want: torch.testing.assert_close(float(got), want, rtol=1e-6, atol=1e-6)  # noqa: E731
    close(block.ffn.spatial_mix_r.flatten()[channel], (channel / width) ** (2 / 3))
    if model.config.variant == "v4":
        close(block.att.spatial_decay[channel], -5 + 8 * (channel / (width - 1)) ** 1.35)
        close(block.att.spatial_first[channel], -1.2039728 - 0.5)
        close(block.att.spatial_mix_v.flatten()[channel], (channel / width) ** (2 / 3) + 0.15)
        close(block.att.spatial_mix_r.flatten()[channel], (channel / width) ** (1 / 3))
    if model.config.variant == "v6":
        close(block.att.time_maa_v.flatten()[channel], 1 - (channel / width) ** (2 / 3) - 0.15)
        assert 0 < block.att.time_maa_w1.abs().max() <= 1e-4
    if model.config.variant == "v7":
        assert not block.att.output.weight.any()
    assert not model.pos_embed.any()
    assert abs(float(block.ffn.key.weight.std()) - 0.02) < 2e-3
    if model.config.layer_scale is not None:
        assert (block.gamma1 == 1e-5).all()


@pytest.mark.parametrize(("init", "decay", "mix"), [("local", 1.0, 1.0), ("global", 0.0, 0.5)])
def test_initial_values_of_the_ablations_are_constants(init, decay, mix):
    block = create_model("vision-rwkv-test", init=init).layers[2]
    for name, value in {"spatial_decay": decay, "spatial_first": decay, "spatial_mix_v": mix}.items():
        assert (block.att.get_parameter(name) == value).all()


# what users of timm expect


@torch.no_grad()
def test_features_come_from_any_blocks_in_the_order_asked_for():
    model = randomised("vision-rwkv-test").eval()
    first, last = model.forward_intermediates(images(20, 12), [0, 2])
    assert first.shape == last.shape == (2, 32, 5, 3)
    assert torch.equal(last, model.forward_features(images(20, 12)))
    swapped = model.forward_intermediates(images(20, 12), [2, 0])
    assert torch.equal(swapped[0], last)
    assert torch.equal(swapped[1], first)
    assert_close(model.forward_head(last, pre_logits=True), last.mean((2, 3)))
    with pytest.raises(ValueError, match="there is no block 3; the model has 0 to 2"):
        model.forward_intermediates(images(8, 8), [3])


@torch.no_grad()
def test_a_new_head_leaves_the_features_as_they_are(tmp_path):
    model = create_model("vision-rwkv-v6-test")
    before = model.forward_features(images(8, 8).float())
    model.reset_classifier(7)
    assert model.config.num_classes == 7
    assert model(images(8, 8).float()).shape == (2, 7)
    assert torch.equal(model.forward_features(images(8, 8).float()), before)
    save_model(model, tmp_path / "m.safetensors")
    assert rookery.load(tmp_path / "m.safetensors").config == model.config
    model.reset_classifier(0)
    assert model(images(8, 8).float()).shape == (2, 32)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_blocks_have_the_same_gradients(name):
    model = randomised(name)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        loss = model(images(12, 8)).square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads):
        assert_close(a, b)


def test_groups_for_the_optimiser_have_rates_by_depth_and_decay_on_matrices():
    model = create_model("vision-rwkv-test")
    groups = model.parameter_groups(weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    found = {id(p): group for group in groups for p in group["params"]}
    layers = model.layers
    expected = {
        model.pos_embed: (0.0, 0.5**4),
        model.patch_embed.projection.weight: (0.1, 0.5**4),
        layers[0].att.key.weight: (0.1, 0.5**3),
        layers[0].ln0.weight: (0.0, 0.5**3),
        layers[2].att.spatial_decay: (0.0, 0.5),
        layers[2].ffn.key_norm.weight: (0.0, 0.5),
        model.head.fc.weight: (0.1, 1.0),
        model.head.fc.bias: (0.0, 1.0),
    }
    for parameter, (decay, scale) in expected.items():
        assert (found[id(parameter)]["weight_decay"], found[id(parameter)]["lr_scale"]) == (decay, scale)
    as_published = model.parameter_groups(weight_decay=0.1, decay_vectors=True)
    decayed = {id(p) for group in as_published if group["weight_decay"] for p in group["params"]}
    assert {id(layers[2].att.spatial_decay), id(layers[2].gamma1), id(model.pos_embed)} <= decayed
    assert not {id(layers[0].ln0.weight), id(layers[2].ffn.key_norm.weight), id(model.head.fc.bias)} & decayed


@pytest.mark.parametrize("name", NAMES)
def test_autocast_to_bfloat16_computes_the_same_within_its_precision(name):
    model = create_model(name)
    want = model(images(16, 16).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(images(16, 16).float())
    assert (got - want).abs().max() < 0.02 * want.abs().max()
    got.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_another_input_size_keeps_resized_positions():
    model = randomised("vision-rwkv-test").eval()
    before = model(images(32, 32))
    model.set_input_size(32)
    assert model.config.image_size == 32
    assert model.pos_embed.shape == (1, 64, 32)
    assert_close(model(images(32, 32)), before)
    with pytest.raises(ValueError, match=r"image_size \(30\) must be a multiple"):
        model.set_input_size(30)
