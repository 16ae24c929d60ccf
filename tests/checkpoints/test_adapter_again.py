"""Adapters twice, taken out again, and in another form: what is exact, and what is refused."""

import json

import numpy as np
import pytest
import torch
from support.files import tiny

from rookery.checkpoints import adapter_rules as rules
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.adapter import adapted
from rookery.checkpoints.adapter_convert import convert_adapter
from rookery.checkpoints.convert import convert
from rookery.cli.main import main
from rookery.errors import BadCheckpoint, UnknownName

KEY, DOWN = "blocks.1.att.key", "blocks.2.ffn.value"  # [32, 32] and [32, 96]
RNG = np.random.default_rng(9)
MODULES = {KEY: (32, 32), DOWN: (32, 96)}


def numbers(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


@pytest.fixture
def base(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def file(path, tensors):
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, path)
    return path


def peft_folder(path, suffix, tensors, **settings):
    from rookery.checkpoints.safetensors import write_safetensors

    path.mkdir()
    named = {f"base_model.model.{module}.{suffix}": array for module, array in tensors.items()}
    write_safetensors(path / "adapter_model.safetensors", named, {})
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def weights(checkpoint):
    return {name: checkpoint[name] for name in checkpoint}


def same(one, other, tolerance=1e-5):
    for name, weight in weights(one).items():
        np.testing.assert_allclose(weight, other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def lora():
    return {
        f"{module}.lora_{side}": numbers(4, shape[1]) if side == "A" else numbers(shape[0], 4)
        for module, shape in MODULES.items()
        for side in "AB"
    }


KINDS = {
    "lora": lora,
    "pissa": lambda: lora() | {name.replace("lora_", "init_lora_"): array for name, array in lora().items()},
    "miss": lambda: {f"{module}.disha": numbers(5, shape[0]) for module, shape in MODULES.items()},
    "bat by columns": lambda: {
        f"{module}.disha": numbers(shape[1] // 8, 8, 8, scale=0.1) for module, shape in MODULES.items()
    },
    "bat by rows": lambda: {
        f"{module}.bone": numbers(shape[0] // 8, 8, 8, scale=0.1) for module, shape in MODULES.items()
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_merged_can_be_taken_out(tmp_path, base, kind):
    path = file(tmp_path / "a.pth", KINDS[kind]())
    first = open_checkpoint(base)
    merged = adapted(first, path, alpha=4)
    assert np.abs(merged[f"{KEY}.weight"] - first[f"{KEY}.weight"]).max() > 0.05
    convert(merged, tmp_path / "m.safetensors")
    again = adapted(open_checkpoint(tmp_path / "m.safetensors"), path, alpha=4, undo=True)
    same(again, first)
    assert again.fingerprint() == first.fingerprint() != merged.fingerprint()
    convert(again, tmp_path / "again.safetensors")
    adapted(open_checkpoint(tmp_path / "again.safetensors"), path, alpha=4)  # and put in once more


def test_a_model_that_holds_the_adapter_is_refused(tmp_path, base):
    path, other = file(tmp_path / "a.pth", lora()), file(tmp_path / "b.pth", lora())
    for target in ("m.safetensors", "m.pth"):
        convert(adapted(open_checkpoint(base), path, alpha=4), tmp_path / target)
        merged = open_checkpoint(tmp_path / target)
        with pytest.raises(BadCheckpoint, match="holds this adapter already: merged again it would count twice"):
            adapted(merged, path, alpha=4)
        both = adapted(merged, other, alpha=4)
        with pytest.raises(BadCheckpoint, match="holds this adapter already"):
            adapted(both, path, alpha=4)
        with pytest.raises(BadCheckpoint, match="does not hold this adapter; it cannot be taken out"):
            adapted(merged, other, alpha=4, undo=True)


def test_bat_after_another_adapter_must_be_meant(tmp_path, base):
    first, bat = file(tmp_path / "a.pth", lora()), file(tmp_path / "b.pth", KINDS["bat by columns"]())
    merged = adapted(open_checkpoint(base), first, alpha=4)
    with pytest.raises(BadCheckpoint, match="the order matters. Merge it first, or say .* --allow-sequential"):
        adapted(merged, bat)
    one = adapted(merged, bat, sequential=True)
    other = adapted(adapted(open_checkpoint(base), bat), first, alpha=4)
    assert np.abs(one[f"{KEY}.weight"] - other[f"{KEY}.weight"]).max() > 0.05


def test_what_cannot_be_taken_out_says_why(tmp_path, base, caplog):
    blocks = KINDS["bat by columns"]()
    blocks[f"{KEY}.disha"][2] = -np.eye(8)
    lost = file(tmp_path / "lost.pth", blocks)
    with pytest.raises(BadCheckpoint, match="condition number inf: what was there before cannot be computed"):
        adapted(open_checkpoint(base), lost, undo=True)
    whole = file(tmp_path / "whole.pth", lora() | {"blocks.0.ln1.weight": numbers(32)})
    with pytest.raises(BadCheckpoint, match="'blocks.0.ln1.weight' was trained whole: what was there before is gone"):
        adapted(open_checkpoint(base), whole, alpha=1, undo=True)
    dora = lora() | {f"{KEY}.lora_magnitude_vector": numbers(32), f"{DOWN}.lora_magnitude_vector": numbers(32)}
    with pytest.raises(BadCheckpoint, match="DoRA forgets the length"):
        adapted(open_checkpoint(base), file(tmp_path / "dora.pth", dora), alpha=1, undo=True)
    adapted(open_checkpoint(base), file(tmp_path / "a.pth", lora()), alpha=1, undo=True)
    assert "does not say which adapters it holds" in caplog.text


def test_a_block_of_minus_a_share_shrinks_what_it_finds():
    """W' = (1 − c)·W − c·I, block by block (adaptation.md C.7), and back."""
    weight, c = numbers(16, 24), 0.3
    for by_rows, count in ((True, 2), (False, 3)):
        blocks = np.broadcast_to(-c * np.eye(8, dtype=np.float32), (count, 8, 8))
        changed = rules.affine_blocks(weight, blocks, by_rows=by_rows)
        np.testing.assert_allclose(changed, (1 - c) * weight - c * np.tile(np.eye(8), (2, 3)), atol=1e-6)
        np.testing.assert_allclose(rules.without_affine_blocks(changed, blocks, by_rows=by_rows), weight, atol=1e-6)


def test_how_much_of_a_matrix_each_kind_can_change():
    """Ranks of the update (adaptation.md C.7): r for MiSS, more than r for BAT; with r = inputs MiSS is any change."""
    weight = numbers(16, 24)
    assert np.linalg.matrix_rank(rules.shards(weight, numbers(8, 16)) - weight, tol=1e-4) == 8
    changed = rules.affine_blocks(weight, numbers(2, 8, 8), by_rows=True) - weight
    assert np.linalg.matrix_rank(changed, tol=1e-4) == 16
    target = numbers(16, 24)
    np.testing.assert_allclose(rules.shards(weight, (target - weight).T), target, atol=1e-6)
    whole, tiled = numbers(8, 16), numbers(8, 4)
    np.testing.assert_array_equal(
        rules.shards(weight, np.tile(tiled, (1, 4))), rules.shards(weight, tiled)
    )  # mini is MiSS with repeated columns
    assert np.abs(rules.shards(weight, whole) - weight).max() > 0


# other forms


@pytest.mark.parametrize("kind", ["disha", "bone", "bone_block", "miss_block", "mini"])
def test_miss_is_a_lora_whose_first_factor_is_fixed(tmp_path, base, kind):
    columns = 16 if kind == "mini" else 32
    tensors = {KEY: numbers(5, columns), DOWN: numbers(5, columns)}
    if kind in ("disha", "bone"):
        source = file(tmp_path / "a.pth", {f"{module}.{kind}": array for module, array in tensors.items()})
    else:
        suffix = "bone_block" if kind == "bone_block" else "miss_block"
        source = peft_folder(tmp_path / "a", suffix, tensors, init_weights="mini" if kind == "mini" else True)
    made = convert_adapter(source, tmp_path / "lora", "lora", base=base)
    expected = adapted(open_checkpoint(base), source)
    same(adapted(open_checkpoint(base), made), expected)
    settings = json.loads((made / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 5, 5)
    again = convert_adapter(source, tmp_path / "miss", "miss")
    same(adapted(open_checkpoint(base), again), expected)
    settings = json.loads((again / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["init_weights"]) == ("MISS", "mini" if kind == "mini" else True)


def test_the_oldest_bone_is_turned_round(tmp_path, base):
    source = file(tmp_path / "old.pth", {f"{DOWN}.bone": numbers(32, 5)})
    made = convert_adapter(source, tmp_path / "lora", "lora", base=base)
    same(adapted(open_checkpoint(base), made), adapted(open_checkpoint(base), source))


@pytest.mark.parametrize("to", ["lora", "miss"])
def test_peft_reads_what_was_converted(tmp_path, base, to):
    from rookery.adapt.peft import load_adapter, merge

    source = file(tmp_path / "a.pth", {f"blocks.{i}.att.key.disha": numbers(4, 32) for i in range(3)})
    made = convert_adapter(source, tmp_path / "made", to, base=base)
    model = tiny()
    load_adapter(model, made)
    merge(model)
    expected = adapted(open_checkpoint(base), source)
    torch.testing.assert_close(model.blocks[1].att.key.weight.detach(), torch.tensor(expected[f"{KEY}.weight"]))


def test_what_has_no_other_form_is_refused(tmp_path, base):
    bat = file(tmp_path / "bat.pth", KINDS["bat by columns"]())
    with pytest.raises(BadCheckpoint, match="BAT multiplies the weights, which no LoRA does"):
        convert_adapter(bat, tmp_path / "x", "lora", base=base)
    with pytest.raises(BadCheckpoint, match="along the other axis than peft's"):
        convert_adapter(bat, tmp_path / "x", "miss")
    with pytest.raises(BadCheckpoint, match="are no MiSS, Bone or DiSHA, which alone convert"):
        convert_adapter(file(tmp_path / "l.pth", lora()), tmp_path / "x", "miss")
    miss = file(tmp_path / "m.pth", {f"{KEY}.disha": numbers(4, 32)})
    with pytest.raises(ValueError, match="name the model that the adapter is for with --base"):
        convert_adapter(miss, tmp_path / "x", "lora")
    deep = file(tmp_path / "d.pth", {"blocks.9.att.key.disha": numbers(4, 32)})
    with pytest.raises(BadCheckpoint, match="has no blocks.9.att.key.weight"):
        convert_adapter(deep, tmp_path / "x", "lora", base=base)
    wide = file(tmp_path / "w.pth", {f"{KEY}.disha": numbers(4, 48)})
    with pytest.raises(BadCheckpoint, match="shares no rows"):
        convert_adapter(wide, tmp_path / "x", "lora", base=base)
    whole = file(tmp_path / "t.pth", {f"{KEY}.disha": numbers(4, 32), "blocks.0.ln1.weight": numbers(32)})
    with pytest.raises(BadCheckpoint, match="trained whole, which no other form"):
        convert_adapter(whole, tmp_path / "x", "miss")
    with pytest.raises(UnknownName, match="no kind of adapter named 'dora'"):
        convert_adapter(miss, tmp_path / "x", "dora")
    assert not (tmp_path / "x").exists()


def test_the_command_line_does_all_of_it(tmp_path, base, capsys):
    miss, merged = file(tmp_path / "m.pth", {f"{KEY}.disha": numbers(4, 32)}), str(tmp_path / "merged.safetensors")
    assert main(["convert", str(miss), str(tmp_path / "lora"), "--to", "lora", "--base", str(base)]) == 0
    assert main(["merge", str(base), str(tmp_path / "lora"), "-o", merged]) == 0
    assert main(["merge", merged, str(tmp_path / "lora"), "-o", str(tmp_path / "x.pth")]) == 1
    assert "holds this adapter already" in capsys.readouterr().err
    back = str(tmp_path / "back.safetensors")
    assert main(["merge", merged, str(tmp_path / "lora"), "--undo", "-o", back]) == 0
    same(open_checkpoint(back), open_checkpoint(base))
