import pytest
import torch
from support.language import randomised
from torch.nn.functional import cross_entropy

from rookery.adapt.state_tuning import StartState, load_start, save_start, started_from
from rookery.engine.llm import LLM
from rookery.errors import BadState
from rookery.models import create_model, save_model

MATRICES = ("rwkv5-test", "rwkv6-test", "rwkv7-test")
FAMILIES = ("rwkv4-test", *MATRICES)


def model_of(name, dtype=torch.float64):
    model = randomised(name, dtype=dtype)
    return model.requires_grad_(False).eval()


def tokens_of(model, rows=2, length=9):
    return torch.randint(1, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def scattered(start, scale=0.3):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(scale * torch.rand(parameter.shape, generator=generator))
    return start


@pytest.mark.parametrize("name", FAMILIES)
def test_an_untrained_start_is_the_model_itself(name):
    model = model_of(name)
    tokens = tokens_of(model)
    logits, state = model(tokens, StartState(model, shifts=True)(2))
    plain, plain_state = model(tokens)
    if name in MATRICES:
        assert torch.equal(logits, plain)
        assert all(torch.equal(t, plain_state.tensors()[k]) for k, t in state.tensors().items())
    else:
        torch.testing.assert_close(logits, plain)


def loss_of(model, start, tokens):
    logits, _ = model(tokens[:, :-1], start(tokens.shape[0]))
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_agree_with_finite_differences(name):
    model = model_of(name)
    start, tokens = scattered(StartState(model, shifts=True)), tokens_of(model)
    loss_of(model, start, tokens).backward()
    random, h = torch.Generator().manual_seed(3), 1e-5
    for parameter in start.parameters():
        for _ in range(3):
            i = int(torch.randint(parameter.numel(), (), generator=random))
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * h
                    found.append(loss_of(model, start, tokens))
                    parameter.view(-1)[i] -= sign * h
            slope = (found[0] - found[1]) / (2 * h)
            torch.testing.assert_close(parameter.grad.view(-1)[i], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_the_start_lowers_the_loss_and_leaves_the_model_alone(name):
    model = model_of(name, torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    start, tokens = StartState(model), tokens_of(model, rows=4)
    optimizer = torch.optim.Adam(start.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = loss_of(model, start, tokens)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        start.project()
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    if name == "rwkv4-test":
        assert all((wkv[1] >= 0).all() for wkv in start.wkv)


@pytest.mark.parametrize("name", MATRICES)
def test_rows_give_the_sum_of_their_gradients(name):
    model = model_of(name)
    start, tokens = scattered(StartState(model)), tokens_of(model, rows=3)
    logits, _ = model(tokens, start(3))
    logits.sum().backward()
    together = [wkv.grad.clone() for wkv in start.wkv]
    start.zero_grad()
    for row in tokens:
        model(row[None], start(1))[0].sum().backward()
    torch.testing.assert_close([wkv.grad for wkv in start.wkv], together)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_each_begin_from_the_tuned_state(name):
    model = model_of(name)
    start, tokens = scattered(StartState(model)), tokens_of(model)
    rows, _ = model(tokens, start(2))
    packed, _ = model(tokens.reshape(1, -1), start(2), torch.tensor([0, 9, 18]))
    torch.testing.assert_close(packed.view_as(rows), rows)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_saved_start_comes_back(name, ending, tmp_path):
    model = model_of(name, torch.float32)
    start = scattered(StartState(model, shifts=True))
    save_start(start, tmp_path / f"style.{ending}", model)
    back = load_start(tmp_path / f"style.{ending}", model, shifts=True)
    torch.testing.assert_close(back.state_dict(), start.state_dict())


def test_the_file_is_as_large_as_the_numbers(tmp_path):
    model = model_of("rwkv7-test", torch.float32)
    save_start(scattered(StartState(model)), tmp_path / "style.safetensors", model)
    config = model.config
    numbers = config.num_hidden_layers * config.hidden_size * config.head_dim
    assert numbers == sum(p.numel() for p in StartState(model).parameters())
    assert 4 * numbers < (tmp_path / "style.safetensors").stat().st_size < 4 * numbers + 2000


def test_a_session_starts_from_the_file(tmp_path):
    """The native runtime reads what was trained here and goes on as torch does."""
    model = model_of("rwkv7-test", torch.float32)
    start = scattered(StartState(model))
    save_model(model, tmp_path / "model.safetensors")
    save_start(start, tmp_path / "style.safetensors", model)
    tokens = tokens_of(model, rows=1)
    expected, state = [], start(1)
    following = tokens
    for _ in range(6):
        logits, state = model(following, state)
        following = logits[:, -1:].argmax(dim=-1)
        expected.append(int(following))
    session = LLM(tmp_path / "model.safetensors").session(state=tmp_path / "style.safetensors")
    session.feed(tokens[0].tolist())
    assert list(session.stream_tokens(6, temperature=0, ignore_eos=True)) == expected


def test_a_start_is_float32_for_a_bfloat16_model_and_learns():
    model = model_of("rwkv7-test", torch.bfloat16)
    start = StartState(model, shifts=True)
    assert {p.dtype for p in start.parameters()} == {torch.float32}
    loss_of(model, start, tokens_of(model)).backward()
    assert all(p.grad is not None for p in start.parameters())


@torch.no_grad()
def test_a_start_may_begin_from_what_a_session_saved(tmp_path):
    model = model_of("rwkv7-test", torch.float32)
    tokens = tokens_of(model)
    state = model(tokens[:1])[1]
    state.save(tmp_path / "after.state", model)
    start = started_from(tmp_path / "after.state", model, shifts=True)
    assert torch.equal(model(tokens[1:], start(1))[0], model(tokens[1:], state)[0])
    save_start(start, tmp_path / "tuned.safetensors", model)
    again = started_from(tmp_path / "tuned.safetensors", model, shifts=True)
    torch.testing.assert_close(again.state_dict(), start.state_dict())
    model(tokens)[1].save(tmp_path / "two.state", model)
    with pytest.raises(BadState, match=r"two.state' holds 2 rows; a text begins from one"):
        started_from(tmp_path / "two.state", model)


def test_models_without_a_recurrent_state_are_refused():
    with pytest.raises(ValueError, match="transformer model has no recurrent state to tune; it keeps"):
        StartState(create_model("transformer-test"))


def test_another_models_start_is_refused(tmp_path):
    model = model_of("rwkv7-test", torch.float32)
    save_start(StartState(model), tmp_path / "style.safetensors", model)
    with pytest.raises(BadState, match="tuned state of another model"):
        load_start(tmp_path / "style.safetensors", model_of("rwkv6-test", torch.float32))
