import json

import pytest


def test_the_verb_trains_from_a_model(cli, model_path, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    settings = [f"base={model_path}", f"data.path={tmp_path / 'x.jsonl'}", f"out={tmp_path / 'run'}", "steps=1"]
    settings += ["adapt.rank=2", "data.validation_share=0.0"]
    code, _, err = cli("finetune", "lora", *(word for setting in settings for word in ("--set", setting)))
    assert code == 0, err
    assert (tmp_path / "run/adapter/adapter_config.json").exists()


def test_a_dry_run_shows_every_setting(cli):
    code, out, _ = cli("finetune", "state", "--dry-run")
    assert code == 0
    assert "adapt.method = 'state'" in out
    assert "optim.lr = 1.0" in out


def test_a_missing_base_is_explained(cli, tmp_path):
    code, _, err = cli("finetune", "lora", "--set", f"out={tmp_path / 'run'}")
    assert code == 1
    assert "no model to fine-tune: give base" in err
