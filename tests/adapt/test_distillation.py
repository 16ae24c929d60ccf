"""Divergences against their definitions, whole and in chunks; the verification's figures."""

import json
import math

import pytest
import torch
from support.language import some_tokens
from support.teachers import RANKS, teacher

from rookery.adapt.convert_transformer import convert
from rookery.adapt.distillation import (
    adaptive_kl,
    cached_loss,
    distillation_loss,
    forward_kl,
    top_k,
    top_k_kl,
)
from rookery.adapt.verify import verify


def logits(*shape, seed=0):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_forward_kl_is_the_divergence():
    p, q = logits(5, 11), logits(5, 11, seed=1)
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(forward_kl(q, p), expected.sum(-1))


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model = teacher()
    tokens = some_tokens(model, 2, 9)
    weight = model.head.weight.clone().requires_grad_()
    features = model.features(tokens, None, None)[0].flatten(0, 1).clone().requires_grad_()
    loss = distillation_loss(features, weight, features.detach(), weight.detach())
    assert loss.item() == 0
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, [features, weight])) < 1e-7


@pytest.mark.parametrize("adaptive", [False, True])
def test_chunks_change_nothing(adaptive):
    parts = [logits(21, 8, seed=i) for i in range(2)] + [logits(13, 8, seed=2), logits(17, 8, seed=3)]
    mine, theirs, head, wide = parts  # the teacher's vocabulary has 4 tokens of padding more
    mine.requires_grad_()
    found = []
    for chunk in (5, 512):
        loss = distillation_loss(mine, head, theirs, wide, adaptive=adaptive, chunk=chunk)
        found.append((loss, *torch.autograd.grad(loss, [mine])))
    torch.testing.assert_close(found[0], found[1])
    kind = adaptive_kl if adaptive else forward_kl
    torch.testing.assert_close(found[0][0], kind(mine @ head.T, theirs @ wide[:13].T).mean())


def test_the_adaptive_divergence_weighs_head_and_tail():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    forward, reverse = (float((a * (a / b).log()).sum()) for a, b in ((p, q), (q, p)))
    head, tail = 0.3 + 0.1, 0.1 + 0.3  # 0.4 alone is less than a half, 0.4 and 0.3 are more
    expected = (head * forward + tail * reverse) / (head + tail)
    torch.testing.assert_close(adaptive_kl(q.log(), p.log()), torch.tensor([expected]))
    assert float(adaptive_kl(p.log(), p.log())) == 0
    one = torch.tensor([[0.9, 0.1]])
    other = torch.tensor([[0.5, 0.5]])
    assert math.isfinite(float(adaptive_kl(other.log(), one.log())))


def test_kept_tokens_and_the_rest_are_buckets_of_the_whole():
    p, q = logits(6, 40), logits(6, 40, seed=1)
    ids, kept = top_k(p, 8)
    assert kept.shape == (6, 9)
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(6))
    inside = torch.zeros(6, 40, dtype=torch.bool).scatter(1, ids, True)
    wide = [x.softmax(-1) for x in (p, q)]
    sums = [torch.cat([x.gather(1, ids), x.where(~inside, 0).sum(1, keepdim=True)], 1) for x in wide]
    torch.testing.assert_close(top_k_kl(q, ids, kept), (sums[0] * (sums[0] / sums[1]).log()).sum(-1))
    assert (top_k_kl(q, ids, kept) <= forward_kl(q, p) + 1e-6).all()  # a bound from below
    assert top_k_kl(q, *top_k(p, 39)).allclose(forward_kl(q, p), rtol=1e-4, atol=1e-5)  # and all of it in the end
    head = torch.eye(40)
    torch.testing.assert_close(cached_loss(q, head, ids, kept, chunk=4), top_k_kl(q, ids, kept).mean())


def test_a_mass_that_rounding_took_is_no_infinity():
    sure = torch.tensor([[100.0, 0.0, 0.0]])
    ids, kept = top_k(sure, 1)
    mine = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    loss = top_k_kl(mine, ids, kept.to(torch.float16)).sum()
    (gradient,) = torch.autograd.grad(loss, [mine])
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_verification_measures_what_its_names_say(tmp_path):
    model = teacher()
    made = convert(model, "rad-rwkv7", keep_attention="last:1", **RANKS["rad-rwkv7"])
    rows = some_tokens(model, 5, 13)
    found = verify(model, made, rows, batch=2)
    with torch.no_grad():
        mine, theirs = (m(rows[:, :-1])[0].flatten(0, 1) for m in (made, model))
    targets = rows[:, 1:].flatten()
    assert found.tokens == 60
    assert found.kl == pytest.approx(float(forward_kl(mine, theirs).mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert found.accuracy == pytest.approx(float((mine.argmax(-1) == targets).float().mean()))
    assert found.teacher_loss == pytest.approx(float(torch.nn.functional.cross_entropy(theirs, targets)), rel=1e-5)
    assert [layer["layer"] for layer in found.layers] == [0]
    silent = convert(model, "rad-rwkv7", **RANKS["rad-rwkv7"])
    for block in silent.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    for layer in verify(model, silent, rows).layers:  # whoever says nothing is as far off as the answers are large
        assert layer["relative"] == pytest.approx(1, abs=0.1)
    found.write(tmp_path)
    told = json.loads((tmp_path / "verification.json").read_text())
    assert told["kl"] == found.kl
    text = (tmp_path / "verification.txt").read_text()
    assert f"{found.kl:.4f} nats a token" in text
    assert f"    0   {found.layers[0]['error']:.5f}" in text


def test_a_teacher_of_another_width_is_compared_without_its_layers():
    small, large = teacher(), teacher(hidden_size=64, vocab_size=70)
    found = verify(large, convert(small, "arwkv", **RANKS["arwkv"]), some_tokens(small, 2, 9))
    assert found.layers == ()
    assert math.isfinite(found.kl)
