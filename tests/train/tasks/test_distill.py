"""Stages of a conversion: what moves and what stays, exact resume, what is written and refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.teachers import LOW, RANKS, folder, teacher

from rookery.adapt.convert_transformer import load_teacher
from rookery.engine.llm import LLM
from rookery.errors import UnknownName
from rookery.models import create_model, load, save_model
from rookery.recipes import recipe
from rookery.recipes.distill import OWN_DATA, STAGES
from rookery.train import loop
from rookery.train.config import ConvertConfig, DistillConfig, FinetuneConfig, OptimConfig, overlay
from rookery.train.loop import prepare, train
from rookery.train.optim import groups_of, learning_rate, mixer_rate
from rookery.train.stages import is_finished, staged

TEXT = "".join(f"{i} birds sat on a wall, and then {i + 1} of them flew away over the hill. " for i in range(60))


@pytest.fixture
def config(tmp_path):
    model = teacher(vocab_size=256)
    (tmp_path / "text.txt").write_text(TEXT)
    values = {
        "teacher": str(folder(tmp_path / "teacher", model)),
        "convert": {"settings": LOW},
        "data": {"path": str(tmp_path / "text.txt"), "sequence_length": 24, "validation_share": 0.2},
        "optim": {"lr": 1e-2, "final_lr": 1e-3, "weight_decay": 0.0, "eps": 1e-8, "warmup_steps": 2},
        "out": str(tmp_path / "out"),
        "steps": 4,
        "batch_size": 2,
        "save_every": 2,
        "validate_every": 4,
        "threads": 1,
    }
    return overlay(DistillConfig(), values)


def one_step(run, out):
    """What is logged of the next step."""
    return loop.one_step(run, out)[0]


def weights(folder):
    return load(folder / "model.safetensors").state_dict()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("to", RANKS)
def test_aligning_moves_the_mixers_alone(config, to):
    run = prepare(replace(config, convert=ConvertConfig(to=to, settings=RANKS[to])))
    before = {name: weight.clone() for name, weight in run.task.model.state_dict().items()}
    first = one_step(run, None)["loss"]
    moved = changed(before, run.task.model.state_dict())
    assert moved
    assert all(".self_attn." in name for name in moved)
    for _ in range(3):
        last = one_step(run, None)["loss"]
    assert last < first


@pytest.mark.parametrize("freeze", [False, True])
def test_distilling_moves_all_weights_or_all_but_the_mlps(config, freeze):
    run = prepare(overlay(config, {"stage": "distill", "freeze_mlp": freeze}))
    before = {name: weight.clone() for name, weight in run.task.model.state_dict().items()}
    teachers = {name: weight.clone() for name, weight in run.task.teacher.state_dict().items()}
    for _ in range(2):
        one_step(run, None)
    after = run.task.model.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if freeze and ".mlp." in name
    }
    assert not changed(teachers, run.task.teacher.state_dict())


@pytest.mark.parametrize("stage", ["align", "distill", "top_k"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(config, tmp_path, stage):
    more = {"stage": "align"} if stage == "align" else {"stage": "distill", "top_k": 8 * (stage == "top_k")}
    config = overlay(config, more)
    train(overlay(config, {"out": str(tmp_path / "whole")}))
    cut = overlay(config, {"out": str(tmp_path / "cut")})
    run = prepare(cut)
    run.task.ready(tmp_path / "cut")
    train(cut)
    # as killed after step 2: what came later is not there
    (tmp_path / "cut/checkpoints/step-00000004.pt").unlink()
    (tmp_path / "cut/model.safetensors").unlink()
    assert train(cut).step == 4
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_stage_goes_on_from_the_one_before(config, tmp_path):
    config = overlay(config, {"convert": {"keep_attention": "last:1"}})
    stages = dict(
        staged({"align": config, "distill": overlay(config, {"stage": "distill"})}, {"out": str(tmp_path / "o")})
    )
    assert [stage.out for stage in stages.values()] == [
        str(tmp_path / f"o/{name}") for name in ("1-align", "2-distill")
    ]
    for stage in stages.values():
        assert not is_finished(stage)
        train(stage)
        assert is_finished(stage)
    first = prepare(overlay(stages["distill"], {"out": str(tmp_path / "again")})).task.model.state_dict()
    assert not changed(weights(tmp_path / "o/1-align"), first)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "o/2-distill/metrics.jsonl").read_text().splitlines()]
    fresh = one_step(prepare(overlay(config, {"stage": "distill"})), None)["loss"]
    assert losses[0] < fresh  # alignment was not in vain
    told = json.loads((tmp_path / "o/2-distill/verification.json").read_text())
    assert told["layers"][0]["layer"] == 0
    assert json.loads((tmp_path / "o/2-distill/metrics.jsonl").read_text().splitlines()[-1])["validation_loss"] == (
        pytest.approx(told["kl"], rel=0.2)
    )
    card = (tmp_path / "o/2-distill/README.md").read_text()
    assert f"Distilled from {config.teacher}" in card
    assert LLM(tmp_path / "o/2-distill/model.safetensors").generate("3 birds", max_tokens=3, temperature=0.0)


def test_answers_and_preferences_are_learned_by_converted_models(config, tmp_path):
    train(overlay(config, {"steps": 1}))
    base = f"{config.out}/model.safetensors"
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}\n' * 3)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}\n' * 3)
    for name, path in (("arwkv-sft", chats), ("arwkv-dpo", pairs)):
        small = {"steps": 1, "batch_size": 2, "dtype": "float32", "recompute": False, "threads": 1}
        data = {"path": str(path), "sequence_length": 96}
        train(overlay(recipe(name), {"base": base, "data": data, "out": str(tmp_path / name), **small}))
        assert changed(weights(tmp_path / "out"), weights(tmp_path / name))


def test_kept_logits_need_no_teacher_and_lead_the_same_way(config, tmp_path):
    config = overlay(config, {"stage": "distill", "cache": str(tmp_path / "kept")})
    whole = [one_step(run, None)["loss"] for run in [prepare(config)] for _ in range(4)]
    run = prepare(overlay(config, {"top_k": 250}))
    run.task.ready(tmp_path)
    assert run.task.teacher is None
    assert len(list((tmp_path / "kept").iterdir())) == 4
    kept = [one_step(run, None)["loss"] for _ in range(4)]
    assert kept == pytest.approx(whole, rel=0.02)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    again = prepare(overlay(config, {"top_k": 250, "optim": {"lr": 1e-3}}))  # another run, the same teacher and rows
    again.task.ready(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == files
    assert again.task.validate() == {}


def test_parts_of_a_batch_make_the_same_step(config):
    for more in ({}, {"stage": "distill", "text_weight": 0.5}, {"stage": "distill", "divergence": "adaptive"}):
        losses = [one_step(prepare(overlay(config, {"accumulate": n, **more})), None) for n in (1, 2)]
        for name in ("loss", "grad_norm"):
            assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-3)


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_less_memory_or_numbers_of_16_bits_lead_the_same_way(config, stage):
    config = overlay(config, {"stage": stage, "convert": {"keep_attention": "last:1"}})
    plain, again, rounded = (
        one_step(prepare(overlay(config, more)), None) for more in ({}, {"recompute": True}, {"dtype": "bfloat16"})
    )
    for name in ("loss", "grad_norm"):
        assert again[name] == pytest.approx(plain[name], rel=1e-4)
        assert rounded[name] == pytest.approx(plain[name], rel=0.1)


def test_the_text_can_have_a_say(config):
    row = one_step(prepare(overlay(config, {"stage": "distill", "text_weight": 2.0})), None)
    assert row["loss"] == pytest.approx(row["kl"] + 2 * row["text_loss"], rel=1e-5)


def test_documents_are_distilled_packed(config):
    more = {"data": {"order": "documents"}, "stage": "distill"}
    run = prepare(overlay(config, more))
    assert run.task.batch(1).cu_seqlens.shape[0] >= 2
    assert one_step(run, None)["loss"] > 0
    assert one_step(prepare(overlay(config, {**more, "stage": "align"})), None)["loss"] > 0


def test_first_values_can_be_cut_from_the_gradient(config):
    norms = [one_step(prepare(overlay(config, {"detach_v_first": cut})), None)["grad_norm"] for cut in (False, True)]
    assert norms[0] >= norms[1]


def test_a_larger_teacher_of_the_same_vocabulary_is_welcome(config, tmp_path):
    train(overlay(config, {"steps": 1}))
    wide = folder(tmp_path / "wide", teacher(vocab_size=260, hidden_size=64))
    settings = {"student": f"{config.out}/model.safetensors", "teacher": str(wide), "stage": "distill"}
    settings["data"] = {"tokenizer": "bytes"}
    assert one_step(prepare(overlay(config, settings)), None)["loss"] > 0
    with pytest.raises(ValueError, match="aligned with the model that the student was made from"):
        one_step(prepare(overlay(config, {**settings, "stage": "align"})), None)


def test_other_vocabularies_are_refused(config, tmp_path):
    train(overlay(config, {"steps": 1}))
    small = folder(tmp_path / "small", teacher(vocab_size=65536))
    student = f"{config.out}/model.safetensors"
    with pytest.raises(ValueError, match=r"the student knows 256 tokens \(bytes\), the teacher 65536 \(world\)"):
        prepare(overlay(config, {"student": student, "teacher": str(small)}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": ""}, "no teacher: give a transformer"),
        ({"data": {"path": ""}}, "no text to distil on"),
        ({"piece_length": 8}, "reads whole rows"),
        ({"initial": "m.pth"}, "starts from `teacher` or `student`"),
        ({"top_k": 3}, "for the forward divergence only"),
        ({"top_k": -1}, "must be 0 or more"),
        ({"stage": "distill", "top_k": 256}, "top_k=256 must be less than the 256 tokens"),
        ({"stage": "dream"}, "stage must be one of align, distill"),
        ({"convert": {"to": "rwkv9"}}, "to must be one of arwkv, rad-rwkv6, rad-rwkv7"),
        ({"convert": {"keep_attention": "last:2"}}, "nothing to convert"),
    ],
)
def test_what_cannot_be_is_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(overlay(config, settings))


def test_a_student_is_a_converted_transformer(config, tmp_path):
    save_model(create_model("rwkv7-test", vocab_size=256), tmp_path / "seven.safetensors")
    with pytest.raises(ValueError, match="is of family rwkv7, not a converted transformer"):
        prepare(overlay(config, {"student": str(tmp_path / "seven.safetensors")}))
    assert load_teacher(config.teacher).config.vocab_size == 256


# stages and recipes


def test_settings_reach_the_stages_that_know_them():
    values = {"teacher": "T", "steps": 9, "data": {"path": "x"}, "distill": {"steps": 3}, "out": "o"}
    found = dict(staged(STAGES["arwkv"], values, own_data=OWN_DATA))
    assert list(found) == ["align", "distill"]
    assert (found["align"].steps, found["distill"].steps) == (9, 3)
    assert (found["align"].student, found["distill"].student) == ("", "o/1-align/model.safetensors")
    found = dict(staged(STAGES["arwkv"], {**values, "sft": {"data": {"path": "chats"}}}, own_data=OWN_DATA))
    assert isinstance(found["sft"], FinetuneConfig)
    assert (found["sft"].base, found["sft"].data.path) == ("o/2-distill/model.safetensors", "chats")
    found = staged(STAGES["radlads"], values, chosen=["text"])
    assert [(name, stage.out, stage.base) for name, stage in found] == [("text", "o/3-text", "")]


def test_unknown_stages_and_settings_are_named():
    with pytest.raises(UnknownName, match="no stage named 'algn'. Did you mean 'align'"):
        staged(STAGES["arwkv"], {}, chosen=["algn"])
    with pytest.raises(UnknownName, match="no setting named 'teachr'. Did you mean 'teacher'"):
        staged(STAGES["arwkv"], {"teachr": "x"})


def test_a_quarter_of_a_cosine_stays_high_for_longer():
    optim = OptimConfig(lr=1.0, final_lr=0.1, schedule="quarter-cosine", warmup_steps=0)
    rates = [learning_rate(optim, step, 1000) for step in (0, 500, 1000)]
    assert rates == pytest.approx([1.0, 0.1 + 0.9 * 0.5**0.5, 0.1])


def test_two_processes_distil_as_one_does(config, tmp_path):
    settings = [f"teacher={config.teacher}", f"data.path={config.data.path}", "data.sequence_length=24"]
    settings += [
        "data.validation_share=0.2",
        "batch_size=4",
        "steps=3",
        "save_every=2",
        "validate_every=3",
        "device=cpu",
    ]
    settings += ["dtype=float32", "optim.lr=1e-2", "optim.warmup_steps=2", "threads=1"]
    settings += [f"convert.settings={json.dumps(RANKS['rad-rwkv7'])}", "distill.top_k=20"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rookery.cli.main"]
    ways = {"one": ["-m", "rookery.cli.main"], "two": torchrun}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for name, way in ways.items():
        words = [word for setting in [*settings, f"out={tmp_path / name}"] for word in ("--set", setting)]
        stages = ["distill", "radlads", "--stages", "align,distill", *words]
        done = subprocess.run([sys.executable, *way, *stages], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("1-align", "2-distill"):
        texts = [(tmp_path / name / stage / "metrics.jsonl").read_text() for name in ways]
        found = [[json.loads(line) for line in text.splitlines()] for text in texts]
        assert len(found[0]) == 3
        for one, two in zip(*found):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            for name in one.keys() & {"validation_loss"}:
                assert two[name] == pytest.approx(one[name], rel=1e-4)
        one, two = (weights(tmp_path / name / stage) for name in ways)
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert len([*(tmp_path / "two" / "2-distill" / "teacher").iterdir()]) == 6  # each process kept its part of a step


def test_mixers_may_have_a_rate_of_their_own(config):
    rates = OptimConfig(lr=1e-5, final_lr=1e-5, schedule="linear", warmup_steps=0, mixer_lr=1e-4)
    assert [mixer_rate(rates, step, 1000) for step in (1, 833)] == pytest.approx([1e-4] * 2)
    assert mixer_rate(rates, 854, 1000) == pytest.approx(1e-5 + 0.7071 * 9e-5, rel=1e-4)
    assert [mixer_rate(rates, step, 1000) for step in (875, 1000)] == pytest.approx([1e-5] * 2)
    run = prepare(replace(config, stage="distill", optim=replace(rates, lr=0.0, final_lr=0.0)))
    before = {name: weight.clone() for name, weight in run.task.model.state_dict().items()}
    one_step(run, None)
    moved = changed(before, run.task.model.state_dict())
    assert moved
    assert all(".self_attn." in name for name in moved)
    groups = groups_of(run.task.model, config.optim)
    assert not any("is_mixer" in group for group in groups)
    with pytest.raises(ValueError, match="mixer_lr is for converted transformers"):
        groups_of(create_model("rwkv7-test"), rates)
    with pytest.raises(ValueError, match="must rise within 0 and 1"):
        OptimConfig(mixer_hold=0.9)


def test_the_last_stage_may_change_decays_and_shifts_alone(config, tmp_path):
    save_model(create_model("rad-rwkv7-test", vocab_size=256), tmp_path / "student.safetensors")
    text = recipe("radlads-text-3a")
    data = replace(text.data, path=config.data.path, sequence_length=24, tokenizer="bytes")
    given = {"batch_size": 2, "steps": 1, "threads": 1, "dtype": "float32", "out": str(tmp_path / "text")}
    run = prepare(replace(text, base=str(tmp_path / "student.safetensors"), data=data, **given))
    before = {name: weight.clone() for name, weight in run.task.model.state_dict().items()}
    one_step(run, None)
    moved = changed(before, run.task.model.state_dict())
    assert {name.rpartition(".")[2] for name in moved} <= {"w0", "w1", "w2"}
    assert moved
    with pytest.raises(ValueError, match="adapt.method must be \"full\", not 'lora'"):
        replace(recipe("lora"), train_only="*.w0")
    assert [name for name, _ in staged(STAGES["radlads-2a"], {"teacher": "t"})] == ["align", "distill"]
