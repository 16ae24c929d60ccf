import json
import signal
import subprocess
import sys

import pytest
import torch
from support.language import randomised

from rookery.engine.llm import LLM
from rookery.models import save_model

TEXT = {"max_tokens": 30, "temperature": 0.0}
FLAGS = ["--max-tokens", "30", "--temperature", "0"]


@pytest.fixture(scope="module")
def llm(model_path):
    return LLM(model_path)


@pytest.fixture
def generate(cli, model_path):
    return lambda *argv, **stdin: cli("generate", "--model", model_path, *argv, **stdin)


def test_the_continuation_alone_is_printed(generate, llm):
    code, out, err = generate(*FLAGS, "hello")
    assert (code, err) == (0, "")
    assert out == llm.generate("hello", **TEXT) + "\n"


def test_echo_adds_the_prompt(generate, llm):
    assert generate(*FLAGS, "--echo", "hello")[1] == "hello" + llm.generate("hello", **TEXT) + "\n"


def test_bos_begins_with_token_zero(generate, llm):
    assert generate(*FLAGS, "--bos", "hello")[1] == llm.generate("hello", bos=True, **TEXT) + "\n"
    assert generate(*FLAGS, "--bos", stdin=b"not read")[1] == llm.generate([0], **TEXT) + "\n"


@pytest.mark.parametrize("argv", [[], ["-"]])
@pytest.mark.parametrize("data", [b"h\xc3\xa9llo", b"h\xc3\xa9llo\n", b"h\xc3\xa9llo\r\n"])
def test_a_prompt_may_be_piped_in(generate, llm, argv, data):
    assert generate(*FLAGS, *argv, stdin=data)[1] == llm.generate("héllo", **TEXT) + "\n"


def test_a_prompt_given_wins_over_one_piped_in(generate, llm):
    assert generate(*FLAGS, "hello", stdin=b"other")[1] == llm.generate("hello", **TEXT) + "\n"


def test_no_prompt_at_a_terminal_is_wrong_usage(generate):
    code, out, err = generate(*FLAGS)
    assert (code, out) == (2, "")
    assert "no prompt; give one, or pipe it in" in err


def test_a_piped_prompt_must_be_text(generate):
    code, _, err = generate(stdin=b"ab\xff")
    assert code == 1
    assert "what came on stdin is not UTF-8 text (byte 2 is 0xff)" in err


def test_an_empty_prompt_is_refused(generate):
    code, _, err = generate("")
    assert code == 1
    assert "there is nothing to go on from" in err


def test_sampling_options_arrive(generate, llm):
    options = {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    options |= {"penalty_decay": 0.9, "seed": 5, "temperature": 1.2, "ignore_eos": True}
    flags = ["--top-p", 0.9, "--top-k", 20, "--min-p", 0.01, "--presence-penalty", 0.5, "--frequency-penalty", 0.25]
    flags += ["--penalty-decay", 0.9, "--seed", 5, "--temperature", 1.2, "--ignore-eos", "-n", 25]
    assert generate(*flags, "hello")[1] == llm.generate("hello", 25, **options) + "\n"


def test_stop_strings_end_the_text(generate, llm):
    whole = llm.generate("hello", **TEXT)
    stop = whole[5:7]
    assert generate(*FLAGS, "--stop", stop, "hello")[1] == whole[: whole.index(stop)] + "\n"


def test_a_stop_string_may_be_a_line_end():
    from rookery.cli.options import text_options

    class Given:
        max_tokens, seed, ignore_eos, stop = 1, None, False, [r"\n\n", r"a\tb"]

        def __getattr__(self, name):
            return None

    assert text_options(Given())["stop"] == ["\n\n", "a\tb"]


def test_json_tells_all(generate, llm):
    code, out, _ = generate("--json", "-n", 12, "--seed", 9, "--ignore-eos", "hello")
    summary = json.loads(out)
    seconds = summary.pop("seconds")
    assert code == 0
    assert seconds > 0
    assert summary == {
        "prompt": "hello",
        "text": llm.generate("hello", 12, seed=9, ignore_eos=True),
        "finish_reason": "length",
        "prompt_tokens": 5,
        "tokens": 12,
        "seed": 9,
    }


def test_a_saved_state_goes_on(generate, llm, tmp_path):
    flags = ["--temperature", "0", "--ignore-eos"]
    first = generate(*flags, "-n", 10, "--save-state", tmp_path / "s", "hello")[1]
    second = generate(*flags, "-n", 10, "--state", tmp_path / "s", stdin=b"not read")[1]
    session = llm.session()
    session.feed("hello")
    assert [first, second] == [
        "".join(stream) + stream.unfinished() + "\n"
        for stream in (session.stream(10, 0, ignore_eos=True) for _ in range(2))
    ]
    third = generate(*flags, "-n", 10, "--state", tmp_path / "s", "more")[1]
    again = llm.session(tmp_path / "s")
    again.feed("more")
    stream = again.stream(10, 0, ignore_eos=True)
    assert third == "".join(stream) + stream.unfinished() + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantize", "int3"], "quantize='int3' is not supported; supported: "),
        (["--threads", "0"], "threads must be 1 or more, got 0"),
        (["--top-p", "2"], "top_p must be between 0 and 1, got 2.0"),
        (["--max-tokens", "-1"], "max_tokens must be 0 or more, got -1"),
        (["--tokenizer", "world"], "the tokenizer 'world' has 65530 tokens, the model only 256"),
        (["--state", "nothing"], "there is no state file 'nothing'"),
        (["--device", "abacus"], "device='abacus' cannot be used"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(generate, flags, message):
    code, out, err = generate(*flags, "hello")
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("family", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_a_text_is_made_without_torch_and_other_slow_libraries(family, tmp_path):
    model_path = str(tmp_path / "tiny.safetensors")
    save_model(randomised(f"{family}-test", dtype=torch.float32, vocab_size=256), model_path)
    code = f"""
import sys
from rookery.cli.main import main
assert main(["generate", "--model", {model_path!r}, "-n", "5", "hello"]) == 0
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"torch", "tokenizers", "huggingface_hub", "tyro", "rich", "llguidance", "gguf", "numpy.random"}
    assert not {*done.stderr.split()} & slow


def test_without_an_embedded_model_a_path_is_asked_for(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("rookery.engine.llm.EMBEDDED", tmp_path / "absent")
    code, _, err = cli("generate", "hello")
    assert code == 1
    assert "has no embedded model; give the path of a model file (--model PATH)" in err


def test_a_tuned_state_starts_the_text(generate, llm, tmp_path):
    import numpy as np

    from rookery.checkpoints.tuned_state import save_tuned_state

    config = llm.runner.config
    rng = np.random.default_rng(1)
    states = {f"layers.{i}.wkv": 9 * rng.normal(size=config.wkv_shape) for i in range(config.num_hidden_layers)}
    save_tuned_state(tmp_path / "tuned.pth", states, config)
    code, out, err = generate(*FLAGS, "--state", tmp_path / "tuned.pth", "hello")
    assert (code, err) == (0, "")
    assert out not in (generate(*FLAGS, "hello")[1], "\n")


def test_a_text_may_have_a_form(generate, llm, tmp_path):
    from rookery.engine.grammar import json_schema

    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    flags = ["--seed", "1", "-n", "200"]
    _, out, _ = generate(*flags, "--json-schema", tmp_path / "schema.json", "hello")
    assert out == llm.generate("hello", 200, seed=1, grammar=json_schema(schema)) + "\n"
    assert 2 <= len(json.loads(out)) <= 4
    assert generate(*flags, "--regex", "(yes|no)", "hello")[1].strip() in ("yes", "no")
    (tmp_path / "g.lark").write_text('start: "x" "y"')
    assert generate(*flags, "--grammar", tmp_path / "g.lark", "hello")[1] == "xy\n"
    code, _, err = generate("--regex", "(", "hello")
    assert (code, "the regular expression cannot be used" in err) == (1, True)


def test_guesses_change_nothing(generate, model_path):
    flags = ["--seed", "3", "-n", "40", "--top-p", "0.9", "--ignore-eos"]
    expected = generate(*flags, "hello hello hello")[1]
    assert generate(*flags, "--speculate", "6", "hello hello hello")[1] == expected
    assert generate(*flags, "--draft", model_path, "hello hello hello")[1] == expected


def test_a_file_is_read_before_the_prompt(generate, llm, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 50)
    expected = llm.generate(text.read_text() + "And", **TEXT) + "\n"
    assert generate(*FLAGS, "--file", text, "And") == (0, expected, "")
    assert generate(*FLAGS, "--file", text, stdin=b"not read")[1] == llm.generate(text.read_text(), **TEXT) + "\n"
    code, _, err = generate("--file", tmp_path / "nothing")
    assert (code, "nothing" in err) == (1, True)


def test_an_interruption_leaves_a_state_to_go_on_from(generate, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 200)
    expected = generate(*FLAGS, "--file", text)[1]
    from rookery.engine import reading

    whole = reading.read_file

    def interrupted(*args):
        for count, place in enumerate(whole(*args)):
            if count == 2:
                signal.raise_signal(signal.SIGINT)
            yield place

    monkeypatch.setattr(reading, "read_file", interrupted)
    monkeypatch.chdir(tmp_path)
    code, out, err = generate(*FLAGS, "--file", text)
    assert (code, out) == (130, "")
    assert err == f"interrupted after 1,536 tokens; --file {text} --state text.txt.state goes on\n"
    monkeypatch.setattr(reading, "read_file", whole)
    assert generate(*FLAGS, "--file", text, "--state", "text.txt.state")[1] == expected


def test_an_interrupted_text_is_saved_where_asked(generate, llm, tmp_path, monkeypatch):
    from rookery.cli import generate as module

    shown = []

    def show(piece):
        shown.append(piece)
        if len(shown) == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module, "show", show)
        code, _, err = generate(*FLAGS, "--ignore-eos", "--save-state", tmp_path / "s", "hello")
    assert (code, err) == (130, f"interrupted; --state {tmp_path / 's'} goes on\n")
    rest = llm.session(tmp_path / "s").generate(10, temperature=0, ignore_eos=True)
    assert llm.generate("hello", 30, temperature=0, ignore_eos=True).startswith("".join(shown[:-1]) + rest)


def test_log_probabilities_are_told(generate):
    summary = json.loads(generate("--json", "--logprobs", 2, "-n", 3, "--seed", 1, "--ignore-eos", "hello")[1])
    assert len(summary["logprobs"]) == summary["tokens"] == 3
    assert len(summary["logprobs"][0]["top"]) == 2


def test_a_prompt_is_known_to_the_next_run(generate, llm, tmp_path, monkeypatch):
    expected = llm.generate("hello " * 20, **TEXT) + "\n"
    assert generate(*FLAGS, "--cache", tmp_path / "c", "hello " * 20)[1] == expected
    files = [*(tmp_path / "c").iterdir()]
    assert len(files) == 1
    read = []
    forward = type(llm.runner).forward
    monkeypatch.setattr(
        type(llm.runner), "forward", lambda self, ids, *rest: read.append(len(ids)) or forward(self, ids, *rest)
    )
    assert generate(*FLAGS, "--cache", tmp_path / "c", "hello " * 20)[1] == expected
    assert {*read} == {1}
    assert [*(tmp_path / "c").iterdir()] == files
