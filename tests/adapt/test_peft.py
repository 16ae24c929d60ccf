import json

import pytest
import torch
from support.language import randomised

from rookery.adapt.config import IN_RWKV_PEFT, LOW_RANK, AdaptConfig
from rookery.adapt.peft import (
    adapter_tensors,
    attach,
    load_adapter,
    merge,
    restart_pissa,
    save_adapter,
    save_rwkv_peft,
    target_names,
)
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.adapter import adapted
from rookery.models import create_model, save_model
from rookery.state import from_numpy

METHODS = ("lora", "rslora", "dora", "pissa", "miss", "mini", "bat")
NAMES = {
    "rwkv4-test": "att.key att.output att.receptance att.value ffn.key ffn.receptance ffn.value",
    "rwkv5-test": "att.gate att.key att.output att.receptance att.value ffn.key ffn.receptance ffn.value",
    "rwkv6-test": "att.gate att.key att.output att.receptance att.value ffn.key ffn.receptance ffn.value",
    "rwkv7-test": "att.key att.output att.receptance att.value ffn.key ffn.value",
}
pytest.importorskip("peft")


def model_of(name="rwkv7-test", dtype=torch.float64):
    model = randomised(name, dtype=dtype)
    return model


def logits_of(model):
    tokens = torch.randint(1, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens)[0]


def trained(model, method, rank=4):
    """The model with an adapter that is not what it began as; the config and PiSSA's initial pair."""
    config = AdaptConfig(method=method, rank=rank)
    initial = attach(model, config, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return config, initial


@pytest.mark.parametrize("name", NAMES)
def test_the_matrices_of_every_family_are_found(name):
    model = model_of(name)
    found = target_names(model)
    assert sorted({n.split(".", 2)[2] for n in found}) == NAMES[name].split()
    assert len(found) == model.config.num_hidden_layers * len(NAMES[name].split())
    assert {n.split(".", 2)[2] for n in target_names(model, "att.key, ffn")} == {
        n for n in NAMES[name].split() if n == "att.key" or n.startswith("ffn")
    }


@pytest.mark.parametrize("name", ["transformer-test", "rad-rwkv7-test", "arwkv-test"])
def test_other_families_have_targets_too(name, tmp_path):
    model = randomised(name, dtype=torch.float32)
    parts = {n.split(".")[3] for n in target_names(model)}
    assert parts == {"self_attn", "mlp"}
    config, _ = trained(model, "lora")
    expected = logits_of(model)
    save_adapter(model, tmp_path / "adapter", config)
    fresh = randomised(name, dtype=torch.float32)
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(fresh), expected, rtol=1e-4, atol=1e-4)
    merge(model)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-3, atol=1e-3)


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"rwkv7 has no matrices 'q_proj'; its blocks have att\.key, .*ffn\.value"):
        target_names(model_of(), "q_proj")
    with pytest.raises(ValueError, match="names nothing to adapt"):
        target_names(model_of(), "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing_and_is_all_that_trains(name, method):
    model = model_of(name, torch.float32 if method == "pissa" else torch.float64)
    before = logits_of(model)
    attach(model, AdaptConfig(method=method, rank=4))
    after = logits_of(model)
    if method in ("pissa", "dora"):  # the weights were taken apart in float32; rows were divided by their length
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in model.named_parameters() if any(p is t for t in adapter_tensors(model).values())}
    model(torch.tensor([[1, 2, 3]]))[0].sum().backward()
    assert all((p.grad is not None) == (n in trainable) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["rwkv4-test", "rwkv7-test"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_gives_a_plain_model_that_computes_the_same(name, method, tmp_path):
    model = model_of(name, dtype := torch.float32 if method == "pissa" else torch.float64)
    names = list(model.state_dict())
    before = logits_of(model)
    trained(model, method)
    adapted = logits_of(model)
    assert (adapted - before).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(
        logits_of(model), adapted, rtol=(tolerance := 1e-9 if dtype == torch.float64 else 1e-4), atol=tolerance
    )
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    save_model(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("width", [26, 32])
def test_updates_are_those_of_the_papers(width):
    """Explicit formulas (adaptation.md C.2), with a width that the rank does not divide where the method allows it."""
    model = create_model("rwkv7", hidden_size=width, head_dim=width // 2, num_hidden_layers=1, vocab_size=20).double()
    base = model.blocks[0].att.key.weight.detach().clone()
    for method in ("lora", "miss", *(("bat",) if width % 4 == 0 else ())):
        trained(model, method)
        weights = {n.removeprefix("blocks.0.att.key."): t.detach().clone() for n, t in adapter_tensors(model).items()}
        merge(model)
        if method == "lora":
            want = base + weights["lora_B.weight"] @ weights["lora_A.weight"]
        elif method == "miss":
            want = base + torch.stack([weights["miss_block"][i % 4] for i in range(width)], dim=1)
        else:
            blocks = base.view(width // 4, 4, width // 4, 4).transpose(1, 2)
            b = weights["miss_block"][:, None]
            want = (blocks + blocks @ b + b).transpose(1, 2).reshape(width, width)
        got = model.blocks[0].att.key.weight
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        base = got.detach().clone()


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_does_the_same_to_the_original_model(method, tmp_path):
    model = model_of(dtype=torch.float32)
    config, initial = trained(model, method)
    expected = logits_of(model)
    save_adapter(model, tmp_path / "adapter", config, base="tiny.pth", initial=initial)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["peft_type"] == ("LORA" if method in LOW_RANK else "MISS")
    assert settings["base_model_name_or_path"] == "tiny.pth"
    fresh = model_of(dtype=torch.float32)
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(fresh), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "miss", "mini"])
def test_peft_itself_reads_the_folder(method, tmp_path):
    import peft

    model = model_of(dtype=torch.float32)
    config, _ = trained(model, method)
    expected = logits_of(model)
    save_adapter(model, tmp_path / "adapter", config)
    theirs = peft.PeftModel.from_pretrained(model_of(dtype=torch.float32), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(theirs.base_model.model), expected)


def test_a_resumed_pissa_takes_up_its_own_pair():
    model, again = model_of(dtype=torch.float32), model_of(dtype=torch.float32)
    config = AdaptConfig(method="pissa", rank=4)
    initial = attach(model, config, seed=5)
    restart_pissa(again, config, initial)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()))


def test_pissa_without_its_initial_pair_is_refused(tmp_path):
    model = model_of(dtype=torch.float32)
    config, _ = trained(model, "pissa")
    with pytest.raises(ValueError, match="means nothing without the initial pair"):
        save_adapter(model, tmp_path / "adapter", config)


@pytest.mark.parametrize(
    ("method", "names"), [("lora", "lora_A lora_B"), ("miss", "disha"), ("pissa", "lora_A lora_B")]
)
def test_rwkv_peft_files_have_that_programs_names(method, names, tmp_path):
    model = model_of(dtype=torch.float32)
    config, initial = trained(model, method)
    save_rwkv_peft(model, tmp_path / "a.pth", config, initial=initial)
    tensors = torch.load(tmp_path / "a.pth", weights_only=True)
    assert {n for n in tensors if n.startswith("blocks.1.att.key.")} == {f"blocks.1.att.key.{n}" for n in names.split()}
    width = model.config.hidden_size
    assert tensors[f"blocks.1.att.key.{names.split()[0]}"].shape == (4, width)
    if method == "pissa":
        pair = torch.load(tmp_path / "init_pissa.pth", weights_only=True)
        assert {n.replace(".init_", ".") for n in pair} == set(tensors)


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_verb_does_what_merging_here_does(method, tmp_path):
    model = model_of(dtype=torch.float32)
    save_model(model, tmp_path / "base.safetensors")
    config, initial = trained(model, method)
    save_adapter(model, tmp_path / "adapter", config, initial=initial)
    files = ["adapter"]
    if method in IN_RWKV_PEFT:
        save_rwkv_peft(model, tmp_path / "a.pth", config, initial=initial)
        files.append("a.pth")
    merge(model)
    for file in files:
        alpha = config.rank if file.endswith(".pth") else None  # the folder says it
        read = adapted(open_checkpoint(tmp_path / "base.safetensors"), tmp_path / file, alpha=alpha)
        weights = {name: from_numpy(read[name]) for name in read}
        torch.testing.assert_close(weights, dict(model.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "said"), [("bat", "BAT"), ("dora", "dora"), ("mini", "mini")])
def test_what_rwkv_peft_does_not_know_has_no_file_of_its(tmp_path, method, said):
    model = model_of()
    config, _ = trained(model, method)
    with pytest.raises(ValueError, match=f"cannot hold this {said} adapter"):
        save_rwkv_peft(model, tmp_path / "a.pth", config)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter: adapter_config\.json is missing"):
        load_adapter(model_of(), tmp_path)
    with pytest.raises(ValueError, match="the model has no adapter"):
        merge(model_of())
    with pytest.raises(
        ValueError, match="'full' adds no adapter; methods that do: lora, rslora, dora, pissa, miss, mini, bat"
    ):
        attach(model_of(), AdaptConfig(method="full"))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "head_dim": 16, "vocab_size": 20}
    small = create_model("rwkv7", num_hidden_layers=1, **sizes)
    config, _ = trained(small, "lora")
    save_adapter(small, tmp_path / "adapter", config)
    with pytest.raises(ValueError, match="does not fit this rwkv7 model: see blocks.1.att.key.lora_A.weight"):
        load_adapter(create_model("rwkv7", num_hidden_layers=2, **sizes), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bone"}, "adapt.method must be one of full, lora, .*state.*; got 'bone'; it is called miss"),
        ({"method": "miss", "mini_r": 4}, "adapt.mini_r is for the method mini"),
        ({"rank": 0}, "adapt.rank must be at least 1"),
        ({"dropout": 1.0}, r"adapt.dropout must lie in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptConfig(**settings)
