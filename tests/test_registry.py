"""Names of models: every one leads to a family and a config, and a wrong one to a helpful error."""

import importlib
import subprocess
import sys

import pytest

import rookery
from rookery.errors import BadCheckpoint, UnknownName
from rookery.families.base import Family
from rookery.registry import FAMILY_MODULES, configure, families, find, list_models, recognise


def test_every_family_file_is_registered_under_its_name():
    assert len(families()) == len(FAMILY_MODULES)
    for module in FAMILY_MODULES:
        family = importlib.import_module(f"rookery.families.{module}").FAMILY
        assert isinstance(family, Family)
        assert families()[family.name] is family


def test_every_family_has_a_test_preset_and_a_builder():
    for family in families().values():
        assert "test" in family.presets
        assert all(isinstance(config, family.config) for config in family.presets.values())
        module, _, name = family.builder.partition(":")
        assert isinstance(getattr(importlib.import_module(module), name), type)


def test_every_listed_name_can_be_configured_and_is_listed_once():
    names = list_models()
    assert len(names) == len(set(names))
    for name in names:
        family, config = configure(name)
        assert isinstance(config, family.config)
        assert name.startswith(family.name)


def test_patterns_choose_among_the_names():
    assert list_models("rwkv7-test") == ["rwkv7-test"]
    assert set(list_models("*-test")) == {name for name in list_models() if name.endswith("-test")}
    assert list_models("*no-such*") == []
    assert rookery.list_models("rwkv7*")[0] == "rwkv7"


def test_overrides_replace_fields_of_a_preset():
    _, config = configure("rwkv7-0.1b", vocab_size=512)
    assert (config.vocab_size, config.hidden_size) == (512, 768)


def test_a_bare_family_name_has_no_preset():
    family, preset = find("transformer")
    assert (family.name, preset) == ("transformer", None)
    assert find("rwkv7-pile-0.1b")[1] == "pile-0.1b"


@pytest.mark.parametrize("wrong", ["rwkv7-tets", "rwkv7-", "rwkv", "rwkv7-test-test", ""])
def test_an_unknown_model_is_refused(wrong):
    with pytest.raises(UnknownName, match=r"no model named .*`rookery models` shows all"):
        find(wrong)


def test_a_misspelt_model_and_setting_get_a_suggestion():
    with pytest.raises(UnknownName, match="Did you mean 'rwkv7-test'"):
        find("rwkv7-tets")
    with pytest.raises(
        UnknownName, match="no setting named 'hiden_size'. Did you mean 'hidden_size'. RWKV7Config shows"
    ):
        configure("rwkv7", hiden_size=3)


def test_tensors_that_no_family_claims_are_refused():
    with pytest.raises(BadCheckpoint, match=r"no registered family has these tensors \(conv1\.weight, conv1\.bias …\)"):
        recognise({"conv1.weight": (3, 3), "conv1.bias": (3,)})
    with pytest.raises(BadCheckpoint, match=r"\(no tensors at all …\)\. Known families: rwkv7, .*, transformer"):
        recognise({})


def test_public_names_are_found_where_they_live():
    assert rookery.create_model is importlib.import_module("rookery.models").create_model
    assert {"create_model", "list_models", "State"} <= set(dir(rookery))
    with pytest.raises(AttributeError, match="module 'rookery' has no attribute 'creat_model'"):
        _ = rookery.creat_model


def test_the_registry_is_read_without_torch():
    code = "import sys, rookery; rookery.list_models(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
