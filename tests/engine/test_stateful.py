"""Scheduler, cache and sessions under any order of events, against one text at a time."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.engine import Read, Remembering

from rookery.engine.llm import LLM
from rookery.engine.position import Position
from rookery.engine.scheduler import Scheduler
from rookery.engine.state_cache import StateCache
from rookery.errors import BadState

VOCAB = 6
PROMPT = st.lists(st.integers(1, 2), min_size=1, max_size=40)
SETTINGS = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class Schedule(RuleBasedStateMachine):
    """Requests come, are cancelled, forked and gone on with; every text is a beginning of the one it has alone."""

    texts = Bundle("texts")

    @initialize(rows=st.integers(1, 4), prefill=st.integers(1, 50), budget=st.sampled_from([None, 0, 300, 1 << 20]))
    def begin(self, rows, prefill, budget):
        self.llm = LLM.from_runner(Remembering(VOCAB))
        cache = None if budget is None else StateCache(budget)
        self.scheduler = Scheduler(self.llm, rows=rows, prefill=prefill, cache=cache)
        self.requests = []

    def alone(self, prompt, order):
        session = self.llm.session()
        session.feed(prompt)
        return list(session.stream_tokens(order["max_tokens"], seed=order["seed"], top_p=1.0))

    @rule(target=texts, prompt=PROMPT, max_tokens=st.integers(0, 12), seed=st.integers(0, 3))
    def submit(self, prompt, max_tokens, seed):
        order = {"max_tokens": max_tokens, "seed": seed}
        text = self.scheduler.submit(prompt, tokens=True, top_p=1.0, **order)
        self.requests.append((text, prompt, order))
        return text

    @rule(target=texts, text=texts, more=PROMPT, seed=st.integers(0, 3))
    def go_on_with_a_fork(self, text, more, seed):
        if not text.done or text.session is None:
            return text
        branch = text.session.fork()
        told = [*branch._at.state.tokens, *branch._at.unread, *more]
        order = {"max_tokens": 5, "seed": seed}
        follow = self.scheduler.submit(more, session=branch, tokens=True, top_p=1.0, **order)
        self.requests.append((follow, told, order))
        return follow

    @rule(text=texts)
    def cancel(self, text):
        text.cancel()

    @rule(times=st.integers(1, 6))
    def tick(self, times):
        for _ in range(times):
            self.scheduler.tick()

    @invariant()
    def bounds_hold(self):
        if hasattr(self, "scheduler"):
            assert self.scheduler.load[0] <= self.scheduler.rows
            cache = self.scheduler.cache
            assert cache is None or cache.nbytes <= cache.budget

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.run()
        for text, prompt, order in self.requests:
            got, expected = list(text), self.alone(prompt, order)
            assert text.error is None
            assert got == expected[: len(got)]
            if text.finish_reason != "closed":
                assert got == expected
                session = text.session
                assert [*session._at.state.tokens, *session._at.unread] == prompt + expected


class Kept(Read):
    nbytes = 100

    def copy(self):
        return Kept(self.tokens)


class KeptRunner(Remembering):
    def init_state(self, tensors=None):
        return Kept() if tensors is None else Kept(tensors["layers.0.tokens"][0].tolist())


class Cache(RuleBasedStateMachine):
    """What is found is the longest prefix of those that can still be there, and is that prefix's state."""

    @initialize(budget=st.integers(0, 900), disk=st.sampled_from([None, 0, 3000, 1 << 20]))
    def begin(self, budget, disk):
        self.folder = None if disk is None else tempfile.TemporaryDirectory()
        self.options = {"budget": budget, "folder": self.folder and self.folder.name, "disk_budget": disk or 0}
        self.cache = self.open()
        self.kept = set()

    def open(self):
        cache = StateCache(**self.options)
        cache.bind(KeptRunner(VOCAB))
        return cache

    @rule(prefix=PROMPT)
    def keep(self, prefix):
        self.cache.keep(prefix, Position(Kept(prefix), np.full(3, len(prefix), np.float32)))
        self.kept.add(tuple(prefix))

    @rule(tokens=PROMPT)
    def find(self, tokens):
        there = {*self.cache.prefixes()}
        hit = self.cache.find(tokens)
        known = [prefix for prefix in there if tuple(tokens[: len(prefix)]) == prefix]
        assert hit.length == max(map(len, known), default=0)
        assert hit.shared >= hit.length
        if hit.position is not None:
            assert hit.position.state.tokens == tokens[: hit.length]
            assert (hit.position.logits == hit.length).all()
            hit.position.state.tokens.clear()  # the caller's own

    @rule()
    def start_again(self):
        self.cache.close()
        before = {*self.cache.prefixes()} if self.options["folder"] else set()
        self.cache = self.open()
        if self.options["disk_budget"] >= 1 << 20:
            assert {*self.cache.prefixes()} == before

    @invariant()
    def bounds_hold(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        assert {*cache.prefixes()} <= self.kept
        assert cache.nbytes <= max(cache.budget, 300)  # one that was asked for may be larger than the budget
        assert cache.disk_nbytes <= cache.disk_budget
        if cache.folder is not None:
            sizes = [file.stat().st_size for file in Path(cache.folder).iterdir()]
            assert sum(sizes) == cache.disk_nbytes

    def teardown(self):
        if getattr(self, "folder", None) is not None:
            self.folder.cleanup()


class Talks(RuleBasedStateMachine):
    """Sessions are fed, write, are forked, kept, rewound, saved and loaded; each knows exactly its own text."""

    talks = Bundle("talks")

    def __init__(self):
        super().__init__()
        self.llm = LLM.from_runner(Remembering(VOCAB))
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "talk.state"

    def teardown(self):
        self.folder.cleanup()

    def talk(self, session, told, kept=()):
        talk = SimpleNamespace(session=session, told=list(told), kept=dict(kept))
        self.check(talk)
        return talk

    @staticmethod
    def check(talk):
        at = talk.session._shown()
        assert [*at.state.tokens, *at.unread] == talk.told
        assert list(at.recent) == talk.told[-len(at.recent) :] if at.recent else True
        assert talk.session.kept == sorted(talk.kept)

    @rule(target=talks, prompt=PROMPT)
    def begin(self, prompt):
        session = self.llm.session()
        session.feed(prompt)
        return self.talk(session, prompt)

    @rule(talk=talks, more=PROMPT)
    def feed(self, talk, more):
        talk.session.feed(more)
        talk.told += more
        assert talk.session.tokens_seen == len(talk.told)
        self.check(talk)

    @rule(talk=talks, most=st.integers(0, 8), left=st.integers(0, 8), seed=st.integers(0, 2), guess=st.integers(0, 3))
    def write(self, talk, most, left, seed, guess):
        """A stream that is read to its end, or left open in the middle."""
        fresh = self.llm.session()
        fresh.feed(talk.told)
        expected = list(fresh.stream_tokens(most, seed=seed, top_p=1.0))
        stream = talk.session.stream_tokens(most, seed=seed, top_p=1.0, speculate=guess)
        got = [token for token, _ in zip(stream, range(left))]
        assert got == expected[:left]
        talk.told += stream.tokens
        self.check(talk)

    @rule(target=talks, talk=talks)
    def fork(self, talk):
        return self.talk(talk.session.fork(), talk.told, talk.kept)

    @rule(talk=talks)
    def keep(self, talk):
        assert talk.session.keep() == len(talk.told)
        talk.kept[len(talk.told)] = list(talk.told)
        self.check(talk)

    @rule(talk=talks, which=st.integers(0, 5))
    def rewind(self, talk, which):
        places = sorted(talk.kept)
        if which >= len(places):
            with pytest.raises(BadState, match="no snapshot after 12345 tokens is kept"):
                talk.session.rewind(12345)
            return
        talk.session.rewind(places[which])
        talk.told = list(talk.kept[places[which]])
        talk.kept = {place: told for place, told in talk.kept.items() if place <= places[which]}
        self.check(talk)

    @rule(target=talks, talk=talks)
    def save_and_load(self, talk):
        talk.session.save(self.file)
        return self.talk(self.llm.session(self.file), talk.told)


def test_any_order_of_uses_of_sessions_leaves_each_its_own_text():
    run_state_machine_as_test(Talks, settings=SETTINGS)


def test_any_order_of_requests_gives_the_texts_that_each_has_alone():
    run_state_machine_as_test(Schedule, settings=SETTINGS)


def test_any_order_of_uses_of_the_cache_finds_the_longest_prefix():
    run_state_machine_as_test(Cache, settings=SETTINGS)
