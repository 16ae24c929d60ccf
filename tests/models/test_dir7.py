"""CrossWKV and the rest of DIR-7: it is true that …"""

import pytest
import torch
from support.diffusion import images, padded, randomise, randomised, texts

from rookery.models import create_model
from rookery.models.dir7 import Text, TextKV, TextR, TextRead, join, to_the_right, words_of
from rookery.models.rwkv7 import TimeMix
from rookery.nn.grid import scan, unscan
from rookery.ops.token_shift import token_shift
from rookery.registry import configure

MODES = ["text_kv", "text_read", "text_r", "softmax"]
modes = pytest.mark.parametrize("mode", MODES)
GRID = (4, 4)
LEVELS = torch.tensor([3.0, 41.5])


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def layer(kind, number=0, **overrides):
    """One cross layer, far from its initial weights; [b, t, 32] images, texts of 12 numbers a token."""
    cross = {TextKV: "text_kv", TextRead: "text_read", TextR: "text_r"}[kind]
    config = configure("dir-7-test", **{"cross": cross, **overrides})[1]
    model = create_model("dir-7-test", dtype=torch.float64, **{"cross": cross, **overrides})
    made = randomise(kind(config, number).to(torch.float64))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(model.blocks[number].cross.get_parameter(name) + 0.3 * torch.randn_like(parameter))
    return made


def stream(batch=2, tokens=16, width=32, seed=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)


# text_r, the paper's form


def test_with_the_images_own_receptance_text_r_is_the_ordinary_time_mix():
    made = layer(TextR, text_size=32)
    x = stream()
    plain = TimeMix(made.config, 0).to(torch.float64)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.rand(32).view(1, 1, 32) if name == "x_r" else made.get_parameter(name))
    mixed, _ = token_shift(x=x, mix=plain.mixes())
    expected, _, _ = plain.attend(mixed, None, None)
    receptance = Text(mixed[0], torch.ones(2, 16, dtype=torch.bool))
    close(made(x, GRID, made.read(receptance), None)[0], expected)


@pytest.mark.parametrize("number", [0, 1])
def test_with_padding_text_r_reaches_the_last_tokens_of_the_scan_only(number):
    made, x, text = layer(TextR, number), stream(1), texts(5)
    features = text.features.clone().requires_grad_()

    def at(place):
        y, _ = made(x, GRID, made.read(Text(features, text.mask)), None)
        (found,) = torch.autograd.grad(scan(y, made.order, GRID)[0, place].sum(), features)
        return found.abs().max()

    assert [bool(at(place) > 1e-12) for place in range(16)] == [False] * 11 + [True] * 5


def test_stretched_the_text_reaches_every_token():
    made, x = layer(TextR, align="interpolate"), stream(1)
    one, other = (made(x, GRID, made.read(texts(5, seed=seed)), None)[0] for seed in (5, 6))
    assert ((one - other).abs().amax(dim=2) > 1e-9).all()
    assert made(x, GRID, made.read(texts(40)), None)[0].isfinite().all()
    for length in (1, 5, 40):
        text = to_the_right(padded(texts(length), left=2, right=3))
        there = text.features[0, -length:].mT[None]
        expected = torch.nn.functional.interpolate(there, size=16, mode="linear")[0].mT
        close(made.laid_out(text, 16)[0], expected)
    nothing = Text(texts(4).features, torch.zeros(1, 4, dtype=torch.bool))
    assert not made.laid_out(to_the_right(nothing), 16).any()


def test_a_text_longer_than_the_image_is_refused_where_it_must_fit():
    model = randomised("dir-7-test", cross="text_r")
    with pytest.raises(ValueError, match="the text has 17 tokens and the image 16: with cross='text_r' a text cannot"):
        model(images(8, 8, batch=1), LEVELS[:1], texts(17))
    # what is not there is not counted, and larger images take longer texts
    model(images(8, 8, batch=1), LEVELS[:1], padded(texts(16), left=2, right=3))
    model(images(8, 9, batch=1), LEVELS[:1], texts(17))


# text_kv, ours


@pytest.mark.parametrize("number", [0, 1])
def test_without_a_text_text_kv_is_the_time_mix_from_an_empty_state(number):
    made, x = layer(TextKV, number), stream()
    mixed, _ = token_shift(x=scan(x, made.order, GRID), mix=made.mixes())
    first = stream(seed=9) if number else None
    y, _, _ = made.attend(mixed, None, first if first is None else scan(first, made.order, GRID))
    expected = unscan(y, made.order, GRID)
    empty = Text(torch.zeros(2, 0, 12, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.bool))
    masked = Text(texts(4, 4).features, torch.zeros(2, 4, dtype=torch.bool))
    for text in (empty, masked):
        close(made(x, GRID, made.read(text), first)[0], expected)


@pytest.mark.parametrize("kind", [TextKV, TextRead])
@pytest.mark.parametrize("decay", [True, False])
def test_tokens_that_are_not_there_change_no_state(kind, decay):
    made, text = layer(kind, text_decay=decay, removal=2.0), texts(5, 3)
    (state,) = made.read(text)
    close(made.read(padded(text, left=3, right=2))[0], state, 1e-12)
    close(made.read(Text(text.features[1:, :3], text.mask[1:, :3]))[0], state[1:], 1e-12)


@pytest.mark.parametrize("kind", [TextKV, TextRead])
def test_a_text_can_be_read_in_pieces(kind):
    made, text = layer(kind), texts(5, 3)
    first, rest = (Text(text.features[:, part], text.mask[:, part]) for part in (slice(0, 2), slice(2, None)))
    close(made.read(rest, made.read(first))[0], made.read(text)[0], 1e-12)


def test_read_out_alone_permutes_with_the_image_and_is_the_state_times_the_receptance():
    made, x, text = layer(TextRead), stream(), texts(5, 3)
    (state,) = made.read(text)
    order = torch.randperm(16)
    close(made(x, GRID, (state,), None)[0][:, order], made(x[:, order], GRID, (state,), None)[0])
    r = made.receptance(x).unflatten(-1, (2, 16))
    expected = torch.stack([torch.stack([state[i, h] @ r[i, 3, h] for h in range(2)]) for i in range(2)])
    close(made.look_up(x, state)[:, 3], expected)


@torch.no_grad()
def test_without_decay_and_removal_the_state_is_linear_attention():
    made, x, text = layer(TextRead, text_decay=False), stream(), texts(5, 5)
    made.a0.fill_(-1e9)  # rate 0: nothing is removed, and keys keep 1 − k_a of their size
    (state,) = made.read(text)
    h = made.text(text.features)
    k = (made.key(h) * (1 - made.k_a)).unflatten(-1, (2, 16))
    v = made.value(h).unflatten(-1, (2, 16))
    r = made.receptance(x).unflatten(-1, (2, 16))
    close(made.look_up(x, state), torch.einsum("bthn,blhn,blhv->bthv", r, k, v))


def test_a_removal_of_two_undoes_itself():
    made = layer(TextRead, text_decay=False, removal=2.0)
    with torch.no_grad():
        made.a0.fill_(1e9)  # rate 1
        made.value.weight.zero_()
    text = texts(1)
    twice = Text(text.features.expand(1, 2, 12), torch.ones(1, 2, dtype=torch.bool))
    start = Text(torch.cat([texts(3, seed=8).features, twice.features], dim=1), torch.ones(1, 5, dtype=torch.bool))
    with torch.no_grad():
        value = made.value.weight.copy_(torch.randn(32, 32, dtype=torch.float64))
        written = made.read(Text(start.features[:, :3], start.mask[:, :3]))[0]
        # after the third token nothing is written: only the two reflections act
        value_of = made.value.forward
        made.value.forward = lambda h: value_of(h) * (torch.arange(h.shape[1]) < 3)[None, :, None]
        found = made.read(start)[0]
        del made.value.forward
    assert value.any()
    close(found, written)


# all modes


@modes
@torch.no_grad()
def test_a_cached_prompt_serves_every_step_and_every_image(mode):
    model = randomised("dir-7-test", cross=mode)
    text = texts(5, 3)
    prompt = model.read(text)
    for seed in (4, 5):
        for levels in (LEVELS, LEVELS + 3):
            close(model(images(8, 8, seed=seed), levels, prompt), model(images(8, 8, seed=seed), levels, text))
    rows = torch.tensor([1, 1, 0])
    batch, levels = images(8, 6, batch=3), torch.tensor([3.0, 41.5, 7.0])
    close(model(batch, levels, prompt.select(rows)), model(batch, levels, Text(text.features[rows], text.mask[rows])))
    close(
        model(images(8, 8), LEVELS, join([prompt.select(torch.tensor([i])) for i in (0, 1)])),
        model(images(8, 8), LEVELS, prompt),
    )


@modes
@torch.no_grad()
def test_prompts_of_different_length_in_a_batch_equal_each_alone(mode):
    model = randomised("dir-7-test", cross=mode)
    text, batch = texts(7, 2), images(8, 8)
    together = model(batch, LEVELS, padded(text, right=2))
    for i, length in enumerate((7, 2)):
        alone = Text(text.features[i : i + 1, :length], text.mask[i : i + 1, :length])
        close(model(batch[i : i + 1], LEVELS[i : i + 1], alone), together[i : i + 1])


@modes
def test_a_fresh_cross_layer_is_the_identity_and_can_begin_to_learn(mode):
    model = create_model("dir-7-test", cross=mode, pooled_text=False, dtype=torch.float64)
    with torch.no_grad():  # all but the cross layers away from their zeros
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.normal_(0, 0.3)
    text = texts(5, 3)
    features = text.features.requires_grad_()
    out = model(images(8, 8), LEVELS, Text(features, text.mask))
    close(out, model(images(8, 8), LEVELS, texts(5, 3, seed=77)))
    gradients = torch.autograd.grad(out.square().sum(), [features, model.blocks[0].cross.output.weight])
    assert not gradients[0].any()
    assert gradients[1].any()


@pytest.mark.parametrize("mode", ["text_kv", "text_read"])
def test_what_is_kept_of_a_prompt_does_not_grow_with_it(mode):
    model = create_model("dir-7-test", cross=mode)
    sizes = {model.read(Text(t.features.float(), t.mask)).nbytes for t in (texts(1), texts(8), texts(300))}
    assert sizes == {3 * 2 * 16 * 16 * 4 + 32 * 4}  # blocks, heads, value, key, bytes; the pooled text


def test_softmax_keeps_every_token():
    model = create_model("dir-7-softmax-test")
    short, long = (model.read(Text(t.features.float(), t.mask)).nbytes for t in (texts(8), texts(80)))
    assert long == 10 * short


@torch.no_grad()
def test_dropped_texts_are_the_null_prompt():
    for null in ("learned", "empty"):
        model = randomised("dir-7-test", null=null)
        text, batch = texts(3, 2), images(8, 8)
        found = model(batch, LEVELS, model.dropped(text, torch.tensor([True, False])))
        close(found[:1], model(batch[:1], LEVELS[:1]))
        close(found[1:], model(batch[1:], LEVELS[1:], Text(text.features[1:], text.mask[1:])))
        nothing = Text(text.features[:, :0], text.mask[:, :0])
        close(model(batch, LEVELS, model.dropped(nothing, torch.tensor([True, True]))), model(batch, LEVELS))


@torch.no_grad()
def test_scans_go_through_the_image_in_turns_or_both_ways():
    cycle = randomised("dir-7-test", num_hidden_layers=5)
    assert [block.att.order for block in cycle.blocks] == [
        "rows",
        "rows backwards",
        "columns",
        "columns backwards",
        "rows",
    ]
    both = randomised("dir-7-read-test", num_hidden_layers=1, shift="none", cross="none")
    batch, changed = images(8, 8), images(8, 8)
    changed[:, :, -1, -1] += 1
    moved = both(batch, LEVELS) - both(changed, LEVELS)
    assert moved[:, :, 0, 0].abs().min() > 1e-9  # the last token reaches the first in one block
    one_way = randomised("dir-7-test", num_hidden_layers=1, shift="none", cross="none", skips=False)
    moved = one_way(batch, LEVELS) - one_way(changed, LEVELS)
    assert moved[:, :, 0, 0].abs().max() < 1e-12


# words


def test_words_are_split_and_unknown_ones_are_told():
    assert words_of("A hand-written Three!") == ["a", "hand", "-", "written", "three", "!"]
    model = create_model("dir-7-test")
    model.keep_words(["a red three", "two"])
    text = model.words(["a three", "two", ""])
    assert text.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert text.features[0, :2].any(dim=1).all()
    with pytest.raises(ValueError, match="the model has learned none of the words of 'xylophone'"):
        model.words(["a three", "xylophone"])
    with pytest.raises(ValueError, match="no table of words"):
        create_model("dir-7-read-test").words(["three"])


def test_texts_that_do_not_fit_are_refused():
    model = create_model("dir-7-test", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"features \[batch, tokens, 12\] with a mask .* got \[2, 4, 9\] and \[2, 4\]"):
        model(images(8, 8), LEVELS, texts(4, 4, size=9))
    with pytest.raises(ValueError, match="there are texts for 3 images, and 2 images"):
        model(images(8, 8), LEVELS, texts(4, 4, 2))
    with pytest.raises(ValueError, match="removal must be 1 or 2, got 3"):
        create_model("dir-7-test", removal=3.0)
    with pytest.raises(ValueError, match="must be a multiple of head_dim"):
        create_model("dir-7-test", head_dim=24)


def test_tokens_move_to_the_right_in_their_order():
    features = torch.arange(8.0).view(2, 4, 1)
    found = to_the_right(Text(features, torch.tensor([[True, False, True, False], [True, True, True, True]])))
    assert found.features[..., 0].tolist() == [[0, 0, 0, 2], [4, 5, 6, 7]]
    assert found.mask.tolist() == [[False, False, True, True], [True] * 4]
