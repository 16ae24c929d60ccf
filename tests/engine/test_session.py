import random

import numpy as np
import pytest
from support.engine import scripted

from rookery.engine.llm import LLM
from rookery.engine.scheduler import Scheduler
from rookery.engine.session import CHUNK
from rookery.errors import BadState

PIECES = ["", "a", "b", "\n", "\n\n", "User", ":", " end\n", "\nUs", "er:", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80"]
PIECES += ["c", " end"]
PROMPT = [1, 2]


def llm(*said):
    return scripted(PROMPT, said, PIECES)


def fed(*said):
    session = llm(*said).session()
    session.feed(PROMPT)
    return session


def text_of(session):
    """What the model has read, as text."""
    _ = session.tokens_seen  # everything shown is read
    return b"".join(session.llm.tokenizer.token_bytes(token) for token in session._at.state.tokens).decode()


def test_feed_is_eager():
    session = llm("a").session()
    session.feed("ab")
    assert session.llm.runner.calls == [2]
    assert session._at.state.tokens == [1, 2]
    session.feed([3])
    assert session.tokens_seen == 3


def test_tokens_seen_counts_what_was_fed_and_sampled():
    session = fed("c", "b", "a", "c")
    assert session.tokens_seen == 2
    assert "".join(session.stream(3, 0)) == "cba"
    assert session.tokens_seen == 5
    session.feed("c")
    assert session.tokens_seen == 6


def test_the_last_sampled_token_is_read_when_the_session_is_next_used():
    session = fed("c", "b")
    session.generate(2, temperature=0)
    assert session.llm.runner.calls == [2, 1]  # the last token of a text costs nothing …
    session.feed("a")
    assert session.llm.runner.calls == [2, 1, 2]  # … until it is needed
    assert session._at.state.tokens == [1, 2, 14, 2, 1]


def test_a_text_ends_at_token_zero_which_is_not_read():
    session = fed("c", "b", "", "a")
    stream = session.stream(9, 0)
    assert "".join(stream) == "cb"
    assert (stream.finish_reason, stream.tokens) == ("end", [14, 2])
    assert session.tokens_seen == 4
    assert session.generate(9, temperature=0) == ""  # it would end here again


def test_ignore_eos_reads_token_zero_as_any_other():
    session = fed("c", "", "b")
    stream = session.stream(3, 0, None, True)
    assert "".join(stream) == "cb"
    assert (stream.finish_reason, session.tokens_seen) == ("length", 5)


def test_text_comes_in_whole_characters():
    session = fed("a", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", "b")
    assert list(session.stream(6, 0)) == ["a", "é", "😀", "b"]


def test_a_character_may_lie_across_two_calls():
    session = fed(b"\xf0\x9f", b"\x98\x80", "b")
    assert session.generate(1, temperature=0) == ""
    branch = session.fork()
    assert session.generate(2, temperature=0) == "😀b"
    assert branch.generate(1, temperature=0) == "😀"


def test_an_unfinished_character_can_be_shown():
    session = fed(b"\xf0\x9f", b"\x98\x80")
    stream = session.stream(1, 0)
    assert list(stream) == []
    assert stream.unfinished() == "\N{REPLACEMENT CHARACTER}"
    stream = session.stream(1, 0)
    assert (list(stream), stream.unfinished()) == (["😀"], "")


def test_generate_ends_with_a_replacement_inside_a_character():
    assert llm("a", b"\xf0\x9f").generate(PROMPT, 2, temperature=0) == "a\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_character_become_replacements():
    assert fed(b"\xa9", "a").generate(2, temperature=0) == "\N{REPLACEMENT CHARACTER}a"


def test_feeding_forgets_an_unfinished_character():
    session = fed(b"\xf0\x9f", "a", "b")
    session.generate(1, temperature=0)
    session.feed("c")
    assert session.generate(1, temperature=0) == "b"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["a", "\n", "\n", "b"], "a"),
        (["a", "\n\n", "b"], "a"),
        (["a", " end\n", "\nUs", "er:", "b"], "a end"),
        (["\n", "a", "\n", "\nUs"], "\na"),
        ([b"\xc3", b"\xa9", "\n\n"], "é"),
    ],
)
def test_a_stop_string_ends_the_text_and_leaves_no_trace_in_the_state(said, shown):
    session = fed(*said)
    stream = session.stream(9, 0, stop=["\n\n"])
    assert "".join(stream) == shown
    assert stream.finish_reason == "stop"
    assert text_of(session) == "ab" + shown
    assert session.tokens_seen == len(PROMPT) + len(session.llm.tokenizer.encode(shown))


def test_text_held_back_for_a_stop_string_is_shown_when_it_was_none():
    session = fed("a", "\n", "b", "\n")
    assert list(session.stream(4, 0, stop="\n\n")) == ["a", "\nb", "\n"]
    assert text_of(session) == "aba\nb\n"


def test_stop_strings_do_not_change_what_comes_before():
    said = ["a", "\n", "b", b"\xf0\x9f", b"\x98\x80", "\nUs", "a"]
    assert fed(*said).generate(7, temperature=0, stop=["\n\n", "User"]) == fed(*said).generate(7, temperature=0)


def test_a_stream_left_early_takes_back_what_was_not_shown():
    session = fed(" end\n", "\nUs", "a")
    for piece in session.stream(9, 0, stop=["\n\n"]):
        assert piece == " end"
        break
    assert text_of(session.fork()) == "ab end"  # a fork stands at what was shown, too
    session.feed("c")
    assert text_of(session) == "ab endc"


def test_feeding_ends_an_open_stream():
    session = fed("a", "b", "c")
    stream = session.stream(9, 0)
    assert next(stream) == "a"
    session.feed("c")
    assert list(stream) == []
    assert stream.finish_reason == "closed"
    assert text_of(session) == "abac"


def test_a_fork_goes_its_own_way():
    session = fed("a", "b", "c")
    branch = session.fork()
    branch.feed("ccc")
    assert (session.tokens_seen, branch.tokens_seen) == (2, 5)
    assert session.generate(3, temperature=0) == "abc"


def test_a_saved_session_goes_on_where_it_was(tmp_path):
    said = ["a", b"\xf0\x9f", b"\x98\x80", "b"]
    session = fed(*said)
    session.generate(2, temperature=0)
    session.save(tmp_path / "s")
    model = llm(*said)
    loaded = model.session(tmp_path / "s")
    assert loaded.tokens_seen == 4
    assert loaded.generate(2, temperature=0) == "😀b"
    assert model.runner.calls == [1]  # nothing was read twice


def test_a_session_is_saved_as_it_was_shown(tmp_path):
    session = fed("a", "\n", "b")
    stream = session.stream(9, 0, stop="\n\n")
    assert next(stream) == "a"
    session.save(tmp_path / "s")
    assert list(stream) == ["\nb"]  # and the stream goes on
    assert text_of(session.llm.session(tmp_path / "s")) == "aba"


def test_nothing_to_go_on_from_is_refused(tmp_path):
    session = llm("a").session()
    with pytest.raises(ValueError, match="feed a prompt first, or token 0"):
        session.stream()
    session.feed("")
    with pytest.raises(ValueError, match="nothing to go on from"):
        session.generate()
    session.save(tmp_path / "s")
    assert session.llm.session(tmp_path / "s").tokens_seen == 0


def test_the_state_of_another_model_is_refused(tmp_path):
    session = fed("a")
    session.save(tmp_path / "s")
    other = llm("a")
    other.runner.fingerprint = lambda: "other"
    with pytest.raises(BadState, match="the state of another model"):
        other.session(tmp_path / "s")


def test_long_prompts_are_read_in_chunks():
    session = llm("a").session()
    session.feed([1] * (2 * CHUNK + 3))
    assert session.llm.runner.calls == [CHUNK, CHUNK, 3]
    assert session.tokens_seen == 2 * CHUNK + 3


def test_tokens_stream_without_a_tokenizer():
    model = llm("a", "b", "", "c")
    model.__dict__["tokenizer"] = None
    session = model.session()
    session.feed(PROMPT)
    stream = session.stream_tokens(9, 0)
    assert list(stream) == [1, 2]
    assert stream.finish_reason == "end"
    assert list(session.stream_tokens(2, 0, ignore_eos=True)) == [0, 14]


def test_a_seed_at_a_position_gives_the_same_text_however_it_is_cut():
    def flat(tokens, state, logits="last"):
        state.tokens += tokens
        return np.zeros((1, len(PIECES)), np.float32)

    def drawn(*cuts):
        session = llm().session()
        session.llm.runner.forward = flat
        session.feed(PROMPT)
        return [token for n in cuts for token in session.stream_tokens(n, seed=4, top_p=1, ignore_eos=True)]

    assert drawn(12) == drawn(5, 7) == drawn(1, 1, 10)
    assert len(set(drawn(12))) > 3


def test_a_seed_is_chosen_and_told_where_none_is_given():
    seeds = {fed("a").stream(1).seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be 0 or more, got -1"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"banned": (99,)}, "got token 99, the model knows 0 to 15"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fed("a").stream(**options)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="topp"):
        fed("a").stream(topp=0.5)


def test_a_session_goes_back_to_a_kept_snapshot():
    session = fed("c", "b", "a")
    assert session.keep() == 2
    assert session.generate(2, temperature=0) == "cb"
    assert session.keep() == 4
    assert session.generate(1, temperature=0) == "a"
    assert session.kept == [2, 4]
    assert session.rewind() == 4
    assert session.generate(1, temperature=0) == "a"
    assert session.rewind(2) == 2
    assert (session.kept, session.tokens_seen) == ([2], 2)
    assert session.generate(3, temperature=0) == "cba"
    with pytest.raises(BadState, match="no snapshot after 4 tokens is kept; there are: 2"):
        session.rewind(4)
    with pytest.raises(BadState, match="none; `keep` makes one"):
        fed("a").rewind()


def test_a_fork_has_the_snapshots_and_leaves_them():
    session = fed("c", "b")
    session.keep()
    branch = session.fork()
    branch.generate(1, temperature=0)
    branch.keep()
    assert (branch.rewind(2), branch.kept, session.kept) == (2, [2], [2])


def test_a_snapshot_in_an_open_stream_has_what_was_shown():
    session = fed("a", "\n", "b")
    stream = session.stream(3, 0, stop="\n\n")
    assert next(stream) == "a"
    assert next(stream) == "\nb"
    assert session.keep() == 5
    assert session.rewind() == 5


def test_log_probabilities_are_told_for_every_token():
    session = fed("c", "b", "")
    stream = session.stream(5, 0, logprobs=2)
    assert "".join(stream) == "cb"
    assert [told.token for told in stream.logprobs] == stream.tokens == [14, 2]
    assert all(told.top[0] == (told.token, told.logprob) for told in stream.logprobs)
    assert fed("c").stream(1).logprobs == []
    with pytest.raises(ValueError, match="logprobs must be 0 or more, got -1"):
        fed("a").stream(logprobs=-1)


def test_a_bias_may_not_be_for_an_unknown_token():
    with pytest.raises(ValueError, match="got token 99, the model knows 0 to 15"):
        fed("a").stream(logit_bias={99: 1.0})


def test_a_damaged_session_is_refused_or_the_same(tmp_path):
    model, draw = LLM(threads=1), random.Random(5)
    session = model.session()
    session.feed("Once upon a time")
    session.save(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(60):
        data = bytearray(whole)
        at = draw.randrange(draw.choice([header, len(data)]))
        data[at : at + draw.choice([0, 1])] = draw.randbytes(draw.choice([0, 1, 4]))
        (tmp_path / "s").write_bytes(data)
        try:
            again = model.session(tmp_path / "s")
        except BadState:
            continue
        assert (again._at.state.numbers == session._at.state.numbers).all()
        assert (again._at.logits == session._at.logits).all()


def test_hundreds_of_sessions_are_saved_and_restored_exactly(tmp_path, monkeypatch):
    many_sessions(tmp_path, monkeypatch, 150)


@pytest.mark.slow
def test_ten_thousand_sessions_are_saved_and_restored_exactly(tmp_path, monkeypatch):
    many_sessions(tmp_path, monkeypatch, 10_000)


def many_sessions(folder, monkeypatch, count):
    monkeypatch.setattr("os.fsync", lambda handle: None)  # this is about what is written, not when
    model = LLM(threads=1)
    prompts = [f"Story {i}" for i in range(count)]
    scheduler = Scheduler(model, rows=64)
    texts = [scheduler.submit(prompt, 4, seed=i) for i, prompt in enumerate(prompts)]
    scheduler.run()
    for i, text in enumerate(texts):
        text.session.save(folder / str(i))
    for i, text in enumerate(texts):
        again = model.session(folder / str(i))
        assert again.tokens_seen == text.session.tokens_seen
        assert (again._at.state.numbers == text.session._at.state.numbers).all()
        assert (again._at.logits == text.session._at.logits).all()
        assert again._at.recent == text.session._at.recent
