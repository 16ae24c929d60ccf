import torch

from rookery.models import load


def test_an_adapter_is_merged_into_a_file(cli, model_path, tmp_path):
    shape = load(model_path).blocks[0].att.key.weight.shape
    factors = {
        f"blocks.0.att.key.lora_{s}": torch.ones(2, shape[1]) if s == "A" else torch.ones(shape[0], 2) for s in "AB"
    }
    torch.save(factors, tmp_path / "lora.pth")
    code, out, err = cli("merge", model_path, tmp_path / "lora.pth", "-o", tmp_path / "m.pth", "--alpha", 3)
    assert (code, out) == (0, "")
    assert "m.pth: pth," in err
    before, after = load(model_path), load(tmp_path / "m.pth")
    torch.testing.assert_close(after.blocks[0].att.key.weight, before.blocks[0].att.key.weight + 3)
    text = ["hello", "--temperature", "0", "-n", "12"]
    merged = cli("generate", "--model", tmp_path / "m.pth", *text)
    adapter = ["--adapter", tmp_path / "lora.pth", "--adapter-alpha", "3"]
    assert cli("generate", "--model", model_path, *adapter, *text) == merged
    code, _, err = cli("merge", model_path, tmp_path / "lora.pth", "-o", tmp_path / "x.pth")
    assert (code, (tmp_path / "x.pth").exists()) == (1, False)
    assert "does not say the alpha" in err
