"""rookery distill: a transformer becomes an RWKV that generates, stage by stage."""

import pytest
from support.teachers import folder, teacher

from rookery.cli.main import main

SMALL = (
    "convert.settings.decay_rank=8 convert.settings.rate_rank=8 convert.settings.value_rank=8 "
    "convert.settings.gate_rank=8 steps=2 batch_size=2 dtype=float32 recompute=False threads=1 data.sequence_length=16 "
    "data.validation_share=0.2 save_every=1 validate_every=0"
)


@pytest.fixture
def command(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One day a small bird saw a big dog and flew up into the tree. " * 40)
    settings = [f"teacher={folder(tmp_path / 't', teacher(vocab_size=256))}", f"data.path={text}", f"out={tmp_path}/o"]
    return ["distill", "radlads", *(word for setting in [*settings, *SMALL.split()] for word in ("--set", setting))]


def test_stages_follow_each_other_and_finished_ones_are_not_run_again(command, tmp_path, capsys):
    assert main(command) == 0
    out = tmp_path / "o"
    for stage in ("1-align", "2-distill", "3-text"):
        assert (out / stage / "model.safetensors").is_file()
    assert (out / "2-distill/verification.txt").is_file()
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().err.count("finished") == 3
    model = str(out / "3-text/model.safetensors")
    assert main(["generate", "--model", model, "--max-tokens", "4", "--temperature", "0", "One day"]) == 0
    assert main(["inspect", model]) == 0
    assert "rad-rwkv7" in capsys.readouterr().out


def test_a_dry_run_shows_the_stages(command, capsys, tmp_path):
    assert main([*command, "--dry-run", "--stages", "align,distill"]) == 0
    shown = capsys.readouterr().out
    assert "[align]" in shown
    assert f"student = '{tmp_path}/o/1-align/model.safetensors'" in shown
    assert "[text]" not in shown


def test_a_stage_alone_is_a_recipe(command, tmp_path):
    command[1] = "radlads-align"
    assert main(command) == 0
    assert (tmp_path / "o/model.safetensors").is_file()


def test_a_file_may_hold_the_settings(command, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "arwkv"\nteacher = "x"\n[align]\nsteps = 7\n')
    assert main(["distill", str(file), "--dry-run", "--set", "distill.steps=5"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("steps = 7\n") == shown.count("steps = 5\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["radlads", "--set", "data.path=x"], "no teacher: give a transformer"),
        (["radlads", "--stages", "dream"], "no stage named 'dream'"),
        (["radlads", "--set", "teachr=x"], "no setting named 'teachr'"),
        (["radlds"], "no recipe named 'radlds'"),
    ],
)
def test_what_cannot_be_is_one_sentence(given, message, capsys):
    assert main(["distill", *given]) == 1
    assert message in capsys.readouterr().err
