import pytest
import torch

from rookery.compat import timm
from rookery.errors import UnknownName
from rookery.models import create_model, save_model


def test_published_sizes_have_names_that_timm_would_give_them():
    assert timm.list_models("vrwkv6*") == [f"vrwkv6_{size}_patch16_224" for size in ("base", "small", "tiny")]
    assert "vrwkv_large_patch16_384" in timm.list_models()
    for name, (registered, sizes) in timm.MODELS.items():
        size = create_model(registered, device="meta", **sizes).config.image_size
        assert name.endswith(str(size))


def test_a_model_is_made_as_timm_makes_one():
    model = timm.create_model("vrwkv_nano_patch2_8", num_classes=7, in_chans=1, img_size=12, drop_path_rate=0.2)
    assert model(torch.randn(2, 1, 12, 12)).shape == (2, 7)
    assert model.default_cfg["input_size"] == (1, 12, 12)
    assert model.layers[-1].drop_path == pytest.approx(0.2)
    assert {"pos_embed", "ln1.weight", "head.fc.bias"} <= timm.no_weight_decay(model)
    assert "head.fc.weight" not in timm.no_weight_decay(model)


def test_maps_of_several_blocks_are_features():
    model = timm.create_model("vrwkv_nano_patch2_8", features_only=True)
    assert model.out_indices == [0, 1, 2, 3]
    maps = model(torch.randn(1, 3, 10, 6))
    assert [list(found.shape) for found in maps] == [[1, 64, 5, 3]] * 4
    assert model.feature_info[0] == {"num_chs": 64, "reduction": 2, "module": "layers.0"}
    last = timm.create_model("vrwkv_nano_patch2_8", features_only=True, out_indices=(-1,))
    assert last.out_indices == [3]
    with pytest.raises(ValueError, match="no block 4; the model has 0 to 3"):
        timm.create_model("vrwkv_nano_patch2_8", features_only=True, out_indices=(4,))


def test_a_file_gives_weights_at_another_size_and_with_another_head(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(create_model("vision-rwkv-test", seed=5), path)
    model = timm.create_model(
        "vrwkv_tiny_patch16_224", checkpoint_path=path, num_classes=3, img_size=24, drop_path_rate=0.5
    )
    assert (model.config.image_size, model.config.num_classes, model.config.drop_path) == (24, 3, 0.5)
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 3)
    save_model(create_model("rwkv7-test"), path)
    with pytest.raises(ValueError, match="of the family 'rwkv7', not 'vrwkv_tiny_patch16_224'"):
        timm.create_model("vrwkv_tiny_patch16_224", checkpoint_path=path)


def test_unknown_names_and_downloads_are_refused():
    with pytest.raises(UnknownName, match="Did you mean 'vrwkv_tiny_patch16_224'"):
        timm.create_model("vrwkv_tiny_patch16")
    with pytest.raises(ValueError, match="give the file as checkpoint_path"):
        timm.create_model("vrwkv_tiny_patch16_224", pretrained=True)
