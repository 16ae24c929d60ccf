"""Adapters: merged weights are those of the published rules, peft's own merge agrees, another base is refused."""

import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from support.files import tiny

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.adapter import adapted, read_adapter
from rookery.checkpoints.convert import convert
from rookery.checkpoints.safetensors import write_safetensors
from rookery.engine.llm import LLM
from rookery.errors import BadCheckpoint
from rookery.models import load, save_model

KEY, DOWN = "blocks.1.att.key", "blocks.2.ffn.value"  # [32, 32] and [32, 96]
RNG = np.random.default_rng(4)
TOKENS = [3, 1, 4, 1, 5]


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(tiny().state_dict(), path)
    return path


def weights(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint[name].astype(np.float64) for name in checkpoint}


def check(base, path, expected, **how):
    """The merged model has the `expected` weights and for the rest those of the base."""
    merged = adapted(open_checkpoint(base), path, **how)
    for name, weight in weights(base).items():
        want = expected.get(name, weight)
        np.testing.assert_allclose(merged[name], want.reshape(weight.shape), rtol=1e-5, atol=1e-5, err_msg=name)
    return merged


def pth(path, tensors):
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, path)
    return path


def lora(modules, r=4, prefix=""):
    return {
        f"{module}.{prefix}lora_{side}": numbers(r, shape[1]) if side == "A" else numbers(shape[0], r)
        for module, shape in modules.items()
        for side in "AB"
    }


MODULES = {KEY: (32, 32), DOWN: (32, 96)}


def test_lora_of_rwkv_peft_is_scaled_by_alpha_over_rank(tmp_path, base):
    tensors = lora(MODULES) | {"blocks.0.ln1.weight": numbers(32), "blocks.0.att.x_r": numbers(1, 1, 32)}
    old = weights(base)
    expected = {
        f"{m}.weight": old[f"{m}.weight"] + 8 * tensors[f"{m}.lora_B"] @ tensors[f"{m}.lora_A"] for m in MODULES
    }
    expected |= {name: tensors[name] for name in ("blocks.0.ln1.weight", "blocks.0.att.x_r")}
    path = pth(tmp_path / "rwkv-0.pth", tensors)
    merged = check(base, path, expected, alpha=32)
    assert merged.dtype == open_checkpoint(base).dtype
    with pytest.raises(BadCheckpoint, match=r"does not say the alpha of its LoRA; name it with --adapter-alpha"):
        adapted(open_checkpoint(base), path)


def test_pissa_takes_out_the_pair_that_it_began_with(tmp_path, base):
    tensors, first = lora(MODULES), lora(MODULES, prefix="init_")
    old = weights(base)
    expected = {
        f"{m}.weight": old[f"{m}.weight"]
        - first[f"{m}.init_lora_B"] @ first[f"{m}.init_lora_A"]
        + tensors[f"{m}.lora_B"] @ tensors[f"{m}.lora_A"]
        for m in MODULES
    }
    path = pth(tmp_path / "rwkv-0.pth", tensors)
    pth(tmp_path / "init_pissa.pth", first)
    check(base, path, expected)
    check(base, path, expected, alpha=99)  # PiSSA knows no alpha


@pytest.mark.parametrize("r", [5, 16])
def test_miss_shares_rows_among_columns(tmp_path, base, r):
    tensors = {f"{KEY}.disha": numbers(r, 32), f"{DOWN}.bone": numbers(r, 32)}
    old = weights(base)
    expected = {name: old[name].copy() for name in (f"{KEY}.weight", f"{DOWN}.weight")}
    for name, shared in tensors.items():
        weight = expected[name.rpartition(".")[0] + ".weight"]
        for o in range(weight.shape[0]):
            for i in range(weight.shape[1]):
                weight[o, i] += shared[i % r, o]  # adaptation.md C.2.1
    check(base, pth(tmp_path / "a.pth", tensors), expected)
    turned = {name: np.ascontiguousarray(array.T) for name, array in tensors.items()}
    check(base, pth(tmp_path / "old.pth", turned), expected)


def test_both_forms_of_bat_change_blocks(tmp_path, base):
    r, old = 8, weights(base)[f"{DOWN}.weight"]
    for name, count, by_rows in (("bone", 4, True), ("disha", 12, False)):
        blocks, want = numbers(count, r, r), old.copy()
        for a in range(4):
            for b in range(12):
                block, factor = old[a * r :, b * r :][:r, :r], blocks[a if by_rows else b]
                want[a * r : a * r + r, b * r : b * r + r] = block + block @ factor + factor
        check(base, pth(tmp_path / f"{name}.pth", {f"{DOWN}.{name}": blocks}), {f"{DOWN}.weight": want})


def test_bone_ab_multiplies_with_one_block_and_adds_another(tmp_path, base):
    r, old = 8, weights(base)[f"{DOWN}.weight"]
    for count, by_rows in ((4, True), (12, False)):
        first, second, want = numbers(count, r, r), numbers(count, r, r), old.copy()
        for a in range(4):
            for b in range(12):
                block, at = old[a * r :, b * r :][:r, :r], a if by_rows else b
                want[a * r : a * r + r, b * r : b * r + r] = block + block @ first[at] + second[at]
        path = pth(tmp_path / f"{count}.pth", {f"{DOWN}.bone_A": first, f"{DOWN}.bone_B": second})
        check(base, path, {f"{DOWN}.weight": want})
        merged = adapted(open_checkpoint(base), path)
        back = adapted(merged, path, undo=True)
        np.testing.assert_allclose(back.tensors[f"{DOWN}.weight"].read(), old, atol=1e-3)
    refused = pth(tmp_path / "half.pth", {f"{DOWN}.bone_A": first})
    with pytest.raises(BadCheckpoint, match="Bone-AB has bone_A and bone_B of one shape"):
        adapted(open_checkpoint(base), refused)


def folder(path, tensors, **settings):
    path.mkdir()
    write_safetensors(path / "adapter_model.safetensors", tensors, {})
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def test_pefts_settings_are_heeded(tmp_path, base):
    old = weights(base)
    pair = {
        f"base_model.model.{m}.lora_{s}.weight": a
        for m in MODULES
        for s, a in zip("AB", lora({m: MODULES[m]}).values())
    }
    low = {
        m: pair[f"base_model.model.{m}.lora_B.weight"] @ pair[f"base_model.model.{m}.lora_A.weight"] for m in MODULES
    }
    plain = folder(tmp_path / "plain", pair, lora_alpha=6, r=4)
    check(base, plain, {f"{m}.weight": old[f"{m}.weight"] + 1.5 * low[m] for m in MODULES})
    rooted = folder(tmp_path / "rs", pair, lora_alpha=6, r=4, use_rslora=True, alpha_pattern={"ffn.value": 2})
    scales = {KEY: 3, DOWN: 1}
    check(base, rooted, {f"{m}.weight": old[f"{m}.weight"] + scales[m] * low[m] for m in MODULES})
    extra = {"base_model.model.head.modules_to_save.weight": numbers(64, 32)}
    extra |= {
        "base_model.model.emb.lora_embedding_A": numbers(2, 64),
        "base_model.model.emb.lora_embedding_B": numbers(32, 2),
    }
    table = (
        old["emb.weight"]
        + (extra["base_model.model.emb.lora_embedding_B"] @ extra["base_model.model.emb.lora_embedding_A"]).T
    )
    whole = folder(tmp_path / "whole", extra, lora_alpha=2, r=2)
    check(base, whole, {"head.weight": extra["base_model.model.head.modules_to_save.weight"], "emb.weight": table})
    with pytest.raises(BadCheckpoint, match="init_lora_weights 'pissa_niter_4' changed the base model's weights"):
        read_adapter(folder(tmp_path / "pissa", pair, lora_alpha=6, init_lora_weights="pissa_niter_4"))
    with pytest.raises(BadCheckpoint, match=r"stored \[in, out\] \(fan_in_fan_out\)"):
        read_adapter(folder(tmp_path / "fan", pair, lora_alpha=6, fan_in_fan_out=True))


def test_names_of_flash_linear_attention_are_understood(tmp_path, base):
    convert(base, tmp_path / "fla")
    tensors = {
        "base_model.model.model.layers.1.attn.r_proj.lora_A.weight": numbers(2, 32),
        "base_model.model.model.layers.1.attn.r_proj.lora_B.weight": numbers(32, 2),
        "base_model.model.model.layers.1.attn.w_lora.lora.0.lora_A.weight": numbers(2, 32),
        "base_model.model.model.layers.1.attn.w_lora.lora.0.lora_B.weight": numbers(8, 2),
    }
    a, b, c, d = tensors.values()
    old = weights(base)
    expected = {
        "blocks.1.att.receptance.weight": old["blocks.1.att.receptance.weight"] + b @ a,
        "blocks.1.att.w1": old["blocks.1.att.w1"] + (d @ c).T,
    }
    path = folder(tmp_path / "adapter", tensors, lora_alpha=2, r=2)
    check(base, path, expected)
    check(tmp_path / "fla", path, expected)


def peft_configs():
    if importlib.util.find_spec("peft") is None:
        return []
    from peft import LoraConfig, MissConfig

    names = ["receptance", "att.key", "ffn.key", "value"]
    return {
        "lora": LoraConfig(r=4, lora_alpha=12, target_modules=names, init_lora_weights=False),
        "rslora": LoraConfig(r=4, lora_alpha=12, target_modules=names, use_rslora=True, init_lora_weights=False),
        "dora": LoraConfig(r=4, lora_alpha=12, target_modules=names, use_dora=True, init_lora_weights=False),
        "miss": MissConfig(r=5, target_modules=names, init_weights=False),
        "mini": MissConfig(r=4, mini_r=8, target_modules=names, init_weights="mini"),
        "bat": MissConfig(r=8, target_modules=names, init_weights="bat"),
    }


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "miss", "mini", "bat"])
def test_peft_merges_to_the_same_weights(tmp_path, base, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import get_peft_model

        wrapped = get_peft_model(load(base), peft_configs()[kind])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name or "miss" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(tmp_path / "adapter")
        merged = wrapped.merge_and_unload().state_dict()
    again = load(base, adapter=tmp_path / "adapter").state_dict()
    changed = [name for name, weight in load(base).state_dict().items() if not torch.equal(weight, again[name])]
    assert len(changed) == 3 * 5
    for name, weight in merged.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_model_in_transformers_fits_the_model_itself(tmp_path, base):
    from peft import get_peft_model

    import rookery.hf

    wrapped = get_peft_model(rookery.hf.RookeryForCausalLM.of(load(base)), peft_configs()["lora"])
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped(torch.tensor([TOKENS])).logits
    got = load(base, adapter=tmp_path / "adapter")(torch.tensor([TOKENS]))[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load(base)(torch.tensor([TOKENS]))[0], expected, atol=1e-2)


def test_every_way_in_merges_and_the_result_is_another_model(tmp_path, base):
    path = pth(tmp_path / "a.pth", lora(MODULES))
    plain, merged = load(base), load(base, adapter=path, adapter_alpha=4)
    expected = merged(torch.tensor([TOKENS]))[0][0].detach().numpy()
    for device in (None, "cpu"):
        llm = LLM(base, adapter=path, adapter_alpha=4, device=device)
        np.testing.assert_allclose(llm.logits(TOKENS), expected, rtol=1e-3, atol=1e-3)
        assert llm.runner.fingerprint() == merged.fingerprint() != plain.fingerprint()
    convert(adapted(open_checkpoint(base), path, alpha=4), tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.fingerprint() == merged.fingerprint()
    for name, weight in merged.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_merged_weights_keep_the_precision_of_the_base(tmp_path):
    save_model(tiny(dtype=torch.bfloat16), tmp_path / "base.safetensors")
    path = pth(tmp_path / "a.pth", lora(MODULES) | {"blocks.0.ln1.weight": numbers(32)})
    merged = adapted(open_checkpoint(tmp_path / "base.safetensors"), path, alpha=4)
    assert {dtype.name for dtype in merged.dtypes.values()} == {"bfloat16"}


def test_a_tuned_state_in_an_adapter_goes_along(tmp_path, base):
    states = {f"blocks.{i}.att.time_state": numbers(2, 16, 16) for i in range(3)}
    merged = adapted(open_checkpoint(base), pth(tmp_path / "a.pth", lora(MODULES) | states), alpha=4)
    assert set(merged.kept) == set(states)


def refusal(base, path, **how):
    with pytest.raises(BadCheckpoint) as refused:
        adapted(open_checkpoint(base), path, **how)
    return str(refused.value)


def test_another_base_is_refused_with_what_differs(tmp_path, base):
    deeper = pth(tmp_path / "deeper.pth", lora({KEY: (32, 32), "blocks.7.att.key": (32, 32)}))
    assert refusal(base, deeper, alpha=4) == (
        f"{str(deeper)!r}: the adapter was trained on another model than {str(base)!r} (rwkv7, 3 layers of width 32): "
        "that one has no 'blocks.7.att.key.weight'"
    )
    wider = pth(tmp_path / "wider.pth", lora({KEY: (64, 64)}))
    assert refusal(base, wider, alpha=4).endswith(f"{KEY}: lora_A 4 × 64 does not fit a weight 32 × 32")
    taller = pth(tmp_path / "taller.pth", lora({KEY: (48, 32)}))
    assert refusal(base, taller, alpha=4).endswith(f"{KEY}: lora_B 48 × 4 does not fit a weight 32 × 32")
    shared = pth(tmp_path / "shared.pth", {f"{KEY}.disha": numbers(8, 48)})
    assert refusal(base, shared).endswith("a factor 8 × 48 shares no rows with a weight 32 × 32")
    blocks = pth(tmp_path / "blocks.pth", {f"{KEY}.disha": numbers(8, 8, 8)})
    assert refusal(base, blocks).endswith("a factor 8 × 8 × 8 does not cut a weight 32 × 32 into blocks")
    whole = pth(tmp_path / "whole.pth", lora(MODULES) | {"blocks.0.att.r_k": numbers(4, 16)})
    assert refusal(base, whole, alpha=4).endswith("'blocks.0.att.r_k' has shape [4, 16], that one's [2, 16]")
    named = {f"base_model.model.{KEY}x.lora_{s}.weight": a for s, a in zip("AB", lora({KEY: (32, 32)}).values())}
    path = folder(tmp_path / "named", named, base_model_name_or_path="some/base", lora_alpha=1)
    assert "trained on another model (it names 'some/base') than" in refusal(base, path)


def test_what_is_no_adapter_is_refused(tmp_path, base):
    assert "this is no adapter: no tensor is named like 'blocks.0.att.key.lora_A'" in refusal(base, base)
    (tmp_path / "empty").mkdir()
    assert "it has none of adapter_model.safetensors, adapter_model.bin" in refusal(base, tmp_path / "empty")
    half = pth(tmp_path / "half.pth", {f"{KEY}.lora_A": numbers(4, 32)})
    assert "there is lora_A without lora_B, or the other way round" in refusal(base, half, alpha=1)
    odd = pth(tmp_path / "odd.pth", {f"{KEY}.lora_Q": numbers(4, 32)})
    assert "its tensors 'lora_Q' are of no kind that is known" in refusal(base, odd, alpha=1)
    vector = pth(tmp_path / "vector.pth", {f"blocks.0.ln1.lora_{s}": numbers(4, 32) for s in "AB"})
    assert "the weight has shape [32], adapters change matrices" in refusal(base, vector, alpha=1)
    broken = folder(tmp_path / "broken", {f"{KEY}.lora_A": numbers(4, 32)})
    (broken / "adapter_config.json").write_text("[1]")
    assert "is damaged: it is not a JSON table" in refusal(base, broken)
    (broken / "adapter_config.json").write_text("[")
    assert "is damaged: it is not JSON" in refusal(base, broken)
    table = pth(tmp_path / "table.pth", {"emb.lora_embedding_A": numbers(4, 64)})
    assert "lora_embedding_A or lora_embedding_B is missing" in refusal(base, table, alpha=1)
