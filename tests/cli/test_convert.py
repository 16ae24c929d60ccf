import sys

from rookery.checkpoints import open_checkpoint


def test_a_file_is_converted_and_said_so(cli, model_path, tmp_path):
    code, out, err = cli("convert", model_path, tmp_path / "m.gguf", "--dtype", "q8_0")
    assert (code, out) == (0, "")
    assert "m.gguf: gguf" in err
    assert "MB/s" in err or "kB/s" in err
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.tensors["blocks.0.ffn.key.weight"].encoding == "Q8_0"
    code, _, err = cli("convert", model_path, tmp_path / "m.pth")
    assert f"beside it: {tmp_path / 'm.pth.json'}" in err


def test_a_terminal_sees_progress(cli, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = cli("convert", model_path, tmp_path / "m.pth")
    assert "s left" in err


def test_a_converted_file_generates_the_same_text(cli, model_path, tmp_path):
    options = ("--max-tokens", 8, "--temperature", 0, "ab")
    expected = cli("generate", "--model", model_path, *options)[1]
    for name in ("m.gguf", "m.pth", "m.bin", "m"):
        assert cli("convert", model_path, tmp_path / name)[0] == 0
        assert cli("generate", "--model", tmp_path / name, *options)[1] == expected, name


def test_a_refusal_is_one_line(cli, model_path, tmp_path):
    code, _, err = cli("convert", model_path, tmp_path / "m.pth", "--to", "onnx")
    assert (code, err.count("\n")) == (1, 1)
    assert "no target named 'onnx'" in err
    assert not (tmp_path / "m.pth").exists()


def test_what_no_file_tells_may_be_said(cli, tmp_path):
    import torch

    from rookery.models import create_model, load

    torch.save(create_model("rosa-4bit-test").state_dict(), tmp_path / "rosa.pth")
    code, _, err = cli("convert", tmp_path / "rosa.pth", tmp_path / "m.safetensors", "--setting", "bits=4")
    assert code == 0, err
    assert load(tmp_path / "m.safetensors").config.bits == 4
    code, _, err = cli("convert", tmp_path / "rosa.pth", tmp_path / "n.safetensors", "--setting", "bits")
    assert code == 2
    assert "'bits' is no NAME=VALUE" in err
