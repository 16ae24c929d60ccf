"""Scripts for the `rwkv` package run here: same calls, same layouts of states, same numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.compat.rwkv import PIPELINE, PIPELINE_ARGS, RWKV, explain
from rookery.engine.llm import LLM
from rookery.errors import BadCheckpoint, BadState, UnknownName

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
FAMILIES = ["rwkv4-test", "rwkv5-test", "rwkv6-test", "rwkv7-test", "rwkv7a-test"]
GREEDY = PIPELINE_ARGS(temperature=0, alpha_frequency=0, alpha_presence=0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        torch.save(randomised(name, dtype=torch.float32, vocab_size=256).state_dict(), folder / f"{name}.pth")
    return {name: str(folder / name) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_model_however_the_text_is_cut(paths, name):
    model = RWKV(paths[name], "cpu fp32")
    expected = LLM(paths[name] + ".pth").logits(TOKENS)
    every, _ = model.forward(TOKENS, None, full_output=True)
    assert isinstance(every, torch.Tensor)
    np.testing.assert_allclose(every, expected, rtol=1e-3, atol=1e-4)
    last, state = model.forward(TOKENS[:3], None)
    assert last.shape == (256,)
    kept = [part.clone() for part in state]
    for token in TOKENS[3:]:
        before = state
        last, state = model.forward([token], state)
    np.testing.assert_allclose(last, expected[-1], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.forward(TOKENS[:3], None)[1]))
    again, _ = model(TOKENS[-1], before)
    np.testing.assert_allclose(again, last, rtol=1e-5, atol=1e-5)


def test_state_lists_have_the_layouts_of_the_package(paths):
    layouts = {
        "rwkv4-test": [(32,)] * 5,
        "rwkv6-test": [(32,), (2, 16, 16), (32,)],
        "rwkv7-test": [(32,), (2, 16, 16), (32,)],
    }
    for name, layout in layouts.items():
        model = RWKV(paths[name], "cpu fp32")
        assert [tuple(part.shape) for part in model.generate_zero_state()] == layout * model.args.n_layer
    reference = randomised("rwkv6-test", dtype=torch.float32, vocab_size=256)
    layer = reference(torch.tensor([TOKENS]))[1].layers[1]
    state = RWKV(paths["rwkv6-test"], "cpu fp32").forward(TOKENS, None)[1]
    torch.testing.assert_close(state[4], layer.wkv[0].mT, rtol=1e-4, atol=1e-4)  # [key, value] in that package
    torch.testing.assert_close(state[5], layer.ffn_shift[0], rtol=1e-4, atol=1e-4)
    four = RWKV(paths["rwkv4-test"], "cpu fp32").generate_zero_state()
    assert [float(part.max()) for part in four[1:4]] == [0, 0, pytest.approx(-1e30, rel=1e9)]


def test_a_changed_state_changes_what_comes(paths):
    model = RWKV(paths["rwkv7-test"], "cpu fp32")
    _, state = model.forward(TOKENS, None)
    plain, _ = model.forward([7], state)
    state[1] = 2 * state[1]
    assert not torch.equal(model.forward([7], state)[0], plain)


def test_the_sizes_and_the_version_can_be_asked_for(paths):
    model = RWKV(paths["rwkv7-test"], "cpu fp32")
    assert (model.args.n_layer, model.args.n_embd, model.args.head_size, model.args.vocab_size) == (3, 32, 16, 256)
    assert (model.args.strategy_string, model.version, model.eval()) == ("cpu fp32", 7.0, model)
    assert [RWKV(paths[name], "cpu fp32").version for name in FAMILIES[:3]] == [4, 5.2, 6.0]


def test_the_pipeline_generates_what_the_engine_does(paths):
    pipeline = PIPELINE(RWKV(paths["rwkv7-test"], "cpu fp32"), "bytes")
    pieces = []
    text = pipeline.generate("hello", 30, GREEDY, pieces.append)
    session = LLM(paths["rwkv7-test"] + ".pth").session()
    session.feed("hello")
    expected = "".join(session.stream(30, temperature=0, ignore_eos=True))
    assert text == "".join(pieces) == expected
    assert (
        pipeline.generate("hello", 30, PIPELINE_ARGS(temperature=0, alpha_frequency=0, alpha_presence=0, chunk_len=2))
        == text
    )
    _, state = pipeline.model.forward(pipeline.encode("hell"), None)
    assert pipeline.generate("o", 30, GREEDY, state=state) == text


def test_numpys_seed_repeats_a_text(paths):
    pipeline = PIPELINE(RWKV(paths["rwkv7-test"], "cpu fp32"), "bytes")
    texts = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        texts.append(pipeline.generate("hello", 40, PIPELINE_ARGS(top_p=0.95)))
    assert texts[0] == texts[1] != texts[2]


def test_stopping_and_banned_tokens_are_heeded(paths):
    pipeline = PIPELINE(RWKV(paths["rwkv7-test"], "cpu fp32"), "bytes")
    first = int(pipeline.model.forward(pipeline.encode("hello"), None)[0].argmax())
    args = PIPELINE_ARGS(temperature=0, alpha_frequency=0, alpha_presence=0, token_stop=[first])
    assert pipeline.generate("hello", 12, args) == ""
    args = PIPELINE_ARGS(temperature=0, alpha_frequency=0, alpha_presence=0, token_ban=[first])
    assert first not in pipeline.encode(pipeline.generate("hello", 12, args))
    assert pipeline.sample_logits(torch.tensor([0.0, 9.0, 1.0]), temperature=0) == 1
    assert pipeline.sample_logits(np.array([0.0, 90.0, 1.0]), top_p=2) == 1
    with pytest.raises(ValueError, match="ctx holds no token"):
        pipeline.generate("")


def test_text_is_encoded_as_the_name_says(paths):
    pipeline = PIPELINE(RWKV(paths["rwkv7-test"], "cpu fp32"), "rwkv_vocab_v20230424")
    assert pipeline.encode("Hello, world!") == [33155, 45, 40213, 34]
    assert pipeline.decode([33155, 45]) == "Hello,"
    assert pipeline.refine_context("  a \r\n\n  b\u3000\n") == "\na\nb"
    assert PIPELINE(pipeline.model, "20B_tokenizer.json").encode("\n\n") == [535]


@pytest.mark.parametrize(
    ("strategy", "device", "dtype", "remark"),
    [
        ("cpu fp32", "cpu", "float32", None),
        ("cuda:1 bf16", "cuda:1", "bfloat16", None),
        ("cuda fp16 *10 -> cpu bf16", "cuda", "float16", "all layers go to cuda as fp16"),
        ("cuda fp16i8 *10+", "cuda", "float16", "weights stay fp16 on cuda"),
    ],
)
def test_strategies_are_explained(strategy, device, dtype, remark):
    plan = explain(strategy)
    assert (plan.device, plan.dtype) == (device, dtype)
    assert any(remark in text for text in plan.remarks) if remark else not plan.remarks


def test_the_number_type_of_the_strategy_is_used(paths):
    full, half = (RWKV(paths["rwkv7-test"], f"cpu {kind}").forward(TOKENS, None)[0] for kind in ("fp32", "bf16"))
    assert 0 < (full - half).abs().max() < 0.5


def test_small_weights_are_near_the_full_ones(tmp_path):
    model = randomised("rwkv7-test", dtype=torch.float32, vocab_size=256, hidden_size=64, intermediate_size=256)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    assert explain("cpu fp32i8").quantize == "int8"
    assert explain("cpu fp32i3").quantize == "int4"
    full, packed = (RWKV(str(tmp_path / "m"), f"cpu fp32{kind}").forward(TOKENS, None)[0] for kind in ("", "i8"))
    assert 0 < (full - packed).abs().max() < 0.1 * full.abs().max()


def test_what_cannot_be_is_refused(paths, tmp_path):
    for strategy in ("cpu", "cpu fp8", "cpu fp32 -> ", "tpu fp32"):
        with pytest.raises(ValueError, match=r"is no strategy; they look like 'cpu fp32'"):
            RWKV(paths["rwkv7-test"], strategy)
    with pytest.raises(ValueError, match="asks for DirectML, which is not supported"):
        RWKV(paths["rwkv7-test"], "dml fp32")
    with pytest.raises(ValueError, match="files need no conversion for a strategy here"):
        RWKV(paths["rwkv7-test"], "cpu fp32", convert_and_save_and_exit="x")
    with pytest.raises(BadCheckpoint, match="there is no file"):
        RWKV(str(tmp_path / "absent"), "cpu fp32")
    model = RWKV(paths["rwkv7-test"], "cpu fp32")
    with pytest.raises(BadState, match="the state list has 8 tensors, 3 layers of rwkv7 have 9"):
        model.forward([1], model.generate_zero_state()[1:])
    with pytest.raises(BadState, match=r"layers.0.att_shift has shape \[31\], this model's \[32\]"):
        model.forward([1], [torch.zeros(31), *model.generate_zero_state()[1:]])
    with pytest.raises(ValueError, match="forward needs at least one token"):
        model.forward([], None)
    torch.save(randomised("rwkv7b-test", dtype=torch.float32).state_dict(), tmp_path / "b.pth")
    with pytest.raises(UnknownName, match="has no state list for rwkv7b"):
        RWKV(str(tmp_path / "b.pth"), "cpu fp32")


def test_importing_needs_no_torch():
    code = "import sys, rookery.compat.rwkv; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


THEIRS = """
import sys
import numpy as np
import torch
from rwkv.model import RWKV

path, out, tokens = sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]]
model = RWKV(model=path, strategy="cpu fp32")
every, state = model.forward(tokens, None, full_output=True)
last, after = model.forward([7], state)
np.savez(out, every=every, last=last, **{f"s{i:02}": part for i, part in enumerate(after)})
"""


@pytest.mark.peer
@pytest.mark.parametrize("name", FAMILIES[:4])
def test_the_package_itself_gives_the_same_logits_and_states(paths, tmp_path, name):
    pytest.importorskip("rwkv")
    seven = {"RWKV_V7_ON": "1"} if name.startswith("rwkv7") else {}
    env = {"RWKV_JIT_ON": "0", "OMP_NUM_THREADS": "1", "PATH": "", **seven}
    words = [paths[name], str(tmp_path / "theirs.npz"), *map(str, TOKENS)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", THEIRS, *words], env=env, check=True, capture_output=True)
    theirs = np.load(tmp_path / "theirs.npz")
    model = RWKV(paths[name], "cpu fp32")
    every, state = model.forward(TOKENS, None, full_output=True)
    last, after = model.forward([7], state)
    np.testing.assert_allclose(every, theirs["every"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(last, theirs["last"], rtol=1e-3, atol=1e-4)
    for i, part in enumerate(after):
        np.testing.assert_allclose(part, theirs[f"s{i:02}"], rtol=1e-3, atol=1e-3, err_msg=str(i))
