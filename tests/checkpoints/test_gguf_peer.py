"""llama.cpp (package llama-cpp-python) runs the GGUF files that we write, and we read those of its converter.

The converter is looked for as `convert_hf_to_gguf.py` on PATH; it comes with llama.cpp's source.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.models import load, save_model

pytestmark = pytest.mark.peer
PROMPT = list(b"The Eiffel tower is in the city of")
SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 7}
EXTRA = {
    "rwkv7": {"gate_rank": 32},
    "rwkv6": {"mix_rank": 32, "decay_rank": 64, "gate_rank": 64},
    "arwkv": {"gate": "none"},
    "rad-rwkv6": {"num_attention_heads": 4, "num_key_value_heads": 2, "mix_rank": 32, "decay_rank": 64},
}
BUDGET = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.05, "q8_0": 0.2, "q4_0": 0.2}
"""Root of the mean squared difference of the logits, in units of theirs: llama.cpp also rounds what it multiplies."""


def llama(path):
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), logits_all=True, n_ctx=256, n_threads=1, n_batch=64, verbose=False)


def its_logits(peer, tokens):
    peer.reset()
    peer.eval(tokens)
    return np.array(peer.scores[: len(tokens)])


def saved(tmp_path, family, vocab_size):
    model = randomised(f"{family}-test", dtype=torch.float32, vocab_size=vocab_size, **SIZES, **EXTRA[family])
    save_model(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("family", list(EXTRA))
@pytest.mark.parametrize("dtype", list(BUDGET))
def test_llama_cpp_runs_our_files_with_our_logits(tmp_path, family, dtype):
    path = tmp_path / f"{family}.gguf"
    convert(saved(tmp_path, family, 256), path, dtype=dtype)
    peer = llama(path)
    # torch would compute in the file's type, the compiled runtime and llama.cpp in float32
    llm = LLM(path) if family.startswith("rwkv") else LLM.from_runner(TorchRunner(load(path, dtype=torch.float32)))
    theirs, ours = its_logits(peer, PROMPT), llm.logits(PROMPT)
    apart = np.sqrt(np.square(theirs - ours).mean() / np.square(ours).mean())
    assert apart < BUDGET[dtype]
    if dtype in ("float32", "float16"):
        made = [int(theirs[-1].argmax())]
        for _ in range(23):
            peer.eval(made[-1:])
            made.append(int(np.array(peer.scores[peer.n_tokens - 1]).argmax()))
        session = llm.session()
        session.feed(PROMPT)
        assert list(session.stream_tokens(24, 0, ignore_eos=True)) == made
    peer.close()


@pytest.mark.parametrize("cut", ["qwen2", "llama-bpe", "gpt-2"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(tmp_path, cut):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from rookery.tokenizers.gguf_bpe import CUTS

    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[cut] is None)
    split = [] if CUTS[cut] is None else [pre_tokenizers.Split(Regex(CUTS[cut]), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["Hello world, it's 12345.\n\n you're here"] * 9,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "source").mkdir()
    made.save(str(tmp_path / "source" / "tokenizer.json"))
    model = randomised("arwkv-test", dtype=torch.float32, vocab_size=352, **SIZES | {"num_hidden_layers": 2})
    save_model(model, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "m.gguf")
    peer = llama(tmp_path / "m.gguf")
    for text in ("Hello world, it's 12345.\n\n you're  here", "été 你好 12", "a  b\n c<|endoftext|>d"):
        assert peer.tokenize(text.encode(), add_bos=False, special=True) == made.encode(text).ids
    assert peer.token_eos() == made.token_to_id("<|endoftext|>")
    peer.close()


@pytest.mark.parametrize(("family", "to"), [("rwkv6", "hf"), ("rwkv7", "fla")])
def test_files_of_its_converter_load_here(tmp_path, family, to):
    script = shutil.which("convert_hf_to_gguf.py")
    if script is None:
        pytest.skip("convert_hf_to_gguf.py of llama.cpp is not on PATH")
    SMALLER = {"hidden_size": 128, "intermediate_size": 512 if family == "rwkv7" else 448}
    sizes = SIZES | SMALLER | EXTRA[family]
    model = randomised(f"{family}-test", dtype=torch.float32, vocab_size=65536, **sizes)
    save_model(model, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "folder", to=to)
    command = [sys.executable, script, str(tmp_path / "folder"), "--outtype", "f32", "--outfile"]
    subprocess.run([*command, str(tmp_path / "theirs.gguf")], check=True, capture_output=True)
    own, theirs = open_checkpoint(tmp_path / "model.safetensors"), open_checkpoint(tmp_path / "theirs.gguf")
    assert list(theirs) == list(own)
    for name in own:
        np.testing.assert_allclose(theirs[name], own[name], rtol=1e-6, atol=1e-7, err_msg=name)
    tokens = LLM(tmp_path / "theirs.gguf").tokens_of("The Eiffel tower is in the city of")
    assert tokens == [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706]
    with torch.no_grad():
        expected = load(tmp_path / "model.safetensors")(torch.tensor([tokens]))[0][0]
        got = load(tmp_path / "theirs.gguf")(torch.tensor([tokens]))[0][0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    peer = llama(tmp_path / "theirs.gguf")
    apart = np.abs(its_logits(peer, tokens) - expected.numpy()).max()
    assert apart < 1e-3
    peer.close()
