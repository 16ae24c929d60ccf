import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.language import randomised
from support.training import assert_resumes_exactly

from rookery.adapt.peft import load_adapter
from rookery.adapt.state_tuning import load_start
from rookery.checkpoints.adapter import adapted
from rookery.checkpoints.checkpoint import open_checkpoint
from rookery.data.build import build
from rookery.engine.llm import LLM
from rookery.models import load, save_model
from rookery.recipes import RECIPES, recipe
from rookery.train.config import FinetuneConfig, overlay
from rookery.train.loop import TrainingFailed, prepare, train
from rookery.train.tasks.finetune import FinetuneTask

pytest.importorskip("peft")
CHATS = [{"prompt": f"{a}+{b}?", "response": str(a + b)} for a in range(4) for b in range(4)]
PAIRS = [{"prompt": f"{a}?", "chosen": "yes", "rejected": "no"} for a in range(10)]


@pytest.fixture
def config(tmp_path):
    """A few quick steps of LoRA on a small random model over bytes."""
    save_model(randomised("rwkv7-test", dtype=torch.float32, vocab_size=256), tmp_path / "base.safetensors")
    for name, records in (("chats", CHATS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return overlay(
        recipe("lora"),
        {
            "base": str(tmp_path / "base.safetensors"),
            "data": {"path": str(tmp_path / "chats.jsonl"), "sequence_length": 48, "validation_share": 0.1},
            "optim": {"lr": 1e-2, "final_lr": 1e-3},
            "adapt": {"rank": 4},
            "out": str(tmp_path / "run"),
            "steps": 6,
            "save_every": 2,
            "validate_every": 3,
        },
    )


def rows(config):
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def logits_of(model, state=None):
    with torch.no_grad():
        return model(torch.arange(1, 9)[None], state)[0]


@pytest.mark.parametrize("method", ["lora", "pissa", "miss", "bat"])
def test_adapters_learn_and_what_is_written_does_the_same(config, method):
    config = overlay(config, {"adapt": {"method": method}, "merge": True, "steps": 12})
    base = load(config.base)
    before = logits_of(base)
    train(config)
    losses = [row["loss"] for row in rows(config)]
    assert losses[-1] < losses[0]
    merged = logits_of(load(Path(config.out) / "model.safetensors"))
    assert (merged - before).abs().max() > 1e-3
    assert load(Path(config.out) / "model.safetensors").fingerprint() != base.fingerprint()
    load_adapter(base, Path(config.out) / "adapter")
    torch.testing.assert_close(logits_of(base), merged, rtol=1e-3, atol=1e-3)
    by_verb = adapted(open_checkpoint(config.base), Path(config.out) / "adapter")
    key = "blocks.1.att.key.weight"
    ours = load(Path(config.out) / "model.safetensors").get_parameter(key)
    torch.testing.assert_close(torch.from_numpy(by_verb[key]), ours, rtol=1e-3, atol=1e-4)
    assert (Path(config.out) / "adapter.pth").exists() == (method != "bat")


def test_perspectives_are_added_to_a_model_and_nothing_else_is_trained(config):
    config = overlay(config, {"adapt": {"method": "perspectives", "perspectives": 2}, "steps": 3})
    train(config)
    base, learned = load(config.base), load(Path(config.out) / "model.safetensors")
    assert (learned.family, learned.config.perspectives) == ("temporal-perspectives", 2)
    assert min(learned.divergence()) > 0
    assert torch.equal(learned.blocks[0].att.key.weight, base.blocks[0].att.key.weight)
    assert LLM(Path(config.out) / "model.safetensors").generate("1+2?", max_tokens=3) is not None
    with pytest.raises(ValueError, match=r"adapt\.perspectives must be at least 1, got 0"):
        overlay(config, {"adapt": {"perspectives": 0}})
    with pytest.raises(ValueError, match="perspectives goes with neither recompute nor compile"):
        FinetuneTask(overlay(config, {"recompute": True}))


def test_all_weights_may_be_trained(config):
    train(overlay(config, {"adapt": {"method": "full"}}))
    trained, base = load(Path(config.out) / "model.safetensors"), load(config.base)
    assert not torch.equal(trained.emb.weight, base.emb.weight)
    assert not list(Path(config.out).glob("adapter*"))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_tuned_state_is_written_where_sessions_start_from(config, ending):
    config = overlay(config, {"adapt": {"method": "state"}, "optim": {"lr": 0.1}})
    train(config)
    path = Path(config.out) / f"state.{ending}"
    model = load(config.base)
    tuned = logits_of(model, load_start(path, model)(1))
    assert (tuned - logits_of(model)).abs().max() > 1e-3
    session = LLM(config.base).session(path)
    session.feed(list(range(1, 9)))
    assert next(iter(session.stream_tokens(1, temperature=0, ignore_eos=True))) == int(tuned[0, -1].argmax())


@pytest.mark.parametrize("learn", ["dpo", "orpo"])
def test_preferences_are_learned(config, learn, tmp_path):
    pairs = {"path": str(tmp_path / "pairs.jsonl")}
    config = overlay(config, {"learn": learn, "data": pairs, "steps": 15, "batch_size": 2})
    train(config)
    assert rows(config)[-1]["margin"] > rows(config)[0]["margin"]
    assert {"validation_loss", "validation_accuracy", "validation_margin"} <= rows(config)[-1].keys()
    if learn == "dpo":
        assert rows(config)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert (Path(config.out) / "reference.safetensors").exists()


KERNEL = {"features": 32, "decorrelate": True}


@pytest.mark.parametrize(
    ("method", "dtype", "more"),
    [("lora", "float32", {}), ("pissa", "bfloat16", {}), ("state", "bfloat16", {}), ("state", "bfloat16", KERNEL)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, method, dtype, more):
    config = overlay(config, {"adapt": {"method": method, **more}, "dtype": dtype})
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)

    class Crash(Exception):
        pass

    original = prepare(config).task.__class__.batch

    def crashing(self, step):
        if step == 4:
            raise Crash
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rookery.train.tasks.finetune.FinetuneTask.batch", crashing)
        with pytest.raises(Crash):
            train(config)
    train(config)
    assert [row["loss"] for row in rows(config)] == [row["loss"] for row in rows(whole)]


@pytest.mark.parametrize("learn", ["sft", "dpo", "orpo"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_step_add_up_to_it(config, learn, parts, tmp_path):
    data = {} if learn == "sft" else {"path": str(tmp_path / "pairs.jsonl")}
    run = prepare(overlay(config, {"learn": learn, "data": data}))
    (out := Path(config.out)).mkdir(exist_ok=True)
    run.task.ready(out)
    with torch.no_grad():
        for parameter in run.task.trained.parameters():
            parameter.add_(0.01)
    batch = run.task.batch(1)
    pieces = run.task.split(batch, parts)
    assert len(pieces) == parts
    assert sum(weight for _, weight in pieces) == pytest.approx(1)
    total = sum(weight * run.task.loss(piece)["loss"].detach() for piece, weight in pieces)
    torch.testing.assert_close(total, run.task.loss(batch)["loss"].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learn", ["dpo", "orpo"])
def test_a_part_for_which_no_pair_is_left_weighs_nothing(config, learn, tmp_path):
    task = prepare(overlay(config, {"learn": learn, "data": {"path": str(tmp_path / "pairs.jsonl")}})).task
    batch = task.batch(1)
    weights = [weight for _, weight in task.split(batch, len(batch.indices) + 2)]
    assert weights[-2:] == [0, 0]
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("method", ["lora", "state"])
def test_documents_in_pieces_take_the_same_steps_where_gradients_go_through(config, tmp_path, method):
    config = overlay(config, {"adapt": {"method": method}, "optim": {"eps": 1e-4}, "steps": 3})
    train(config)
    pieces = overlay(config, {"piece_length": 8, "piece_gradient": "through", "out": str(tmp_path / "pieces")})
    train(pieces)
    near = {"abs": 1e-4}
    assert [row["loss"] for row in rows(pieces)] == pytest.approx([row["loss"] for row in rows(config)], **near)
    train(overlay(pieces, {"piece_gradient": "cut", "out": str(tmp_path / "cut")}))
    with pytest.raises(ValueError, match="preferences are learned from whole answers"):
        FinetuneTask(overlay(pieces, {"learn": "dpo"}))


def test_an_adapter_is_trained_further(config, tmp_path):
    train(config)
    again = overlay(config, {"adapt": {"start": str(Path(config.out) / "adapter")}, "out": str(tmp_path / "again")})
    begun = prepare(again).task
    learned = load(config.base)
    load_adapter(learned, Path(config.out) / "adapter")
    assert torch.equal(logits_of(begun.model.eval()), logits_of(learned.eval()))
    train(again)
    assert rows(again)[-1]["validation_loss"] < rows(config)[0]["loss"]
    with pytest.raises(ValueError, match="does not fit this rwkv7 model"):
        prepare(overlay(again, {"adapt": {"rank": 8}}))
    with pytest.raises(ValueError, match="holds no adapter"):
        prepare(overlay(again, {"adapt": {"start": str(tmp_path)}}))
    with pytest.raises(ValueError, match="LoRA of twice the rank"):
        overlay(again, {"adapt": {"method": "pissa"}})
    with pytest.raises(ValueError, match=r"adapt\.start is for adapters and states, not for full"):
        overlay(again, {"adapt": {"method": "full"}})


def test_dropout_is_a_function_of_the_step(config):
    config = overlay(config, {"adapt": {"dropout": 0.5}, "accumulate": 2, "merge": True})
    whole = dataclasses.replace(config, out=config.out + "-whole")
    train(whole)
    assert_resumes_exactly(whole, config, FinetuneTask, step=3)


def test_a_text_is_learned_in_pieces(config, tmp_path):
    (tmp_path / "book.txt").write_text("To be, or not to be: that is the question. " * 9)
    config = overlay(config, {"data": {"path": str(tmp_path / "book.txt"), "validation_share": 0.0}})
    run = prepare(config)
    total = sum(len(document.tokens) - 1 for document in run.task.documents)
    assert total == len("To be, or not to be: that is the question. " * 9)
    assert run.task.validate() == {}


def test_files_are_mixed_by_weights_and_may_hold_tokens(config, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(["abc", "defg"] * 5))
    build([str(tmp_path / "texts.json")], str(tmp_path / "tokens"), "bytes")
    data = {"path": f"{tmp_path / 'chats.jsonl'},{tmp_path / 'tokens.bin'}", "weights": "0.25,0.75"}
    task = prepare(overlay(config, {"data": data | {"sequence_length": 128}})).task
    assert len(task.held_out) == 3  # a tenth of each file
    texts = [document for document in task.documents if document.tokens[0] in b"ad"]
    assert bytes(texts[1].tokens.tolist()) == b"defg\0"
    assert texts[1].learned.tolist() == [False, True, True, True, True]
    drawn = np.concatenate([task.packs.indices(step) for step in range(1, 400)])
    assert (drawn >= 14).mean() == pytest.approx(0.75, abs=0.05)
    with pytest.raises(ValueError, match="3 numbers for 2 paths"):
        FinetuneTask(overlay(config, {"data": data | {"weights": "1,1,1"}}))
    build([str(tmp_path / "texts.json")], str(tmp_path / "world"), "world")
    with pytest.raises(ValueError, match=r"holds the token \d+, the tokenizer has 256"):
        FinetuneTask(overlay(config, {"data": {"path": str(tmp_path / "world")}}))


def test_long_conversations_are_reported(config, caplog):
    with caplog.at_level("WARNING", "rookery"):
        run = prepare(overlay(config, {"data": {"sequence_length": 22}}))
    assert "documents are longer than data.sequence_length, 22 tokens" in caplog.text
    assert run.task.documents
    with pytest.raises(ValueError, match="nothing is left to learn from"):
        prepare(overlay(config, {"data": {"sequence_length": 8}}))


def test_every_recipe_says_what_it_is_for():
    assert all(make.__doc__ for make in RECIPES.values())
    assert sum(isinstance(make(), FinetuneConfig) for make in RECIPES.values()) == 13


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": ""}, "no model to fine-tune: give base"),
        ({"data": {"path": ""}}, "nothing to learn from: give data.path"),
        ({"initial": "x.pth"}, "a fine-tuning run starts from `base`"),
        ({"learn": "ppo"}, "learn must be one of sft, dpo, orpo; got 'ppo'"),
        ({"mask": "some"}, "mask must be one of assistant, qa, none"),
    ],
)
def test_wrong_settings_are_explained(config, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(overlay(config, settings))


def test_a_folder_with_another_run_is_refused(config):
    train(dataclasses.replace(config, steps=2))
    with pytest.raises(TrainingFailed, match=r"other settings \(template\)"):
        train(dataclasses.replace(config, template="world"))


def test_the_embedded_model_has_a_name(config):
    run = prepare(overlay(config, {"base": "embedded"}))
    assert run.task.model.config.vocab_size == 2047
    assert run.task.tokenizer.vocab_size == 2047


def test_settings_of_a_state_are_refused_elsewhere(config):
    with pytest.raises(ValueError, match=r"adapt\.features and adapt\.decorrelate are for the method state, not lora"):
        overlay(config, {"adapt": {"features": 32}})
    with pytest.raises(ValueError, match=r"adapt\.features must be 0 or more"):
        overlay(config, {"adapt": {"method": "state", "features": -1}})
