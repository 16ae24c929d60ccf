import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from support.engine import Remembering, scripted
from support.language import names, randomised

from rookery.checkpoints.tuned_state import save_tuned_state
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.scheduler import Scheduler
from rookery.engine.state_cache import StateCache
from rookery.errors import BadState
from rookery.models import save_model

DRAWN = {"top_p": 1.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised("rwkv7-test", dtype=torch.bfloat16, vocab_size=256), path)
    return LLM(path, threads=1)


def some_prompts(count, vocab=256, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(1, vocab, size=int(n)).tolist() for n in draw.integers(1, 90, size=count)]


def alone(llm, prompt, n, **options):
    session = llm.session()
    session.feed(prompt)
    return list(session.stream_tokens(n, **options))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("rows", "prefill"), [(64, 256), (3, 7), (1, 1)])
def test_every_text_is_that_of_its_prompt_alone(native, rows, prefill, cached):
    scheduler = Scheduler(native, rows=rows, prefill=prefill, cache=StateCache() if cached else None)
    prompts = some_prompts(12)
    texts = [scheduler.submit(p, 5 + i, tokens=True, seed=i, **DRAWN) for i, p in enumerate(prompts)]
    scheduler.run()
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        assert list(text) == alone(native, prompt, 5 + i, seed=i, **DRAWN), f"row {i}"
        assert (text.finish_reason, text.done, len(text.tokens)) == ("length", True, 5 + i)


@pytest.mark.parametrize("name", names())
def test_every_registered_language_model_writes_many_texts(name):
    runner = TorchRunner(randomised(name, dtype=torch.float64))
    llm = LLM.from_runner(runner)
    prompts = some_prompts(4, vocab=runner.config.vocab_size, seed=3)
    prompts.append(prompts[0])
    scheduler = Scheduler(llm, prefill=33, cache=StateCache())
    texts = [scheduler.submit(p, 6, tokens=True, temperature=0, ignore_eos=True) for p in prompts]
    scheduler.run()
    assert [list(text) for text in texts] == [alone(llm, p, 6, temperature=0, ignore_eos=True) for p in prompts]
    assert scheduler.counts["cached_tokens"] == len(prompts[0])


def test_a_session_goes_on_alone_where_it_was_left(native):
    scheduler = Scheduler(native)
    text = scheduler.submit([1, 2, 3], 10, tokens=True, seed=4, **DRAWN)
    first = list(text)
    session = text.session
    assert session.tokens_seen == 13
    again = scheduler.submit([], 5, session=session, tokens=True, seed=4, **DRAWN)
    rest = [*again, *session.stream_tokens(5, seed=4, **DRAWN)]
    assert first + rest == alone(native, [1, 2, 3], 20, seed=4, **DRAWN)


def test_a_cancelled_text_leaves_the_others_as_they_are(native):
    prompts = some_prompts(5, seed=1)
    expected = [alone(native, p, 6, seed=1, **DRAWN) for p in prompts]
    for cancelled in range(0, 12):
        scheduler = Scheduler(native, rows=4, prefill=40)
        texts = [scheduler.submit(p, 6, tokens=True, seed=1, **DRAWN) for p in prompts]
        for _ in range(cancelled):
            scheduler.tick()
        texts[cancelled % 5].cancel()
        scheduler.run()
        for i, text in enumerate(texts):
            tokens = list(text)
            assert tokens == expected[i][: len(tokens)]
            if i != cancelled % 5:
                assert (text.finish_reason, len(tokens)) == ("length", 6)
            else:
                assert text.finish_reason in ("closed", "length")


def test_a_cancelled_row_is_free_for_one_that_waits(native):
    scheduler = Scheduler(native, rows=1)
    long, short = (scheduler.submit([1], n, tokens=True, seed=1, **DRAWN) for n in (10**6, 3))
    for _ in range(5):
        scheduler.tick()
    assert scheduler.load == (1, 1)
    long.cancel()
    assert len(list(short)) == 3
    assert long.finish_reason == "closed"
    assert long.session.tokens_seen == 1 + len(long.tokens)


def test_a_request_cancelled_before_its_turn_never_begins(native):
    scheduler = Scheduler(native, rows=1)
    texts = [scheduler.submit([1], 3, tokens=True, seed=1, **DRAWN) for _ in range(3)]
    texts[1].cancel()
    assert [len(list(text)) for text in texts] == [3, 0, 3]
    assert texts[1].session is None


def test_prompts_are_read_beside_texts_in_bounded_pieces():
    llm = LLM.from_runner(Remembering())
    scheduler = Scheduler(llm, prefill=10)
    short = scheduler.submit([1], 100, tokens=True, seed=1, **DRAWN)
    next(short)
    scheduler.submit([1, 2] * 40, 1, tokens=True, seed=1)
    for _ in range(8):
        before = len(short.tokens)
        llm.runner.calls.clear()
        scheduler.tick()
        assert sorted(llm.runner.calls) == [1, 10]
        assert len(short.tokens) == before + 1


def test_states_are_bounded_in_bytes(native):
    size = native.session().nbytes
    scheduler = Scheduler(native, rows=10, state_bytes=3 * size)
    texts = [scheduler.submit([1, 2], 20, tokens=True, seed=i, **DRAWN) for i in range(6)]
    scheduler.tick()
    while scheduler.tick():
        assert scheduler.load[0] <= 3
    assert all(text.finish_reason == "length" for text in texts)


def test_texts_stop_as_they_do_alone():
    pieces = ["", "a", "b", "\n", "\nUs", "er:", b"\xf0\x9f", b"\x98\x80", "c"]
    said = ["a", b"\xf0\x9f", b"\x98\x80", "\nUs", "er:", "c"]
    for options, reason in [({"stop": "\nUser"}, "stop"), ({"max_tokens": 2}, "length"), ({}, "end")]:
        llm = scripted([1, 2], said, pieces)
        text = Scheduler(llm).submit([1, 2], temperature=0, **options)
        assert text.text() == scripted([1, 2], said, pieces).generate([1, 2], temperature=0, **options)
        assert text.finish_reason == reason


def test_a_thread_of_its_own_serves_many_callers(native):
    prompts = some_prompts(16, seed=2)
    got, told = {}, []

    def ask(i):
        text = scheduler.submit(prompts[i], 8, tokens=True, seed=i, notify=told.append, **DRAWN)
        got[i] = list(text)

    with Scheduler(native, rows=5, cache=StateCache()) as scheduler:
        assert scheduler.running
        callers = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    assert got == {i: alone(native, p, 8, seed=i, **DRAWN) for i, p in enumerate(prompts)}
    assert len(told) == 16 * 9  # every piece, and the end
    assert not scheduler.running


def test_what_is_not_done_at_the_end_is_cancelled(native):
    with Scheduler(native, rows=1) as scheduler:
        texts = [scheduler.submit([1], 10**6, tokens=True, **DRAWN) for _ in range(2)]
        next(texts[0])
    assert [text.finish_reason for text in texts] == ["closed", "closed"]
    assert list(texts[1]) == []


def test_a_failure_of_the_model_is_told_to_those_it_hits_and_others_go_on():
    llm = LLM.from_runner(Remembering())
    scheduler = Scheduler(llm, rows=1)
    works = llm.runner.forward
    llm.runner.forward = lambda tokens, state, logits: 1 / 0
    broken, fine = (scheduler.submit([1], 3, tokens=True, seed=1, **DRAWN) for _ in range(2))
    scheduler.tick()
    llm.runner.forward = works
    with pytest.raises(ZeroDivisionError):
        list(broken)
    assert (broken.finish_reason, len(list(fine))) == ("error", 3)


def test_a_text_that_cannot_go_on_fails_alone():
    llm = LLM.from_runner(Remembering(vocab_size=2))
    scheduler = Scheduler(llm)
    stuck = scheduler.submit([1], 3, tokens=True, banned=(0, 1))
    fine = scheduler.submit([1], 3, tokens=True, seed=1, **DRAWN)
    assert len(list(fine)) == 3
    with pytest.raises(ValueError, match="every token is banned"):
        list(stuck)


def test_wrong_requests_are_refused_when_they_are_made(native):
    scheduler = Scheduler(native)
    for wrong, message in [
        ({"prompt": [256]}, "got token 256, the model knows 0 to 255"),
        ({"prompt": []}, "nothing to go on from: give a prompt"),
        ({"prompt": [1], "max_tokens": -1}, "max_tokens must be 0 or more"),
        ({"prompt": [1], "top_p": 2}, "top_p must be between"),
        ({"prompt": [1], "stop": ""}, "a stop string is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.submit(**wrong)
    with pytest.raises(ValueError, match="rows and prefill must be 1 or more, got 0 and 256"):
        Scheduler(native, rows=0)
    assert scheduler.load == (0, 0)


def test_a_list_of_prompts_gives_a_list_of_texts(native):
    prompts = ["hello", "help", "", "x" * 50]
    options = {"seed": 3, "top_p": 0.9, "ignore_eos": True}
    with pytest.raises(ValueError, match="nothing to go on from"):
        native.generate(prompts, 5, **options)
    assert native.generate(prompts, 5, bos=True, **options) == [
        native.generate(p, 5, bos=True, **options) for p in prompts
    ]
    assert native.generate([[1, 2], [3]], 5, **options) == [native.generate(p, 5, **options) for p in ([1, 2], [3])]
    texts = native.generate(["hello"] * 3, 30, **options | {"seed": [1, 2, 1]})
    assert texts[0] == texts[2] != texts[1]
    with pytest.raises(ValueError, match="there are 2 seeds for 3 prompts"):
        native.generate(["hello"] * 3, seed=[1, 2])


def test_a_list_of_prompts_uses_the_models_own_cache(native):
    native.cache = StateCache()
    assert native.cache  # also where it is empty
    try:
        texts = [native.generate(["hello", "help"], 5, seed=1) for _ in range(2)]
        assert texts[0] == texts[1]
        assert len(native.cache) >= 2
    finally:
        native.cache = None


def test_what_prompts_share_is_read_once():
    llm = LLM.from_runner(Remembering())
    system, ends = [1, 2, 3] * 30, [[i, 5] for i in range(4, 12)]
    scheduler = Scheduler(llm, cache=StateCache())
    texts = [scheduler.submit(system + end, 3, tokens=True, seed=1, **DRAWN) for end in ends]
    scheduler.run()
    assert [list(text) for text in texts] == [alone(llm, system + end, 3, seed=1, **DRAWN) for end in ends]
    assert scheduler.counts["prompt_tokens"] == len(system) + 2 * len(ends)
    assert [text.cached for text in texts] == [0] + [len(system)] * 7


def test_states_are_free_as_soon_as_nobody_has_them(native):
    """Without the garbage collector, which comes late where states are few and large."""
    gc.disable()
    try:
        for cancel in (False, True):
            scheduler = Scheduler(native)
            text = scheduler.submit([1, 2], 3, tokens=True, seed=1, **DRAWN)
            scheduler.tick()
            if cancel:
                text.cancel()
            scheduler.run()
            state = weakref.ref(text.session._at.state)
            del text
            assert state() is None
        session = native.session()
        session.feed([1])
        list(session.stream_tokens(3, seed=1, speculate=2))
        state = weakref.ref(session._at.state)
        del session
        assert state() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ends", [False, True])
def test_the_next_turn_reads_only_what_is_new(ends):
    """The state at the end of a text is kept, too; of its last token no logits are known, so that one is read again."""
    llm = LLM.from_runner(Remembering(6))
    llm.cache = StateCache()
    options = {"tokens": True, "top_p": 1.0, "seed": 3 if ends else 1, "ignore_eos": not ends}
    scheduler = Scheduler(llm)
    first = scheduler.submit([1, 2, 3], 200 if ends else 9, **options)
    tokens = list(first)
    assert first.finish_reason == ("end" if ends else "length")
    turn = [1, 2, 3, *tokens, 4, 5]
    second = scheduler.submit(turn, 5, **options)
    assert list(second) == alone(llm, turn, 5, top_p=1.0, seed=options["seed"], ignore_eos=not ends)
    assert second.cached == 3 + len(tokens) - (not ends)


def test_log_probabilities_are_those_of_the_text_alone(native):
    text = Scheduler(native).submit([1, 2], 5, tokens=True, seed=1, logprobs=2, **DRAWN)
    list(text)
    session = native.session()
    session.feed([1, 2])
    stream = session.stream_tokens(5, seed=1, logprobs=2, **DRAWN)
    list(stream)
    assert text.logprobs == stream.logprobs
    assert len(text.logprobs) == 5


def test_nobody_waits_for_a_scheduler_that_failed(native, monkeypatch, caplog):
    with Scheduler(native) as scheduler:
        monkeypatch.setattr(scheduler, "_batch", lambda: 1 / 0)
        text = scheduler.submit([1], 3, tokens=True)
        with pytest.raises(ZeroDivisionError):
            list(text)
        monkeypatch.undo()
        assert len(list(scheduler.submit([1], 3, tokens=True, seed=1, **DRAWN))) == 3
    assert "the scheduler failed; all its requests end" in caplog.text


def test_texts_from_several_starts_share_batches_and_no_prefixes(native, tmp_path):
    config = native.runner.config
    starts = [native]
    for value in (0.3, -0.3):
        state = {f"layers.{i}.wkv": np.full(config.wkv_shape, value) for i in range(config.num_hidden_layers)}
        save_tuned_state(tmp_path / "start.pth", state, config)
        starts.append(native.starting_from(tmp_path / "start.pth"))
    scheduler = Scheduler(native, cache=StateCache())
    caches = [scheduler.cache, StateCache(), StateCache()]
    prompt = list(range(1, 40))
    for turn in range(2):
        texts = [
            scheduler.submit(prompt, 6, llm=llm, cache=cache, tokens=True, seed=7, **DRAWN)
            for llm, cache in zip(starts, caches)
        ]
        scheduler.run()
        assert [list(text) for text in texts] == [alone(llm, prompt, 6, seed=7, **DRAWN) for llm in starts]
        assert [text.cached for text in texts] == [0 if turn == 0 else len(prompt)] * 3
    assert scheduler.counts["ticks"] < 3 * 12
    with pytest.raises(ValueError, match="runs another model"):
        scheduler.submit(prompt, 6, llm=LLM.from_runner(TorchRunner(randomised("rwkv7-test"))))
    with pytest.raises(BadState, match="holds no tuned state"):
        native.starting_from(native.path)
