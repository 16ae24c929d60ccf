import json

from rookery.checkpoints import open_checkpoint


def test_a_file_is_described(cli, model_path):
    code, out, err = cli("inspect", model_path)
    assert (code, err) == (0, "")
    assert "rwkv7" in out
    summary = json.loads(cli("inspect", "--json", model_path)[1])
    assert summary["fingerprint"] == open_checkpoint(model_path).fingerprint()
    assert summary["fingerprint"] in out


def test_what_is_no_model_is_one_line_and_exit_code_1(cli, tmp_path):
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, err = cli("inspect", tmp_path / "m.png")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "no model file of a known format" in err
    code, _, err = cli("inspect", tmp_path / "nothing")
    assert code == 1
    assert "there is no file" in err
