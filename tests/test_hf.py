"""transformers runs our models: same logits, same greedy texts, its own generate() with padding, beams and caches."""

import importlib.util
import json

import pytest
import torch
from support.language import randomised

from rookery.checkpoints.convert import convert
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.models import save_model

if importlib.util.find_spec("transformers") is None:
    pytest.skip("Hugging Face transformers is not installed", allow_module_level=True)

# transformers' lists of its models warn of what its next version drops
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])
FOLDERS = [
    ("rwkv7-test", "fla"),
    ("rwkv6-test", "fla"),
    ("rwkv6-test", "hf"),
    ("rwkv5-test", "hf"),
    ("rwkv4-test", None),
]
FOLDERS += [("rwkv7-test", None), ("rwkv7b-test", None), ("rwkv-x-test", None), ("transformer-test", None)]


@pytest.fixture(scope="module")
def hf():
    import rookery.hf

    rookery.hf.register()
    rookery.hf.register()  # once more does no harm
    return rookery.hf


def folder(tmp_path, model, to):
    """A folder of the model in official names, or as `convert` writes it, without what only we know."""
    path = tmp_path / "folder"
    if to is None:
        import rookery.hf

        rookery.hf.RookeryForCausalLM.of(model).save_pretrained(path)
        return path
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", path, to=to)
    return path


def opened(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def own_greedy(model, tokens, count):
    session = LLM.from_runner(TorchRunner(model)).session()
    session.feed(tokens)
    return list(session.stream_tokens(count, 0, ignore_eos=True))


@pytest.mark.parametrize(("name", "to"), FOLDERS)
def test_auto_classes_open_our_folders(hf, tmp_path, name, to):
    from transformers import AutoConfig

    model = randomised(name, dtype=torch.float32)
    path = folder(tmp_path, model, to)
    config = AutoConfig.from_pretrained(path)
    assert (config.vocab_size, config.hidden_size) == (model.config.vocab_size, model.config.hidden_size)
    again = opened(path)
    assert isinstance(again, hf.RookeryForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS)[0], rtol=1e-5, atol=1e-5)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    expected = own_greedy(model, TOKENS[0].tolist(), 12)
    for use_cache in (True, False):
        assert again.generate(TOKENS, use_cache=use_cache, **options)[0, 6:].tolist() == expected


@pytest.fixture(scope="module")
def model():
    return randomised("rwkv7-test", dtype=torch.float32)


@pytest.fixture(scope="module")
def wrapped(hf, model):
    return hf.RookeryForCausalLM.of(model).eval()


def test_padded_rows_go_on_as_if_alone(wrapped, model):
    texts = [[7, 2, 8], [3, 1, 4, 1, 5, 9, 2], [6]]
    width = max(map(len, texts))
    tokens = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
    for use_cache in (True, False):
        made = wrapped.generate(tokens, attention_mask=mask, use_cache=use_cache, **options)
        assert made[:, width:].tolist() == [own_greedy(model, text, 10) for text in texts]


def test_the_cache_is_transformers_own_kind_and_does_not_grow(hf, wrapped, model):
    from transformers.cache_utils import Cache

    with torch.no_grad():
        first = wrapped(TOKENS[:, :4])
        cache = first.past_key_values
        assert isinstance(cache, Cache)
        size = cache.state.nbytes
        second = wrapped(TOKENS[:, 4:], past_key_values=cache)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), model(TOKENS)[0], rtol=1e-4, atol=1e-4)
    assert second.past_key_values is cache
    assert (cache.get_seq_length(), cache.state.nbytes) == (6, size)
    cache.reset()
    assert (cache.get_seq_length(), cache.state) == (0, None)
    with pytest.raises(ValueError, match="a recurrent state cannot forget its last tokens"):
        cache.crop(-1)


def test_generate_goes_on_from_a_cache(wrapped, model):
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    with torch.no_grad():
        cache = wrapped(TOKENS[:, :5]).past_key_values
    made = wrapped.generate(TOKENS, past_key_values=cache, **options)
    assert made[0, 6:].tolist() == own_greedy(model, TOKENS[0].tolist(), 6)


def test_beams_and_samples_follow_their_rows(wrapped):
    options = {"max_new_tokens": 8, "eos_token_id": None, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    with_cache, without = (wrapped.generate(TOKENS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)
    torch.manual_seed(1)
    samples = wrapped.generate(TOKENS, do_sample=True, max_new_tokens=8, num_return_sequences=3, eos_token_id=None)
    assert samples.shape == (3, 14)


def test_the_loss_is_that_of_the_next_token(wrapped, model):
    with torch.no_grad():
        loss = wrapped(TOKENS, labels=TOKENS).loss
        logits = model(TOKENS)[0]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:]))
    wrapped(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())
    wrapped.zero_grad()
    assert wrapped(TOKENS, logits_to_keep=2).logits.shape[1] == 2
    assert isinstance(wrapped(TOKENS, return_dict=False), tuple)


def test_the_precision_may_be_chosen_and_the_embedding_found(hf, tmp_path, model):
    path = folder(tmp_path, model, None)
    again = hf.RookeryForCausalLM.from_pretrained(path, dtype="bfloat16", device_map="cpu")
    assert (again.dtype, again.device.type) == (torch.bfloat16, "cpu")
    assert again.get_input_embeddings() is again.model.emb
    assert again.get_output_embeddings() is again.model.head
    settings = json.loads((path / "config.json").read_text("utf-8"))
    assert (settings["model_type"], settings["family"]) == ("rookery", "rwkv7")
    assert LLM(path).runner.family == "rwkv7"


def test_a_new_model_comes_from_our_config_alone(hf, model):
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_config(hf.RookeryConfig.of(model))
    assert fresh.model.config == model.config
    assert fresh(TOKENS).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"cannot be made from a config of type 'rookery': make it with"):
        hf.RookeryForCausalLM(hf.RookeryConfig())


@pytest.mark.parametrize("to", [None, "fla"])
def test_texts_go_in_and_out(hf, tmp_path, to):
    from transformers import AutoTokenizer

    from rookery.tokenizers.pairing import load_tokenizer

    model = randomised("rwkv7-test", dtype=torch.float32, vocab_size=65536)
    path = folder(tmp_path, model, to)
    tokenizer = AutoTokenizer.from_pretrained(path)
    world = load_tokenizer("world")
    for text in ("Hello, world!\n\n你好 😀", " a  b", ""):
        assert tokenizer(text)["input_ids"] == world.encode(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    batch = tokenizer(["The Eiffel tower is", "Hi"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist()[1][:-1] == [0] * (batch["input_ids"].shape[1] - 1)
    made = opened(path).generate(**batch, do_sample=False, max_new_tokens=5)
    assert made[1, -5:].tolist() == own_greedy(model, world.encode("Hi"), 5)
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("Hello")["input_ids"] == [33155]


def test_a_vocabulary_of_ones_own_and_a_tokenizer_json_are_found(hf, tmp_path):
    from rookery.hf_tokenizer import RookeryTokenizer
    from rookery.tokenizers.pairing import load_tokenizer
    from rookery.tokenizers.vocabulary import write_vocabulary

    write_vocabulary([*(bytes([i]) for i in range(256)), b"hello"], tmp_path / "vocab.txt")
    assert RookeryTokenizer.from_pretrained(tmp_path)("hello!")["input_ids"] == [257, 34]
    load_tokenizer("20b").save(tmp_path / "tokenizer.json")
    fast = RookeryTokenizer.from_pretrained(tmp_path)
    assert (fast("\n\n")["input_ids"], fast.eos_token_id) == ([535], 0)


def test_what_the_model_cannot_read_is_refused(wrapped):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="this model reads token ids"):
        wrapped(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\]"):
        wrapped(TOKENS, attention_mask=torch.ones(1, 1, 6, 6))
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="is a DynamicCache of another model"):
        wrapped(TOKENS, past_key_values=filled)
