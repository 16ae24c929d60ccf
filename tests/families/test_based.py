"""BASED as data: released names, what their config.json tells, what is refused. It is true that …"""

import json

import numpy as np
import pytest

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.safetensors import write_safetensors
from rookery.errors import BadCheckpoint
from rookery.families.based import BasedConfig
from rookery.models import create_model, load
from rookery.registry import families, recognise

FAMILY = families()["based"]


@pytest.mark.parametrize("preset", ["360m", "1b", "test"])
def test_sizes_are_read_off_the_tensors(preset):
    config = FAMILY.presets[preset]
    shapes = FAMILY.tensor_shapes(config)
    assert recognise(shapes) is FAMILY
    assert FAMILY.config_from_shapes(shapes, num_heads=config.num_heads, window=config.window) == config


def released(model, prefix="model."):
    """The tensors of a model as the trainer of the released files wrote them."""
    tensors = {prefix + name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    head = tensors[prefix + "transformer.embeddings.word_embeddings.weight"].copy()
    extra = {prefix + "transformer.decay.decay": np.ones(16, np.float32)}
    return tensors | {prefix + "lm_head.weight": head, "train_metrics.num-tokens.count": np.array(7)} | extra


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_released_folder_is_read(tmp_path, prefix):
    model = create_model("based-test", num_heads=2, window=9)
    write_safetensors(tmp_path / "model.safetensors", released(model, prefix), {})
    settings = {"alt_mixer": {"num_heads": 2, "feature_dim": 4}, "alt_mixer_2": {"window_size": 16}, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.family is FAMILY
    assert checkpoint.layout == "published"
    assert checkpoint.config == model.config, "window_size 16 means 8 keys to the left and the query's own"
    assert sorted(checkpoint.unused) == ["train_metrics.num-tokens.count", "transformer.decay.decay"]
    own = load(tmp_path).state_dict()
    assert all((own[name] == weight).all() for name, weight in model.state_dict().items())


def test_a_head_of_its_own_is_refused(tmp_path):
    tensors = released(create_model("based-test"))
    tensors["model.lm_head.weight"] = tensors["model.lm_head.weight"] + 1
    write_safetensors(tmp_path / "m.safetensors", tensors, {})
    with pytest.raises(BadCheckpoint, match="stored twice"):
        load(tmp_path / "m.safetensors")


def test_what_no_tensor_tells_can_be_named(tmp_path):
    model = create_model("based-test")
    write_safetensors(tmp_path / "m.safetensors", released(model), {})
    settings = {"num_heads": 2, "window": 9, "feature_dim": 4}
    assert open_checkpoint(tmp_path / "m.safetensors", settings=settings).config == model.config


def test_the_attention_baseline_of_the_same_names_is_not_taken_for_based():
    config = FAMILY.presets["test"]
    shapes = FAMILY.tensor_shapes(BasedConfig(**{**vars(config), "linear_layers": (), "window_layers": (0, 1, 2)}))
    with pytest.raises(BadCheckpoint, match="no registered family"):
        recognise(shapes)


def test_a_missing_tensor_is_named():
    shapes = FAMILY.tensor_shapes(FAMILY.presets["test"])
    del shapes["transformer.embeddings.word_embeddings.weight"]
    with pytest.raises(BadCheckpoint, match="not a whole BASED checkpoint: 'transformer.embeddings"):
        FAMILY.config_from_shapes(shapes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"linear_layers": (1, 2), "window_layers": [2, 3]}, r"layers \[2\] are in linear_layers and in window_layers"),
        ({"hidden_size": 48, "num_heads": 16}, "hidden_size .48. must be a multiple of twice num_heads"),
        ({"window": 0}, "window .0. must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        BasedConfig(**wrong)


def test_heads_that_do_not_divide_the_queries_are_refused():
    shapes = FAMILY.tensor_shapes(FAMILY.presets["test"])
    with pytest.raises(BadCheckpoint, match="3 heads cannot share 8 query channels; is num_heads right"):
        FAMILY.config_from_shapes(shapes, num_heads=3)
