import gc
import random

import numpy as np
import pytest
import torch
from support.graphs import Recorded, Recorder
from support.language import names, randomised, some_tokens

from rookery.engine.beam import beam_search
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.runners.torch_graphs import SIZES, Steps, size_for
from rookery.engine.scheduler import Scheduler
from rookery.engine.state_cache import StateCache
from rookery.models import create_model, save_model

STATIC = [name for name in names() if create_model(name, device="meta").static_step]
DRAWN = {"top_p": 1.0, "ignore_eos": True}


def described(args):
    """Tensors by shape and type, other arguments by value."""
    return [
        [tuple(arg.shape), arg.dtype]
        if isinstance(arg, torch.Tensor)
        else described(arg)
        if isinstance(arg, list | tuple)
        else str(arg)
        for arg in args
    ]


@pytest.mark.parametrize("name", STATIC)
def test_steps_that_are_said_to_be_alike_are(name):
    """The same operators on the same shapes with the same numbers from the host, token after token."""
    model = randomised(name, dtype=torch.float32).eval()
    state, first = model.init_state(2), None
    for i, between in enumerate((0, 0, 2, 30, 40)):
        with torch.inference_mode():
            _, state = model.features(some_tokens(model, 2, between), state, None)
        column = some_tokens(model, 2, 1, seed=i)
        with torch.inference_mode(), Recorder() as recorder:
            features, state = model.features(column, state, None)
            model.head(features)
        told = [(str(func), described(args), described([*given.values()])) for func, args, given, _ in recorder.calls]
        first = first or told
        assert told == first, f"after {between} more"


def test_the_recurrent_families_are_among_them():
    assert {f"rwkv{i}-test" for i in (4, 5, 6, 7)} <= {*STATIC}
    assert not {"transformer-test", "rwkv-x-test", "goldfinch-test", "arwkv-hybrid-test"} & {*STATIC}


def recorded(model):
    """A runner on the CPU whose steps are captured as on a GPU, and one without."""
    runner, plain = TorchRunner(model), TorchRunner(model)
    runner.steps = Steps(model, runner._logits, Recorded())
    return runner, plain


class Pair:
    """A row in a runner with captured steps, and the same row in one without."""

    def __init__(self, runner, plain, states=None):
        self.runners = runner, plain
        self.states = states or [runner.init_state(), plain.init_state()]

    def fork(self):
        return Pair(*self.runners, [state.copy() for state in self.states])

    def check(self):
        ours, theirs = self.states
        assert ours.tokens_seen == theirs.tokens_seen
        assert ours.nbytes == theirs.nbytes
        mine = ours.tensors()
        for name, tensor in theirs.tensors().items():
            np.testing.assert_allclose(mine[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def advance(pairs, rows, wanted="last"):
    """Reads tokens in all rows, side by side; the logits must be equal."""
    got, expected = (
        runner.forward_rows(rows, [pair.states[i] for pair in pairs], [wanted] * len(rows))
        for i, runner in enumerate(pairs[0].runners)
    )
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STATIC)
def test_replayed_steps_are_those_of_the_model(name):
    """Rows come and go, are forked and looked at, prompts are read beside them."""
    model = randomised(name, dtype=torch.float32)
    runner, plain = recorded(model)
    draw = random.Random(1)
    pairs = [Pair(runner, plain) for _ in range(3)]
    for _ in range(25):
        match draw.randrange(6):
            case 0:
                pairs.append(Pair(runner, plain))
            case 1:
                pairs.append(draw.choice(pairs).fork())
            case 2 if len(pairs) > 1:
                pairs.remove(draw.choice(pairs))
            case 3:
                draw.choice(pairs).check()
        chosen = draw.sample(pairs, draw.randint(1, len(pairs)))
        lengths = [draw.choice([1, 1, 1, 5]) for _ in chosen]
        advance(chosen, [[draw.randrange(1, model.config.vocab_size) for _ in range(n)] for n in lengths])
    for pair in pairs:
        pair.check()


def test_sizes_are_captured_once_and_seats_become_free(model):
    runner, plain = recorded(model)
    capture = runner.steps._capture
    pairs = [Pair(runner, plain) for _ in range(9)]
    for count, captures in ((9, 1), (9, 1), (3, 2), (4, 2), (1, 3), (9, 3)):
        advance(pairs[:count], [[1 + count]] * count)
        assert capture.captures == captures
    seats = runner.steps._seats
    assert seats.batch == 16
    del pairs[2:]
    gc.collect()
    advance(pairs, [[3], [4]])
    assert len(runner.steps._present()) == 2
    assert runner.steps._seats is seats
    advance(pairs + [Pair(runner, plain) for _ in range(20)], [[5]] * 22)  # more seats: all is captured anew
    assert runner.steps._seats.batch == 24
    advance(pairs, [[3], [4]])
    pairs[1].check()


@pytest.fixture(scope="module")
def model():
    return randomised("rwkv7-test", dtype=torch.float32, vocab_size=64)


def test_logits_are_the_callers_own_and_only_those_asked_for_come(model):
    runner, plain = recorded(model)
    state = runner.init_state()
    first = runner.forward([1], state)
    kept = first.copy()
    assert runner.forward([2], state, "none").shape == (0, 64)
    assert runner.forward([3], state, "all").shape == (1, 64)
    np.testing.assert_array_equal(first, kept)
    expected = plain.forward([1, 2, 3], plain.init_state(), "all")
    np.testing.assert_allclose(first[0], expected[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a state is in the batch twice"):
        runner.forward_rows([[1], [2]], [state, state], ["last"] * 2)


def test_texts_of_the_engine_do_not_change(model):
    runner, plain = recorded(model)
    found = []
    for each in (runner, plain):
        llm = LLM.from_runner(each)
        scheduler = Scheduler(llm, rows=5, prefill=20, cache=StateCache())
        texts = [
            scheduler.submit([1 + i, *[7] * (9 * i)], 6 + i, tokens=True, seed=i, temperature=i % 2, **DRAWN)
            for i in range(8)
        ]
        scheduler.tick()
        texts[0].cancel()
        scheduler.run()
        found.append([list(text) for text in texts[1:]])
        found[-1] += [beam.tokens for beam in beam_search(llm, [3, 4], 3, 5)]
        session = llm.session()
        session.feed([5, 6])
        found[-1] += [list(session.stream_tokens(12, seed=3, speculate=3, **DRAWN)), session.tokens_seen]
    assert found[0] == found[1]


def test_what_cannot_be_captured_runs_without(model, caplog):
    runner, plain = recorded(model)

    def refuse(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    runner.steps = Steps(model, runner._logits, refuse)
    pairs = [Pair(runner, plain) for _ in range(3)]
    for _ in range(2):
        advance(pairs, [[1], [2], [3, 4]])
    for pair in pairs:
        pair.check()
    said = "steps of this model cannot be captured and run slower: operation not permitted when stream is capturing"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_model_on_the_cpu_is_not_captured(model):
    assert TorchRunner(model).steps is None


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 4), (9, 16), (64, 64), (65, 128), (130, 192)])
def test_batches_are_filled_up_to_a_captured_size(rows, size):
    assert size_for(rows) == size
    assert size % SIZES[-1] == 0 or size in SIZES


@pytest.mark.gpu
@pytest.mark.parametrize("name", STATIC)
def test_replayed_steps_are_those_of_the_model_on_a_gpu(name):
    model = randomised(name, dtype=torch.float32).cuda()
    runner, plain = TorchRunner(model), TorchRunner(model)
    plain.steps = None
    pairs = [Pair(runner, plain) for _ in range(6)]
    for turn in range(20):
        chosen = pairs[: 1 + turn % 6]
        advance(chosen, [[1 + turn + i] for i in range(len(chosen))])
        if turn == 11:
            pairs[0].check()
            pairs[2] = pairs[1].fork()
            advance(pairs[:3], [[5], [6, 7], [8]])
    assert not runner.steps.broken
    for pair in pairs:
        pair.check()


@pytest.mark.gpu
def test_a_model_file_runs_on_a_gpu_with_captured_steps(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors")
    llm, cpu = LLM(tmp_path / "m.safetensors", device="cuda"), LLM(tmp_path / "m.safetensors", device="cpu")
    prompts = [[1 + i] * (3 + i) for i in range(5)]
    for prompt in prompts:
        streams = []
        for each in (llm, cpu):
            session = each.session()
            session.feed(prompt)
            streams.append(list(session.stream_tokens(20, temperature=0, ignore_eos=True)))
        assert streams[0] == streams[1]
    assert llm.runner.steps is not None
    assert not llm.runner.steps.broken
