"""WKV-7 beyond the contract that all operators share (test_contract.py)."""

import pytest
import torch

from rookery.ops.dispatch import native_module
from rookery.ops.wkv7 import native, reference

if isinstance(native_module(), str):
    pytest.skip(native_module(), allow_module_level=True)


def arguments(batch=2, time=21, heads=3, key=32, value=16, dtype=torch.float32, rows=None):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    removal = torch.nn.functional.normalize(normal(batch, time, heads, key), dim=-1)
    rate = torch.rand(batch, time, heads, key, generator=generator, dtype=torch.float64)
    tensors = {
        "r": normal(batch, time, heads, key),
        "log_w": -0.6065 * torch.rand(batch, time, heads, key, generator=generator, dtype=torch.float64),
        "k": 0.3 * normal(batch, time, heads, key),
        "v": normal(batch, time, heads, value),
        "a": -removal,
        "b": removal * rate,
        "state": normal(rows or batch, heads, value, key),
    }
    return {name: x.to(torch.float32 if name in ("log_w", "state") else dtype) for name, x in tensors.items()}


@pytest.mark.parametrize("isa", native_module().available_isas())
@pytest.mark.parametrize(("key", "value"), [(64, 64), (32, 48), (16, 128), (128, 16)])
def test_every_instruction_set_agrees_with_the_reference(isa, key, value):
    call = arguments(key=key, value=value)
    ours = {name: x.clone().requires_grad_() for name, x in call.items()}
    theirs = {name: x.double().requires_grad_() for name, x in call.items()}
    got, want = native.wkv7(**ours, isa=isa), reference.wkv7(**theirs)
    weights = [torch.randn_like(x) for x in want]
    grads = torch.autograd.grad(got, list(ours.values()), [x.float() for x in weights])
    expected = torch.autograd.grad(want, list(theirs.values()), weights)
    names = ["y", "last state", *("d" + name for name in call)]
    for name, x, y in zip(names, [*got, *grads], [*want, *expected], strict=True):
        error = (x - y).abs().max() / y.abs().max()
        assert error < 2e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 7, 21]])
def test_native_operator_passes_opcheck(cu_seqlens):
    call = arguments(batch=1, rows=1 if cu_seqlens is None else 3)
    tensors = [x.requires_grad_() for x in call.values()]
    cuts = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    torch.library.opcheck(torch.ops.rookery.wkv7_native_forward.default, (*tensors, cuts, True, ""))
