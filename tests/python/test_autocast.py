# SPDX-License-Identifier: MIT
"""T-60: autocast. Mixed types are cast under it and refused outside of it; float64 is left alone."""

import pytest
import torch

import natten

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
MODULES = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D, 3: natten.NeighborhoodAttention3D}


def device_type():
    return torch.get_default_device().type


def leaves(*dtypes, shape=(2, 5, 6, 2, 8)):
    return [torch.randn(shape).to(dtype).requires_grad_() for dtype in dtypes]


@HALVES
@pytest.mark.parametrize("mixed", ["v", "q", "none", "all"])
def test_mixed_types(half, mixed):
    dtypes = [half if mixed == "all" or name == mixed else torch.float32 for name in "qkv"]
    q, k, v = leaves(*dtypes)
    with torch.autocast(device_type(), dtype=half):
        out, lse = natten.na2d(q, k, v, 3, return_lse=True)
        assert out.dtype == half and lse.dtype == torch.float32
    (out.float().sum() + lse.sum()).backward()
    assert [x.grad.dtype for x in (q, k, v)] == dtypes
    expected = natten.na2d(*(x.detach().to(half) for x in (q, k, v)), 3)
    assert torch.equal(out, expected)


@HALVES
def test_optional_tensors_are_cast_too(half):
    q, k, v = leaves(torch.float32, torch.float32, half)
    bias = torch.randn(2, 5, 5, requires_grad=True)
    extra_k, extra_v = torch.randn(2, 2, 3, 2, 8, requires_grad=True)
    with torch.autocast(device_type(), dtype=half):
        out = natten.na2d(q, k, v, 3, rpb=bias, additional_keys=extra_k, additional_values=extra_v)
    assert out.dtype == half
    out.float().square().sum().backward()
    assert bias.grad.dtype == torch.float32 and bias.grad.any()


@HALVES
def test_attention_and_generic(half):
    q, k, v = leaves(torch.float32, torch.float32, half, shape=(2, 7, 2, 8))
    with torch.autocast(device_type(), dtype=half):
        assert natten.attention(q, k, v).dtype == half
        assert natten.functional.neighborhood_attention_generic(q, k, v, (3,)).dtype == half


@HALVES
def test_float64_is_left_alone(half):
    q, k, v = leaves(*[torch.float64] * 3)
    with torch.autocast(device_type(), dtype=half):
        out, lse = natten.na2d(q, k, v, 3, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    assert torch.equal(out, natten.na2d(q, k, v, 3))


@HALVES
def test_disabled_inside(half):
    q, k, v = leaves(*[torch.float32] * 3)
    with torch.autocast(device_type(), dtype=half), torch.autocast(device_type(), enabled=False):
        assert natten.na2d(q, k, v, 3).dtype == torch.float32


@pytest.mark.parametrize("odd", ["q", "k", "v"])
def test_mixed_types_without_autocast(odd):
    q, k, v = leaves(*[torch.bfloat16 if name == odd else torch.float32 for name in "qkv"])
    with pytest.raises(ValueError, match="(?s)float32.*bfloat16|bfloat16.*float32") as error:
        natten.na2d(q, k, v, 3)
    assert "\n" not in str(error.value)


@HALVES
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules(rank, half):
    module = MODULES[rank](16, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, *(4,) * rank, 16, requires_grad=True)
    with torch.autocast(device_type(), dtype=half):
        out = module(x)
    assert out.dtype == half
    out.float().square().mean().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    with torch.autocast(device_type(), dtype=half, enabled=False):
        exact = module(x)
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_modules_with_a_gradient_scaler():
    module = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device_type(), init_scale=1024.0)
    before = [p.detach().clone() for p in module.parameters()]
    x = torch.randn(2, 5, 5, 16)
    with torch.autocast(device_type(), dtype=torch.float16):
        loss = module(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert all(not torch.equal(p, b) and p.isfinite().all() for p, b in zip(module.parameters(), before))


@HALVES
def test_under_compile(half):
    torch.compiler.reset()
    kind = device_type()

    def function(q, k, v):
        with torch.autocast(kind, dtype=half):
            return natten.na2d(q, k, v, 3)

    q, k, v = leaves(torch.float32, torch.float32, half)
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    assert out.dtype == half and torch.equal(out, function(q, k, v))
    out.float().sum().backward()
    assert [x.grad.dtype for x in (q, k, v)] == [torch.float32, torch.float32, half]
