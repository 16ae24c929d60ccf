"""Kernel-upscaled start states (state_methods.md 1.4, oracles 1.9): it is true that …"""

import pytest
import torch
from support.language import randomised, some_tokens
from torch.nn.functional import cross_entropy

from rookery.adapt.kernel_state import KernelStart, LiteralStart, spherical_kmeans
from rookery.adapt.read_features import recorded
from rookery.adapt.state_tuning import StartState, load_start, save_start
from rookery.errors import BadState
from rookery.models import create_model
from rookery.models.kernel_state import lifted, mixing, phi
from rookery.models.literal_state import gaussian

FORMS = [
    {},
    {"transition": "none"},
    {"writes": True},
    {"kernel": "linear"},
    {"shifts": True, "features": 24},
]


OLDER = ("rwkv5-test", "rwkv6-test")


def model_of(dtype=torch.float64, name="rwkv7-test"):
    return randomised(name, dtype=dtype).requires_grad_(False).eval()


def start_of(model, scale=0.0, **form):
    start = KernelStart(model, **{"features": 40, **form})
    start.calibrate(some_tokens(model, 2, 40))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return start


@pytest.mark.parametrize(("name", "form"), [*(("rwkv7-test", form) for form in FORMS), *((name, {}) for name in OLDER)])
def test_an_untrained_kernel_state_is_the_model_itself(name, form):
    model = model_of(name=name)
    start, tokens = start_of(model, **form), some_tokens(model, 2, 20)
    plain, _ = model(tokens)
    logits, state = start.model[0](tokens, start(2))
    assert torch.equal(logits, plain)
    assert state.nbytes == state.expected_nbytes(20)


@pytest.mark.parametrize("form", FORMS[1:3], ids=str)
def test_training_it_lowers_the_loss_and_leaves_the_model_alone(form):
    model = model_of(torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    start, tokens = start_of(model, **form), some_tokens(model, 3, 12)
    optimizer = torch.optim.Adam(start.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        logits, _ = start.model[0](tokens[:, :-1], start(3))
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize(("name", "form"), [*(("rwkv7-test", form) for form in FORMS), *((name, {}) for name in OLDER)])
def test_gradients_agree_with_finite_differences(name, form):
    model = model_of(name=name)
    start, tokens = start_of(model, 0.3, **form), some_tokens(model, 2, 9)

    def loss():
        logits, _ = start.model[0](tokens, start(2))
        return logits.log_softmax(-1)[..., 3].mean()

    loss().backward()
    random, h = torch.Generator().manual_seed(3), 1e-5
    for parameter in start.parameters():
        for i in torch.randint(parameter.numel(), (3,), generator=random).tolist():
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * h
                    found.append(loss())
                    parameter.view(-1)[i] -= sign * h
            slope = (found[0] - found[1]) / (2 * h)
            torch.testing.assert_close(parameter.grad.view(-1)[i], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["rwkv7-test", *OLDER])
def test_with_the_linear_kernel_on_the_axes_it_is_plain_state_tuning(name):
    model = model_of(name=name)
    config, tokens = model.config, some_tokens(model, 2, 20)
    kernel, plain = KernelStart(model, features=config.head_dim, kernel="linear"), StartState(model)
    axes = torch.eye(config.head_dim, dtype=torch.float64).expand(config.num_heads, -1, -1)
    for layer, (theirs, ours) in enumerate(zip(kernel.wkv, plain.wkv)):
        kernel.use(layer, axes)
        with torch.no_grad():
            theirs.copy_(torch.randn(theirs.shape, generator=torch.Generator().manual_seed(layer)))
            ours.copy_(theirs)
    got, want = kernel.model[0](tokens, kernel(2))[0], model(tokens, plain(2))[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "form"),
    [("rwkv7-test", FORMS[1]), ("rwkv7-test", {"writes": True, "shifts": True}), *((name, FORMS[2]) for name in OLDER)],
)
def test_any_cut_batch_or_packing_gives_the_same(name, form):
    model = model_of(name=name)
    start, tokens = start_of(model, 0.5, **form), some_tokens(model, 2, 34)
    host = start.model[0]
    with torch.no_grad():
        whole, after = host(tokens, start(2))
        for cut in (1, 16, 17):
            state, outputs = start(2), []
            for begin in range(0, 34, cut):
                logits, state = host(tokens[:, begin : begin + cut], state)
                outputs.append(logits)
            torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(state.tensors(), after.tensors(), rtol=1e-9, atol=1e-10)
        packed, _ = host(tokens.reshape(1, -1), start(2), torch.tensor([0, 34, 68]))
        torch.testing.assert_close(packed.view_as(whole), whole, rtol=1e-9, atol=1e-10)
        # two kernel states in one row of packed documents
        other = start_of(model, 0.4)
        if other.features == start.features:
            from rookery.state import cat

            both = cat([start(1), other(1)])
            packed, _ = host(tokens.reshape(1, -1), both, torch.tensor([0, 34, 68]))
            second, _ = host(tokens[1:], other(1))
            torch.testing.assert_close(packed[:, 34:], second, rtol=1e-9, atol=1e-10)


def test_features_are_homogeneous_and_largest_where_the_vector_lies():
    generator = torch.Generator().manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(1, 2, 30, 8, generator=generator, dtype=torch.float64), dim=-1)
    gamma = torch.full((1, 2), 3.0, dtype=torch.float64)
    x = torch.randn(1, 4, 2, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(phi(3.7 * x, units, gamma), 3.7 * phi(x, units, gamma), rtol=1e-13, atol=0)
    assert not phi(0 * x, units, gamma).any()
    at_supports = phi(units.transpose(1, 2), units, gamma)  # the supports as 30 tokens
    assert torch.equal(at_supports.argmax(-1)[0], torch.arange(30)[:, None].expand(30, 2))
    torch.testing.assert_close(mixing(units).sum(-1), torch.ones(1, 2, 30, dtype=torch.float64))


def test_decay_and_rate_stay_within_the_models_own_and_nothing_grows():
    model = model_of()
    start = start_of(model)
    seen = []
    for block in start.model[0].blocks:
        read = block.read
        block.read = lambda call, state, ends, read=read: seen.append((call, state)) or read(call, state, ends)
    start.model[0](some_tokens(model, 1, 30), start(1))
    for own_call, state in seen:
        call, log_w = lifted(own_call, state.support, state.rule), own_call["log_w"]
        assert (call["log_w"].amax(-1) <= log_w.amax(-1) + 1e-12).all()
        assert (call["log_w"].amin(-1) >= log_w.amin(-1) - 1e-12).all()
        torch.testing.assert_close(call["a"].norm(dim=-1), torch.ones_like(call["a"][..., 0]))
        step = torch.diag_embed(call["log_w"].exp()) + call["a"][..., :, None] * call["b"][..., None, :]
        own = torch.diag_embed(log_w.exp()) + own_call["a"][..., :, None] * own_call["b"][..., None, :]
        assert torch.linalg.matrix_norm(step, 2).max() < max(1.0, torch.linalg.matrix_norm(own, 2).max()) + 0.05


def test_centres_lie_where_the_keys_are():
    generator = torch.Generator().manual_seed(0)
    around = torch.nn.functional.normalize(torch.randn(3, 6, generator=generator, dtype=torch.float64), dim=-1)
    points = around.repeat(50, 1) + 0.05 * torch.randn(150, 6, generator=generator, dtype=torch.float64)
    points = torch.nn.functional.normalize(points, dim=-1)
    centres = spherical_kmeans(points, 9, seed=1)
    assert (centres @ around.mT).amax(0).min() > 0.99
    more = spherical_kmeans(points[:4], 7)
    assert more.shape == (7, 6)
    torch.testing.assert_close(more.norm(dim=-1), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_saved_kernel_state_comes_back(form, tmp_path):
    model = model_of(torch.float32)
    start, tokens = start_of(model, 0.5, **form), some_tokens(model, 2, 9)
    save_start(start, tmp_path / "style.safetensors", model)
    back = load_start(tmp_path / "style.safetensors", model, shifts=bool(form.get("shifts")))
    with torch.no_grad():
        assert torch.equal(back.model[0](tokens, back(2))[0], start.model[0](tokens, start(2))[0])


def test_other_programs_files_have_no_place_for_it(tmp_path):
    model = model_of(torch.float32)
    with pytest.raises(BadState, match=r"\.pth files have no place for blocks"):
        save_start(start_of(model, 0.5), tmp_path / "style.pth", model)


def test_its_state_has_the_size_that_the_formula_says():
    model = model_of(torch.float32)
    start = start_of(model)
    layers, width, n, m = model.config.num_hidden_layers, model.config.hidden_size, model.config.head_dim, 40
    tensors = start(1).tensors()
    evolving = sum(t.nbytes for k, t in tensors.items() if k.endswith(("wkv", "kstate")))
    assert evolving == 4 * layers * width * (n + m)
    shifts = sum(t.nbytes for k, t in tensors.items() if k.endswith("shift"))
    assert shifts == 8 * layers * width
    assert sum(p.numel() for p in start.parameters()) == layers * width * m


def test_other_families_host_no_kernel_states():
    for name in ("rwkv7a", "meta-state"):
        with pytest.raises(ValueError, match=f"kernel states are read by RWKV-5, 6 and 7, this model is {name}"):
            KernelStart(create_model(f"{name}-test"))
    with pytest.raises(ValueError, match="the literal form is that of RWKV-7, this model is rwkv6"):
        LiteralStart(create_model("rwkv6-test"))
    model = model_of()
    with pytest.raises(ValueError, match="kernel must be 'rbf' or 'linear', got 'cubic'"):
        KernelStart(model, kernel="cubic")
    with pytest.raises(ValueError, match="1 feature or more, got 0"):
        KernelStart(model, features=0)
    with pytest.raises(ValueError, match="support must be one of kmeans, sample, random"):
        KernelStart(model).calibrate(some_tokens(model, 1, 5), support="grid")


def test_keys_are_looked_at_in_the_base_model():
    model = model_of()
    with recorded(model) as kept:
        model(some_tokens(model, 1, 5))
    assert [one.call["k"].shape for one in kept] == [(1, 5, 2, 16)] * 3
    alike = KernelStart(model, features=8, width=0.01).calibrate(some_tokens(model, 2, 20))
    assert min(alike) > 0.9, "too wide a kernel makes all features alike"


def test_the_literal_form_is_another_function_that_can_be_tuned(tmp_path):
    model = model_of()
    tokens = some_tokens(model, 2, 17)
    start = LiteralStart(model, features=24)
    start.calibrate(some_tokens(model, 2, 40))
    host = start.model[0]
    whole, after = host(tokens, start(2))
    assert whole.isfinite().all()
    assert (whole - model(tokens)[0]).abs().max() > 0.1, "the pretrained function is lost"
    one, state = host(tokens[:, :6], start(2))
    two, state = host(tokens[:, 6:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=1e-9, atol=1e-10)
    assert after.tensors()["layers.0.kstate"].shape == (2, 2, 24, 24)
    whole.square().mean().backward()
    assert all(wkv.grad.any() for wkv in start.wkv)
    with pytest.raises(ValueError, match="the literal form of a kernel state is for study and has no file"):
        save_start(start, tmp_path / "x.safetensors", host)


@torch.no_grad()
def test_the_way_back_of_the_literal_form_finds_the_values_again():
    model = model_of()
    tokens = some_tokens(model, 2, 20)
    start = LiteralStart(model, features=64, width=0.02)  # values are longer than the directions of keys
    start.calibrate(tokens)
    with recorded(model) as kept:
        model(tokens)
    for block, one in zip(start.model[0].blocks, kept):
        v = one.call["v"]
        back = torch.einsum("hnm,bthm->bthn", block.back, gaussian(v, block.support, block.gamma))
        assert (back - v).square().mean() < 0.5 * v.square().mean()
