from rookery.cli.main import main


def test_a_new_key_is_printed_with_its_line(cli):
    code, out, err = cli("serve", "--new-key", "anna")
    key, line = out.splitlines()
    assert code == 0
    assert key.startswith("rk-")
    assert line.startswith("anna:")
    assert "shown only now" in err


def test_wrong_models_and_keys_are_one_line(cli, tmp_path):
    assert cli("serve", tmp_path / "nothing.pth")[0] == 1
    (tmp_path / "keys").write_text("x")
    code, _, err = cli("serve", "--keys", tmp_path / "keys")
    assert code == 1
    assert "expected name:sha256" in err
    assert main(["serve", "--port", "x"]) == 2
