"""The observer (state_methods.md 1.3, oracle 1.9.7): it is true that …"""

import pytest
import torch
from support.language import randomised, some_tokens
from torch.nn.functional import kl_div

from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.observer import Observer
from rookery.adapt.state_tuning import StartState


def model_of(name="rwkv7-test", dtype=torch.float64, **more):
    return randomised(name, dtype=dtype, **more).requires_grad_(False).eval()


@pytest.mark.parametrize("name", ["rwkv6-test", "rwkv7-test"])
def test_a_model_that_watches_itself_sees_everything(name):
    model, tokens = model_of(name), None
    tokens = some_tokens(model, 4, 60)
    observer = Observer(model, model, tokens, ridge=1e-9)
    for o in observer.maps:
        torch.testing.assert_close(o, torch.eye(len(o), dtype=o.dtype), rtol=0, atol=1e-4)
    assert min(observer.r2(tokens)) > 1 - 1e-6
    found = observer.loss(tokens, StartState(model))
    assert found.obs < 1e-8
    assert found.kl < 1e-9


def test_a_hidden_tuned_state_is_found_by_watching():
    model = model_of(num_hidden_layers=2, dtype=torch.float32)
    tokens = some_tokens(model, 16, 12)
    hidden = StartState(model)
    with torch.no_grad():
        for i, wkv in enumerate(hidden.wkv):
            wkv.copy_(torch.randn(wkv.shape, generator=torch.Generator().manual_seed(i)) * 0.5)

    class Tuned(type(model)):
        """The student with a state that nobody told it of."""

        def features(self, tokens, state=None, cu_seqlens=None):
            return super().features(tokens, hidden(tokens.shape[0]) if state is None else state, cu_seqlens)

    teacher = model_of(num_hidden_layers=2, dtype=torch.float32)
    teacher.__class__ = Tuned
    observer = Observer(model, teacher, tokens, kl_weight=1.0)
    observer.maps = [torch.eye(len(o), dtype=o.dtype) for o in observer.maps]  # one model, one width
    start = StartState(model)
    before = observer.loss(tokens, start)
    optimizer = torch.optim.Adam(start.parameters(), lr=0.1, betas=(0.9, 0.99))
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.97 ** max(0, step - 40)
        found = observer.loss(tokens, start)
        optimizer.zero_grad()
        (found.kl + found.obs).backward()
        optimizer.step()
    with torch.no_grad():
        taught, learned = teacher(tokens)[0].log_softmax(-1), model(tokens, start(16))[0].log_softmax(-1)
        kl = kl_div(learned.flatten(0, 1), taught.flatten(0, 1), reduction="batchmean", log_target=True)
    assert before.kl > 0.01
    assert kl < 1e-3


def test_a_kernel_state_may_follow_too_and_widths_may_differ():
    student, teacher = model_of(), model_of(hidden_size=48, num_hidden_layers=5)
    tokens = some_tokens(student, 2, 20)
    start = KernelStart(student, features=20)
    start.calibrate(tokens)
    observer = Observer(student, teacher, tokens)
    assert [tuple(o.shape) for o in observer.maps] == [(32, 48)] * 3
    loss = observer.loss(tokens, start)
    loss.loss.backward()
    assert all(wkv.grad.any() for wkv in start.wkv)
    assert len(observer.r2(tokens, start)) == 3


def test_other_vocabularies_are_refused_unless_probabilities_do_not_count():
    student, teacher = model_of(), model_of(vocab_size=80)
    tokens = some_tokens(student, 2, 20)
    with pytest.raises(ValueError, match="the observed model has 80 tokens, the student 64"):
        Observer(student, teacher, tokens)
    assert Observer(student, teacher, tokens, kl_weight=0).loss(tokens, StartState(student)).kl == 0
