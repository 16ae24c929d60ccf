"""Test-time scaling (state_methods.md 1.6, oracle 1.9.8): it is true that …"""

import pytest
import torch
from support.language import randomised, some_tokens

from rookery.adapt.at_test_time import Budget, log_probs, of_tokens, reward_loss, sample, tune_at_test_time
from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.state_tuning import StartState

PROMPT = [5]


def model_of(seed=1, **more):
    model = randomised("rwkv7-test", dtype=torch.float32, seed=seed, **more).requires_grad_(False).eval()
    for block in model.blocks:
        block.att.output.weight.mul_(5)  # so that the state has a say
    return model


def tune(start, **given):
    return tune_at_test_time(start, PROMPT, **given)


@pytest.mark.parametrize("mode", ["distil", "reward"])
def test_no_steps_change_nothing(mode):
    model = model_of()
    start = StartState(model)
    spent = tune(start, mode=mode, guide=(model_of(2), None), budget=Budget(steps=0))
    assert spent.forward_equivalents == 0
    tokens = some_tokens(model, 1, 9)
    assert torch.equal(model(tokens, start(1))[0], model(tokens)[0])


def test_the_best_of_one_is_plain_sampling():
    start = StartState(model_of())
    budget = Budget(answers=1, length=7, seed=4)
    spent = tune(start, mode="select", score=len, budget=budget)
    drawn = {"count": 1, "length": 7, "generator": torch.Generator().manual_seed(4)}
    assert [spent.answer] == sample(start.model[0], start, PROMPT, **drawn).tolist()


def test_equal_rewards_give_no_gradient():
    model = model_of()
    start = StartState(model)
    answers = some_tokens(model, 4, 6)
    log_p = log_probs(model, start, PROMPT, answers)
    loss = reward_loss(log_p, log_p.detach(), answers, torch.full((4,), 2.5), beta=0.0)
    loss.backward()
    assert all(not wkv.grad.any() for wkv in start.wkv)


def test_distilling_brings_the_model_to_its_guide():
    model = model_of()
    hidden, start = StartState(model), KernelStart(model, features=32)
    with torch.no_grad():
        for i, wkv in enumerate(hidden.wkv):
            wkv.copy_(torch.randn(wkv.shape, generator=torch.Generator().manual_seed(i)))
    start.calibrate(some_tokens(model, 2, 40))
    spent = tune(start, mode="distil", guide=(model, hidden), budget=Budget(steps=12, length=8))
    assert len(spent.losses) == 12
    assert sum(spent.losses[-3:]) / 3 < 0.7 * spent.losses[0]
    # writing and reading again by a guide of the model's size, and a forward and a backward pass
    assert spent.forward_equivalents == pytest.approx(12 * 4 * (1 + 8) * 5)


def test_rewards_raise_the_score():
    start = StartState(model_of())
    wanted = {7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
    score = lambda answer: sum(token in wanted for token in answer) / len(answer)  # noqa: E731
    spent = tune(start, mode="reward", score=score, budget=Budget(steps=40, answers=16, length=3, lr=0.3, beta=0.0))
    assert sum(spent.scores[-10:]) / 10 > sum(spent.scores[:10]) / 10 + 0.1


def test_a_guides_probability_is_the_score_where_none_is_given():
    model, guide = model_of(), model_of(2)
    spent = tune(StartState(model), mode="select", guide=(guide, None), budget=Budget(answers=5, length=4))
    best = torch.tensor([spent.answer])
    assert float(of_tokens(log_probs(guide, None, PROMPT, best), best)) == pytest.approx(max(spent.scores), rel=1e-5)


def test_a_temperature_of_zero_takes_the_likeliest():
    model = model_of()
    drawn = {"count": 2, "length": 3, "generator": torch.Generator(), "temperature": 0}
    one, two = sample(model, None, PROMPT, **drawn).tolist()
    assert one == two
    assert one[0] == int(model(torch.tensor([PROMPT]))[0][0, -1].argmax())


def test_what_is_missing_is_told():
    start = StartState(model_of())
    with pytest.raises(ValueError, match="mode must be one of distil, reward, select"):
        tune(start, mode="think")
    with pytest.raises(ValueError, match="mode 'distil' needs a guide$"):
        tune(start, mode="distil", score=len)
    with pytest.raises(ValueError, match="mode 'reward' needs a guide, or a score"):
        tune(start, mode="reward")
    with pytest.raises(ValueError, match="the guide has 80 tokens, the model 64"):
        tune(start, mode="distil", guide=(model_of(vocab_size=80), None))
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        tune_at_test_time(start, [], mode="select", score=len)
