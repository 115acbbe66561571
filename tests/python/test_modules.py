# SPDX-License-Identifier: MIT
"""T-64: modules of every rank are built, run, differentiated, saved and loaded; the spellings of their arguments."""

import copy
import io
import pickle

import dense
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import natten

MODULES = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D, 3: natten.NeighborhoodAttention3D}
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])


def by_hand(module, x, window, stride, dilation, causal, scale=None):
    """The module in plain PyTorch, of its parameters alone."""
    heads, grid = module.num_heads, x.shape[1:-1]
    head_dim = x.shape[-1] // heads
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias).unflatten(-1, (3, heads, head_dim))
    scale = head_dim**-0.5 if scale is None else scale
    out, _ = dense.attention(*qkv.unbind(-3), window, stride, dilation, causal, scale, bias=module.rpb)
    assert out.shape[1:-2] == grid
    return F.linear(out.flatten(-2), module.proj.weight, module.proj.bias)


def check(module, x, *parameters, scale=None):
    module, x = module.double(), x.double().requires_grad_()
    if module.rpb is not None:
        torch.nn.init.normal_(module.rpb)
    leaves = [x, *module.parameters()]
    out, expected = module(x), by_hand(module, x, *parameters, scale=scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    gradient = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, gradient), torch.autograd.grad(expected, leaves, gradient)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@RANKS
@pytest.mark.parametrize("options", [
    {},
    {"rel_pos_bias": True},
    {"dilation": 2},
    {"stride": 2},
    {"is_causal": True, "rel_pos_bias": True},
    {"qkv_bias": False},
    {"qk_scale": 0.7},
    {"qk_scale": 0.0, "rel_pos_bias": True},
], ids=str)  # fmt: skip
def test_against_plain_torch(rank, options):
    module = MODULES[rank](16, 4, 3, **options)
    x = torch.randn(2, *(6, 7, 8)[3 - rank :], 16)
    values = [(3,) * rank] + [
        (options.get(name, default),) * rank for name, default in (("stride", 1), ("dilation", 1), ("is_causal", False))
    ]
    check(module, x, *values, scale=options.get("qk_scale"))


def test_parameters_per_axis():
    module = natten.NeighborhoodAttention3D(
        12, 3, (2, 3, 5), stride=(1, 3, 2), dilation=[2, 1, 1], is_causal=[True, False, False], rel_pos_bias=True
    )
    assert module.rpb.shape == (3, 3, 5, 9)
    check(module, torch.randn(1, 4, 5, 6, 12), (2, 3, 5), (1, 3, 2), (2, 1, 1), (True, False, False))


@RANKS
def test_state_dict(rank):
    plain, biased = MODULES[rank](8, 2, 3), MODULES[rank](8, 2, 3, rel_pos_bias=True)
    keys = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(plain.state_dict()) == keys
    assert set(biased.state_dict()) == keys | {"rpb"}
    assert set(MODULES[rank](8, 2, 3, qkv_bias=False).state_dict()) == keys - {"qkv.bias"}
    assert plain.qkv.weight.shape == (24, 8) and biased.rpb.shape == (2, *(5,) * rank)
    x = torch.randn(1, *(5,) * rank, 8)
    for module in (plain, biased):
        other = copy.deepcopy(module)
        for p in other.parameters():
            torch.nn.init.normal_(p)
        assert not torch.equal(other(x), module(x))
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer))
        assert torch.equal(other(x), module(x))


def test_state_dict_of_0_14():
    """The checkpoints of that time hold rpb beside qkv and proj; the spelling `bias=` builds the module they fit."""
    torch.manual_seed(1)
    state = {
        "rpb": torch.randn(2, 13, 13),
        "qkv.weight": torch.randn(48, 16) / 4,
        "qkv.bias": torch.randn(48),
        "proj.weight": torch.randn(16, 16) / 4,
        "proj.bias": torch.randn(16),
    }
    module = natten.NeighborhoodAttention2D(dim=16, num_heads=2, kernel_size=7, dilation=1, bias=True)
    module.load_state_dict(state)
    x = torch.randn(1, 9, 10, 16)
    expected = by_hand(module.double(), x.double(), (7, 7), (1, 1), (1, 1), (False, False))
    assert (module.float()(x) - expected).abs().max() < 1e-4


@RANKS
def test_spellings(rank):
    """`dim` or `embed_dim`, `bias` or `rel_pos_bias`, None where a default is meant, lists, numpy integers."""
    torch.manual_seed(0)
    first = MODULES[rank](embed_dim=8, num_heads=2, kernel_size=3, rel_pos_bias=True)
    x = torch.randn(1, *(6,) * rank, 8)
    for module in (
        MODULES[rank](dim=8, num_heads=2, kernel_size=3, rel_pos_bias=True),
        MODULES[rank](8, 2, 3, bias=True),
        MODULES[rank](8, 2, [3] * rank, rel_pos_bias=True, dilation=None, is_causal=None, qk_scale=None),
        MODULES[rank](8, num_heads=2, kernel_size=(3,) * rank, rel_pos_bias=True, dilation=[1] * rank),
        MODULES[rank](8, 2, torch.Size((3,) * rank), 1, 1, False, True, None, 0.0, rel_pos_bias=True),
        MODULES[rank](8, 2, np.int64(3), rel_pos_bias=True, stride=[1] * rank, is_causal=[False] * rank),
    ):
        module.load_state_dict(first.state_dict())
        assert torch.equal(module(x), first(x))
    with pytest.raises(TypeError):
        MODULES[rank](8, 2, 3, dim=8)
    with pytest.raises(TypeError):
        MODULES[rank](8, 2, 3, bias=True, rel_pos_bias=True)
    with pytest.raises(TypeError):
        MODULES[rank](num_heads=2, kernel_size=3)


def test_whole_axis():
    module = natten.NeighborhoodAttention2D(8, 2, (-1, 3))
    check(module, torch.randn(1, 5, 6, 8), (5, 3), (1, 1), (1, 1), (False, False))
    module = natten.NeighborhoodAttention1D(8, 2, -1, is_causal=True)
    check(module, torch.randn(1, 7, 8), (7,), (1,), (1,), (True,))


@RANKS
def test_oversize_argument(rank):
    x = torch.randn(1, *(4,) * rank, 8)
    check(MODULES[rank](8, 2, 7, rel_pos_bias=True), x, (7,) * rank, (1,) * rank, (1,) * rank, (False,) * rank)
    with pytest.raises(ValueError):
        MODULES[rank](8, 2, 7, oversize="error")(x)
    with pytest.raises(ValueError):
        MODULES[rank](8, 2, 7, oversize="shrink")
    padding, older = MODULES[rank](8, 2, 7, rel_pos_bias=True, oversize="pad"), MODULES[rank](8, 2, 7, bias=True)
    older.load_state_dict(padding.state_dict())
    assert torch.equal(padding(x), older(x))


def test_projection_dropout():
    module = natten.NeighborhoodAttention2D(16, 2, 3, proj_drop=0.5)
    x = torch.randn(2, 8, 8, 16)
    dropped = module(x) == 0
    assert 0.4 < dropped.float().mean() < 0.6
    module.eval()
    assert not (module(x) == 0).any() and torch.equal(module(x), module(x))


@RANKS
def test_attention_dropout_acts(rank):
    """Where it cannot act it raises; it is never ignored. In evaluation it is off."""
    module = MODULES[rank](16, 2, 3, attn_drop=0.5, rel_pos_bias=True)
    without = MODULES[rank](16, 2, 3, rel_pos_bias=True)
    without.load_state_dict(module.state_dict())
    x = torch.randn(4, *(5,) * rank, 16)
    try:
        first, second = module(x), module(x)
    except NotImplementedError:
        pass
    else:
        assert not torch.equal(first, second) and not torch.equal(first, without(x))
        torch.manual_seed(3)
        mean = torch.stack([module(x).detach() for _ in range(400)]).mean(0)
        assert (mean - without(x)).abs().max() < 0.25 * without(x).abs().max()
        first.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())
    assert torch.equal(module.eval()(x), without.eval()(x))


@RANKS
@pytest.mark.parametrize("options", [{"stride": 2}, {"is_causal": True}, {"dilation": 2}, {"kernel_size": 9}], ids=str)
def test_attention_dropout_that_drops_nothing(rank, options):
    """So small a probability takes the path of dropout and drops nothing: it must be the same attention."""
    options = {"kernel_size": 3, "rel_pos_bias": True, "qk_scale": 0.7, **options}
    module = MODULES[rank](16, 2, attn_drop=1e-15, **options).double()
    without = MODULES[rank](16, 2, **options).double()
    torch.nn.init.normal_(module.rpb)
    without.load_state_dict(module.state_dict())
    x = torch.randn(2, *(5, 6, 7)[3 - rank :], 16, dtype=torch.float64)
    outs = [m(x) for m in (module, without)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-11)
    gradients = [torch.autograd.grad(out.sin().sum(), list(m.parameters())) for out, m in zip(outs, (module, without))]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_attention_dropout_of_zero_changes_no_bit():
    module, without = natten.NeighborhoodAttention2D(16, 2, 3, attn_drop=0.0), natten.NeighborhoodAttention2D(16, 2, 3)
    without.load_state_dict(module.state_dict())
    x = torch.randn(1, 5, 5, 16)
    assert torch.equal(module(x), without(x))


@RANKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(rank, dtype):
    module = MODULES[rank](16, 2, 3, rel_pos_bias=True).to(dtype)
    x = torch.randn(1, *(5,) * rank, 16, dtype=dtype, requires_grad=True)
    out = module(x)
    assert out.dtype == dtype
    out.square().sum().backward()
    assert x.grad.dtype == dtype and module.rpb.grad.dtype == dtype


@RANKS
def test_copies_and_pickles(rank):
    module = MODULES[rank](8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, *(5,) * rank, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    assert "kernel_size" in repr(module)


@RANKS
def test_compile(rank):
    torch.compiler.reset()
    module = MODULES[rank](8, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, *(5,) * rank, 8)
    grads = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        out = run(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_a_module_learns():
    """Fifty steps on a shift by two tokens, which a window of five can see."""
    torch.manual_seed(0)
    module = natten.NeighborhoodAttention1D(16, 2, 5, rel_pos_bias=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        x = torch.randn(8, 24, 16)
        loss = (module(x)[:, 2:-2] - x[:, 4:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
