import numpy as np
import pytest
from support.engine import Read, Remembering

from rookery.engine.llm import LLM
from rookery.engine.position import Position
from rookery.engine.state_cache import EVERY, StateCache, common, read_prompt
from rookery.errors import BadState

SIZE = 100
"""Bytes of a snapshot here."""


class Weighed(Read):
    nbytes = SIZE

    def copy(self):
        return Weighed(self.tokens)


class Runner(Remembering):
    def init_state(self, tensors=None):
        return Weighed() if tensors is None else Weighed(tensors["layers.0.tokens"][0].tolist())


def position(*tokens):
    return Position(Weighed(tokens), None, recent=tokens[-8:])


def cache_of(*prefixes, **options):
    cache = StateCache(**options)
    cache.bind(Runner())
    for prefix in prefixes:
        cache.keep(prefix, position(*prefix))
    return cache


def found(cache, *tokens):
    hit = cache.find(tokens)
    if hit.position is not None:
        assert hit.position.state.tokens == list(tokens[: hit.length])
    return hit.length, hit.shared


def test_the_longest_known_prefix_is_found():
    cache = cache_of((1, 2, 3), (1, 2, 3, 4, 5), (1, 9), (7,))
    assert found(cache, 1, 2, 3, 4, 5, 6) == (5, 5)
    assert found(cache, 1, 2, 3, 4, 8) == (3, 4)
    assert found(cache, 1, 2) == (0, 2)
    assert found(cache, 1, 9) == (2, 2)
    assert found(cache, 8) == (0, 0)
    assert found(cache) == (0, 0)
    assert len(cache) == 4
    assert {*cache.prefixes()} == {(1, 2, 3), (1, 2, 3, 4, 5), (1, 9), (7,)}


def test_what_is_found_is_the_callers_own():
    cache = cache_of((1, 2))
    cache.find((1, 2)).position.state.tokens.append(3)
    assert found(cache, 1, 2) == (2, 2)


def test_a_snapshot_must_be_of_its_prefix():
    with pytest.raises(ValueError, match=r"the state has read 1 tokens \(0 are unread\), the prefix has 2"):
        cache_of().keep((1, 2), position(1))
    with pytest.raises(ValueError, match="budgets are bytes"):
        StateCache(-1)


def test_the_least_recently_used_goes_first_and_memory_stays_in_its_budget():
    cache = cache_of((1, 2), (1, 3), (4,), budget=3 * (SIZE + 8))
    assert found(cache, 1, 2) == (2, 2)
    cache.keep((5, 5), position(5, 5))
    assert found(cache, 1, 3) == (0, 1)
    assert found(cache, 1, 2)[0] == 2
    assert (len(cache), cache.nbytes <= cache.budget) == (3, True)
    cache.clear()
    assert (len(cache), cache.nbytes, found(cache, 1, 2)) == (0, 0, (0, 0))


def test_nothing_fits_a_budget_of_nothing():
    cache = cache_of((1, 2), (3,), budget=0)
    assert (len(cache), cache.nbytes, found(cache, 1, 2)) == (0, 0, (0, 0))


def test_what_does_not_fit_goes_to_the_disk_and_comes_back(tmp_path):
    cache = cache_of((1, 2), (1, 3), (4,), budget=SIZE + 20, folder=tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    for prefix in [(1, 2), (1, 3), (4,)]:
        assert found(cache, *prefix)[0] == len(prefix)
        assert cache.nbytes <= cache.budget
    assert cache.disk_nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_files_of_an_earlier_run_are_found_again(tmp_path):
    cache_of((1, 2), (1, 3, 4), folder=tmp_path).close()
    again = cache_of(folder=tmp_path)
    assert found(again, 1, 2) == (2, 2)
    assert found(again, 1, 3, 4, 5) == (3, 3)


def test_the_disk_has_a_budget_too(tmp_path):
    cache_of((1, 2), folder=tmp_path).close()
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    cache = cache_of((1, 3), (1, 4), (1, 5), folder=tmp_path, disk_budget=2 * size)
    cache.close()
    assert len([*tmp_path.iterdir()]) == 2
    assert cache.disk_nbytes <= 2 * size


def test_a_damaged_file_is_forgotten_and_said(tmp_path, caplog):
    cache_of((1,), (1, 2), folder=tmp_path).close()
    longest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(longest.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte after the header
    longest.write_bytes(data)
    cache = cache_of(folder=tmp_path)
    assert found(cache, 1, 2)[0] == 1
    assert "a kept state is lost and its prefix will be read again" in caplog.text
    assert not longest.exists()


def test_files_of_others_are_left_alone(tmp_path, caplog):
    (tmp_path / "note.state").write_text("no state")
    other = Runner()
    other.fingerprint = lambda: "other"
    cache = StateCache(folder=tmp_path)
    cache.bind(other)
    cache.keep((1, 2), position(1, 2))
    cache.close()
    mine = cache_of(folder=tmp_path)
    assert found(mine, 1, 2) == (0, 0)
    assert len([*tmp_path.iterdir()]) == 2
    assert "is no state file and is left alone" in caplog.text


def test_a_cache_is_for_one_model():
    other = Runner()
    other.fingerprint = lambda: "other"
    with pytest.raises(BadState, match="holds the states of another model"):
        cache_of().bind(other)


def test_a_prompt_is_read_once():
    llm = LLM.from_runner(Runner())
    llm.cache = StateCache()
    prompt = [1 + i % 30 for i in range(2 * EVERY + 5)]
    session = read_prompt(llm, prompt, llm.cache)
    assert llm.runner.calls == [EVERY, EVERY, 5]
    llm.runner.calls.clear()
    again = read_prompt(llm, prompt, llm.cache)
    assert llm.runner.calls == []
    assert session._at.state.tokens == again._at.state.tokens == prompt
    np.testing.assert_array_equal(session._at.logits, again._at.logits)
    read_prompt(llm, [*prompt[:700], 31, 31], llm.cache)  # the branch gets a snapshot of its own
    assert llm.runner.calls == [700 - EVERY, 2]
    llm.runner.calls.clear()
    read_prompt(llm, [*prompt[:700], 30, 30], llm.cache)
    assert llm.runner.calls == [2]


def test_a_cached_prompt_gives_the_same_text():
    llm = LLM.from_runner(Remembering(256), tokenizer="bytes")
    options = {"seed": 1, "top_p": 1.0, "ignore_eos": True}
    first = llm.generate([1, 2, 3], 20, **options)
    llm.cache = StateCache()
    assert [llm.generate([1, 2, 3], 20, **options) for _ in range(2)] == [first, first]
    llm.runner.calls.clear()
    llm.generate([1, 2, 3], 1, **options)
    assert llm.runner.calls == []


@pytest.mark.parametrize(
    ("a", "b", "length"), [([], [1], 0), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)]
)
def test_common_prefixes(a, b, length):
    assert common(a, b) == common(b, a) == length


def test_a_full_disk_costs_a_snapshot_and_nothing_else(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rookery.engine.state_cache.write_position", full)
    cache = cache_of((1, 2), (3, 4), budget=SIZE + 20, folder=tmp_path)
    assert (found(cache, 1, 2)[0], found(cache, 3, 4)[0]) == (0, 2)
    assert "a state is not kept: [Errno 28] No space left on device" in caplog.text
