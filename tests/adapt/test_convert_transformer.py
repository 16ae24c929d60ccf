"""Conversions against the oracles of adaptation.md A.5 and B.5: what is copied, what equals what."""

import json

import numpy as np
import pytest
import torch
from support.data import shared
from support.language import randomise, some_tokens
from support.teachers import RANKS, folder, teacher

from rookery.adapt.convert_transformer import (
    STUDENTS,
    align,
    attention_io,
    convert,
    detach_first_values,
    kept_attention,
    load_teacher,
    mixers,
    student_config,
)
from rookery.checkpoints.convert import convert as write
from rookery.checkpoints.safetensors import read_safetensors, write_safetensors
from rookery.data.jsonl import Sample
from rookery.data.packing import collate
from rookery.engine.llm import LLM
from rookery.errors import BadCheckpoint, UnknownName
from rookery.models import load, save_model
from rookery.models.arwkv import Attention
from rookery.models.rad_rwkv6 import RADRWKV6
from rookery.models.rad_rwkv7 import RADRWKV7
from rookery.ops.wkv7 import wkv7
from rookery.train.tasks.sft import sft_loss

EVERY = pytest.mark.parametrize("to", STUDENTS)


def student(to, model, **more):
    return convert(model, to, **{**RANKS[to], **more})


def far(to, model, **more):
    """A student away from its initial weights, where no part is idle."""
    return randomise(student(to, model, **more).to(next(model.parameters()).dtype), seed=5)


# what is taken over


@EVERY
@pytest.mark.parametrize("tied", [False, True])
def test_everything_but_the_mixer_is_the_teachers(to, tied):
    model = teacher(qkv_bias=True, tie_word_embeddings=tied)
    made = student(to, model)
    theirs, mine = model.state_dict(), made.state_dict()
    for name in mine:
        if ".self_attn." not in name or "_proj." in name:
            assert torch.equal(mine[name], theirs[name]), name
    copied = sum("_proj.bias" in name for name in mine)
    assert copied == (0 if to == "arwkv" else 6)  # RADLADS takes the projections, with their biases
    assert not made.config.tie_word_embeddings  # a head of its own
    assert mine["lm_head.weight"].data_ptr() != mine["model.embed_tokens.weight"].data_ptr()
    assert convert(model, to, untie=False, **RANKS[to]).config.tie_word_embeddings == tied


@EVERY
def test_the_teacher_stays_as_it_is(to):
    model = teacher()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = student(to, model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_student_whose_blocks_all_keep_attention_is_the_teacher():
    model = teacher(qkv_bias=True)
    made = RADRWKV7(student_config(model.config, "rad-rwkv7", attention_layers=(0, 1))[1])
    made.load_state_dict(model.state_dict())
    tokens = some_tokens(model, 2, 20)
    with torch.no_grad():
        assert torch.equal(made(tokens)[0], model(tokens)[0])
        ends = torch.tensor([0, 7, 7, 20])
        assert torch.equal(made(tokens[:1], cu_seqlens=ends)[0], model(tokens[:1], cu_seqlens=ends)[0])


@EVERY
def test_blocks_that_keep_attention_answer_as_the_teachers(to):
    model = teacher(num_hidden_layers=3, qkv_bias=True)
    made = student(to, model, keep_attention="first:1")
    assert (made.config.attention_layers, list(mixers(made))) == ((0,), [1, 2])
    assert isinstance(made.model.layers[0].self_attn, Attention)
    tokens = some_tokens(model, 2, 20)
    kept = []
    made.model.layers[0].self_attn.register_forward_hook(lambda _, __, found: kept.append(found[0]))
    made(tokens)
    assert torch.equal(kept[0], attention_io(model, tokens)[0][1])


def test_the_low_ranks_follow_the_published_formula():
    config = student_config(teacher(hidden_size=128).config, "rad-rwkv7")[1]
    assert (config.decay_rank, config.rate_rank, config.value_rank, config.gate_rank) == (32, 32, 32, 32)
    wide = teacher(hidden_size=64).config
    assert student_config(wide, "arwkv", head_dim=32)[1].decay_rank == 64


# alignment


@EVERY
def test_watching_the_teacher_changes_nothing(to):
    model = teacher()
    tokens = some_tokens(model, 2, 24)
    before = model(tokens)[0]
    align(model, student(to, model), tokens)
    assert torch.equal(model(tokens)[0], before)
    assert not any(block.self_attn._forward_hooks for block in model.model.layers)


@EVERY
def test_alignment_is_the_distance_of_each_mixer_from_its_attention(to):
    model = teacher(torch.float64)
    made = far(to, model)
    tokens = some_tokens(model, 2, 9)
    found = align(model, made, tokens)
    seen, v_first = attention_io(model, tokens), None
    call = made.call(tokens, made.init_state(2), None)
    for i, mixer in mixers(made).items():
        y, _, v_first = mixer(seen[i][0], made.init_state(2).layers[i], v_first, call)
        norm = (y - seen[i][1]).square().sum(-1).sqrt().mean() / 32**0.5
        torch.testing.assert_close(found.errors[i].double(), norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.scales[i].double(), seen[i][1].square().mean().sqrt(), rtol=1e-5, atol=0)
    assert found.loss == found.errors.mean()
    square = align(model, made, tokens, square=True)
    assert not torch.equal(square.errors, found.errors)
    assert square.layers == found.layers


@EVERY
def test_alignment_of_packed_documents_is_that_of_separate_ones(to):
    model = teacher(torch.float64)
    made = far(to, model, keep_attention="first:1")
    tokens = some_tokens(model, 1, 15)
    packed = align(model, made, tokens, torch.tensor([0, 6, 15])).errors
    alone = [align(model, made, part).errors * part.shape[1] for part in tokens.split([6, 9], dim=1)]
    torch.testing.assert_close(packed, sum(alone) / 15, rtol=1e-5, atol=1e-7)


@EVERY
def test_gradients_reach_the_mixers_alone(to):
    model = teacher()
    made = student(to, model)
    align(model, made, some_tokens(model, 2, 12)).loss.backward()
    moved = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved
    assert all(".self_attn." in name for name in moved)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("to", ["arwkv", "rad-rwkv7"])
def test_the_first_values_can_be_cut_from_the_gradient(to):
    model = teacher()
    made, tokens = far(to, model), some_tokens(model, 1, 9)
    value = "time_mixer.value.weight" if to == "arwkv" else "v_proj.weight"
    weight = dict(made.model.layers[0].self_attn.named_parameters())[value]

    def through_the_second():
        errors = align(model, made, tokens).errors
        return torch.autograd.grad(errors[1], weight)[0]

    assert through_the_second().any()
    detach_first_values(made)
    assert not through_the_second().any()


# equations that other equations contain


def test_grouped_keys_equal_keys_made_for_every_head():
    model = teacher(torch.float64, qkv_bias=True)
    for to in ("rad-rwkv6", "rad-rwkv7"):
        made = far(to, model)
        full = type(made)(student_config(model.config, to, **RANKS[to], num_key_value_heads=4)[1]).double()
        weights = made.state_dict()
        for name in weights:
            if ".k_proj." in name or ".v_proj." in name:
                weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
        full.load_state_dict(weights)
        tokens = some_tokens(model, 2, 12)
        torch.testing.assert_close(full(tokens)[0], made(tokens)[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rad_rwkv6_without_decay_is_linear_attention():
    model = teacher(torch.float64)
    config = student_config(model.config, "rad-rwkv6", **RANKS["rad-rwkv6"], balance_state=False, gate="none")[1]
    made = RADRWKV6(config).double()
    made.init_weights(0)
    mixer = made.model.layers[0].self_attn
    mixer.time_decay.fill_(-1e9)
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    y = mixer(x, made.init_state().layers[0], None, made.call(torch.zeros(1, 7, dtype=int), made.init_state(), None))[0]
    q, k, v = (mixer.heads(proj(x)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scores = torch.einsum("bthn,bshn->bhts", q, k).tril() * 8**-0.5
    expected = mixer.o_proj(torch.einsum("bhts,bshn->bthn", scores, v).flatten(2))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_rad_rwkv7_without_a_rate_is_gated_linear_attention():
    model = teacher(torch.float64)
    config = student_config(model.config, "rad-rwkv7", **RANKS["rad-rwkv7"], balance_state=False, rope_theta=None)[1]
    made = RADRWKV7(config).double()
    made.init_weights(0)
    mixer = randomise(made, 3).model.layers[0].self_attn
    mixer.a0.fill_(-1e9)
    mixer.k_a.fill_(0)  # or the keys would be scaled by 1 − k_a
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    y = mixer(x, made.init_state().layers[0], None, made.call(torch.zeros(1, 7, dtype=int), made.init_state(), None))[0]
    q, k, v = (mixer.heads(proj(x))[0] for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    w = torch.exp(-(np.exp(-0.5)) * (mixer.w0 + (x @ mixer.w1).tanh() @ mixer.w2).sigmoid()).view(7, 4, 8)
    state, rows = torch.zeros(4, 8, 8, dtype=torch.float64), []
    for t in range(7):
        state = state * w[t, :, None, :] + v[t, :, :, None] * k[t, :, None, :]
        rows.append(torch.einsum("hvk,hk->hv", state, q[t]).flatten() * 8**-0.5)
    gate = (x @ mixer.g1).sigmoid() @ mixer.g2
    torch.testing.assert_close(y, mixer.o_proj(torch.stack(rows)[None] * gate), rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_low_rank_maps_of_zero_make_gates_that_do_not_look_at_the_input():
    made = student("rad-rwkv7", teacher())
    for mixer in mixers(made).values():
        x = torch.randn(2, 5, 32)
        for first, bias in (("w1", "w0"), ("a1", "a0")):
            assert not (x @ getattr(mixer, first)).any()
            assert getattr(mixer, bias).isfinite().all()
        gate = (x @ mixer.g1).sigmoid() @ mixer.g2
        torch.testing.assert_close(gate, (0.5 * mixer.g2.sum(0)).expand_as(gate))


@torch.no_grad()
def test_the_token_shift_of_a_new_rad_rwkv6_does_nothing():
    model = teacher()
    made, tokens = student("rad-rwkv6", model), some_tokens(model, 1, 8)
    state, other = made.init_state(), made.init_state()
    layers = tuple(layer._replace(att_shift=torch.randn_like(layer.att_shift)) for layer in other.layers)
    other = type(other)(layers, other.tokens_seen, other.config)
    assert torch.equal(made(tokens, state)[0], made(tokens, other)[0])


@torch.no_grad()
def test_a_balanced_state_stays_bounded_where_the_classic_one_grows():
    """adaptation.md B.5: 10,000 random steps of unit keys; decays of 0.55 as asked there, and slow ones."""
    generator, norms = torch.Generator().manual_seed(0), {}
    shape = (1, 10_000, 1, 16)
    key = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
    for w, rate in ((0.55, 0.5), (0.999, 1e-3)):
        log_w = torch.full(shape, float(np.log(w)))
        for mode, factor in (("balanced", 1 - w + rate), ("classic", 1.0)):
            given = {"r": key, "log_w": log_w, "k": key.abs() * factor, "v": torch.ones(shape)}
            norms[mode, w] = float(wkv7(**given, a=-key, b=key * rate, state=torch.zeros(1, 1, 16, 16))[1].norm())
    print(norms)
    assert norms["balanced", 0.55] < norms["classic", 0.55] * 1.1 < 100
    assert norms["balanced", 0.999] < 10
    assert norms["classic", 0.999] > 1000


# padding


@EVERY
@torch.no_grad()
def test_padding_on_the_left_changes_no_logits(to):
    model = far(to, teacher(torch.float64), keep_attention="last:1")
    tokens = some_tokens(model, 1, 9)
    padded = torch.cat([some_tokens(model, 1, 5, seed=8), tokens], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 9])
    torch.testing.assert_close(model(padded, mask=mask)[0][:, 5:], model(tokens)[0], rtol=1e-10, atol=1e-10)


# files


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", [{"qkv_bias": True, "tie_word_embeddings": True}, {"rope_theta": 5e5}])
def test_teachers_are_read_from_folders(tmp_path, shards, kind):
    model = teacher(**kind)
    read = load_teacher(str(folder(tmp_path, model, shards=shards)))
    assert read.config == model.config
    assert all(torch.equal(read.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert not any(p.requires_grad for p in read.parameters())


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_that_transformers_wrote_answer_as_there(tmp_path, kind, tied):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, tie_word_embeddings=tied)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases begin as zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_teacher(str(tmp_path))
    tokens = some_tokens(ours, 2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert ours.config.qkv_bias == (kind == "Qwen2")
    made = student("rad-rwkv7", ours)
    assert made.config.rope_theta == ours.config.rope_theta


def test_newer_folders_have_the_base_of_the_positions_elsewhere(tmp_path):
    model = teacher(rope_theta=5e5)
    folder(tmp_path, model)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["rope_theta"]
    positions = {"rope_theta": 5e5, "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"rope_parameters": positions}))
    assert load_teacher(str(tmp_path)).config == model.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scales its rotary positions .llama3."),
        ({"use_sliding_window": True}, "uses a sliding window"),
    ],
)
def test_teachers_that_are_computed_otherwise_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(str(folder(tmp_path, teacher(), **settings)))


def test_a_shard_that_is_not_there_is_named(tmp_path):
    folder(tmp_path, teacher(), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="names the file 'model-00002-of-00002.safetensors', which is not in"):
        load_teacher(str(tmp_path))


def test_heads_that_do_not_divide_are_named(tmp_path):
    folder(tmp_path, teacher(hidden_size=24, num_attention_heads=3, num_key_value_heads=1))
    made = np.ones((16, 24), np.float32)
    file = tmp_path / "model.safetensors"
    tensors = {name: np.array(t.read()) for name, t in read_safetensors(file).tensors.items()}
    for name in [name for name in tensors if ".k_proj." in name or ".v_proj." in name]:
        tensors[name] = made
    write_safetensors(file, tensors, {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"num_attention_heads \(3\) must be a multiple of num_key_value_heads \(2"):
        load_teacher(str(tmp_path))


def test_a_teacher_is_a_transformer(tmp_path):
    save_model(student("arwkv", teacher()), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is of family arwkv; a teacher is a transformer"):
        load_teacher(str(tmp_path / "m.safetensors"))


@EVERY
def test_students_run_in_the_engine_from_their_files(tmp_path, to):
    made = far(to, teacher(), keep_attention="last:1")
    save_model(made, tmp_path / "m.safetensors")
    llm = LLM(tmp_path / "m.safetensors")
    tokens = some_tokens(made, 1, 12)
    with torch.no_grad():
        np.testing.assert_allclose(llm.logits(tokens[0].tolist()), made(tokens)[0][0].numpy(), rtol=1e-4, atol=1e-5)
    assert load(tmp_path / "m.safetensors").config == made.config


@pytest.mark.parametrize("untie", [False, True])
def test_a_file_has_a_head_where_its_config_says_so(tmp_path, untie):
    made = convert(teacher(tie_word_embeddings=True), "rad-rwkv6", untie=untie, **RANKS["rad-rwkv6"])
    save_model(made, tmp_path / "m.safetensors")
    write(tmp_path / "m.safetensors", tmp_path / "folder")
    told = json.loads((tmp_path / "folder/config.json").read_text())
    assert told["tie_word_embeddings"] is not untie
    assert ("lm_head.weight" in read_safetensors(tmp_path / "folder/model.safetensors").tensors) is untie
    assert torch.equal(load(tmp_path / "folder").head.weight, made.head.weight)


@EVERY
def test_an_answer_of_one_token_costs_minus_its_log_probability(to):
    """No label is shifted twice (adaptation.md A.5)."""
    made = far(to, teacher(torch.float64))
    tokens = np.array([5, 9, 3, 7])
    sample = Sample(tokens, np.array([False, False, False, True]))
    with torch.no_grad():
        expected = -made(torch.from_numpy(tokens)[None, :3])[0][0, -1].log_softmax(-1)[7]
        torch.testing.assert_close(sft_loss(made, collate([sample])), expected)


# settings


@pytest.mark.parametrize(
    ("text", "kept"),
    [("", ()), ("last:2", (3, 4)), ("first:1", (0,)), ("0,3-4", (0, 3, 4)), ("2", (2,))],
)
def test_blocks_are_named_in_three_ways(text, kept):
    assert kept_attention(text, 5) == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("last:x", 'takes "last:4", "first:2" or blocks'),
        ("some", 'takes "last:4"'),
        ("last:5", "nothing to convert"),
        ("last:9", "names blocks that the teacher, which has 5"),
        ("7", "names blocks that the teacher"),
    ],
)
def test_blocks_that_are_not_there_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        kept_attention(text, 5)


def test_bad_settings_are_named():
    model = teacher()
    with pytest.raises(UnknownName, match="no student named 'rwkv7'"):
        convert(model, "rwkv7")
    with pytest.raises(UnknownName, match="decay_rnk.*Did you mean 'decay_rank'"):
        convert(model, "arwkv", decay_rnk=3)
    with pytest.raises(ValueError, match=r"hidden_size \(32\) must be a multiple of head_dim \(24\)"):
        convert(model, "arwkv", head_dim=24)
    with pytest.raises(ValueError, match="k_proj.weight is .16, 32. in the teacher and .32, 32."):
        convert(model, "rad-rwkv7", num_key_value_heads=4)
    with pytest.raises(ValueError, match="hidden_size 32 against 64"):
        align(teacher(hidden_size=64), student("arwkv", model), some_tokens(model, 1, 4))


@pytest.mark.data
def test_babyllama_becomes_students_of_the_sizes_that_were_computed():
    model = load_teacher(str(shared("models/babyllama/model5000.bin")))
    ranks = {"decay_rank": 16, "rate_rank": 16, "value_rank": 16, "gate_rank": 32}
    made = convert(model, "rad-rwkv7", untie=False, **ranks)
    assert sum(p.numel() for p in made.parameters()) == 1_036_544  # adaptation.md E.1.2
    found = align(model, made, some_tokens(model, 2, 64))
    other = align(model, convert(model, "arwkv", head_dim=16, untie=False, **ranks), some_tokens(model, 2, 64))
    assert (found.errors < other.errors / 5).all()
