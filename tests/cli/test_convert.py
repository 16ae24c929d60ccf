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
