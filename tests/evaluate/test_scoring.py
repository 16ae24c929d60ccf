import pytest
import torch
from support.language import randomised

from rookery.adapt.state_tuning import StartState
from rookery.evaluate.scoring import Request, Scorer

FAMILIES = ("rwkv4-test", "rwkv7-test", "transformer-test")


def model_of(name="rwkv7-test"):
    model = randomised(name)
    return model.eval()


def requests_of(model):
    """Contexts that share beginnings, repeat, contain each other; targets of every length."""
    vocab, generator = model.config.vocab_size, torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(1, vocab, (n,), generator=generator).tolist()  # noqa: E731
    header, question, other = [0, *draw(30)], draw(20), draw(25)
    contexts = [
        header + question,
        header + other,
        header,
        header + question,
        [0],
        [0, *draw(5)],
        header + question + other,
    ]
    requests = [Request(c, draw(n)) for c, n in zip(contexts, (3, 1, 2, 4, 6, 1, 2))]
    return [*requests, Request(contexts[0], requests[0].target), Request(header, [])]


@torch.no_grad()
def by_hand(model, request, start=None):
    logits, _ = model(torch.tensor([[*request.context, *request.target]]), start and start(1))
    log_probs = logits[0].float().log_softmax(-1)
    places = range(len(request.context) - 1, len(request.context) + len(request.target) - 1)
    total = sum(float(log_probs[p, t]) for p, t in zip(places, request.target))
    return total, all(int(log_probs[p].argmax()) == t for p, t in zip(places, request.target))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("budget", "rows", "reuse"), [(4096, 256, True), (4096, 256, False), (13, 256, True), (4096, 2, True)]
)
def test_scores_are_those_of_each_request_alone(name, budget, rows, reuse):
    model = model_of(name)
    requests = requests_of(model)
    found = Scorer(model, budget=budget, rows=rows, reuse=reuse).score(requests)
    for request, score in zip(requests, found, strict=True):
        total, greedy = by_hand(model, request)
        assert score.log_prob == pytest.approx(total, abs=1e-5)
        assert score.is_greedy == greedy


def test_the_likeliest_continuation_is_greedy():
    model = model_of()
    context, target = [0, 3, 4], []
    for _ in range(3):
        logits, _ = model(torch.tensor([[*context, *target]]))
        target.append(int(logits[0, -1].argmax()))
    wrong = [*target[:-1], (target[-1] + 1) % model.config.vocab_size]
    found = Scorer(model).score([Request(context, target), Request(context, wrong)])
    assert [score.is_greedy for score in found] == [True, False]


def test_what_requests_share_is_read_once():
    model = model_of()
    requests = requests_of(model)
    shared, plain = Scorer(model), Scorer(model, reuse=False)
    shared.score(requests)
    plain.score(requests)
    assert plain.tokens_read == plain.tokens_asked == shared.tokens_asked
    assert shared.tokens_read < 0.5 * shared.tokens_asked


def test_the_distribution_behind_a_context_is_given_on_request():
    model = model_of()
    requests = requests_of(model)
    found = Scorer(model).score(requests, first=True)
    for request, score in zip(requests, found):
        logits, _ = model(torch.tensor([request.context]))
        torch.testing.assert_close(score.first_log_probs, logits[0, -1].float().log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_texts_may_begin_from_a_tuned_state():
    model = model_of()
    start = StartState(model)
    with torch.no_grad():
        for wkv in start.wkv:
            wkv.add_(0.5)
    requests = requests_of(model)
    for request, score in zip(requests, Scorer(model, start=start).score(requests)):
        assert score.log_prob == pytest.approx(by_hand(model, request, start)[0], abs=1e-5)


def test_an_empty_context_is_refused():
    with pytest.raises(ValueError, match="empty context: nothing predicts its first token"):
        Scorer(model_of()).score([Request([], [1])])
    with pytest.raises(ValueError, match="budget and rows must be at least 1"):
        Scorer(model_of(), budget=0)
