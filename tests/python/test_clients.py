# SPDX-License-Identifier: MIT
"""What real projects call, as they call it: arguments, order, layouts. Compared with the dense fp64 reference."""

import dense
import dense_unfused
import pytest
import torch
from torch.nn.functional import dropout, pad, softmax
from torch.utils.checkpoint import checkpoint

import natten
from natten import context


@pytest.fixture(autouse=True)
def _initial_switches():
    context.NattenContext.reset()
    context.AutotunerContext.reset()
    yield
    context.NattenContext.reset()
    context.AutotunerContext.reset()


def rows(*shape, dtype=torch.float32, count=3):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(count)]


def per_axis(value, rank):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def dense_na(q, k, v, window, dilation=1, causal=False, scale=None, stride=1, bias=None):
    """Heads-last attention in fp64."""
    rank = q.dim() - 3
    geometry = [per_axis(x, rank) for x in (window, stride, dilation, causal)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias is None else bias.double()
    return dense.attention(q.double(), k.double(), v.double(), *geometry, scale, bias)[0]


def dense_layer(module, x, pad_input=False, table=None):
    """A layer in fp64, from its parameters."""
    x = x.detach().double()
    grid, rank = x.shape[1:-1], x.dim() - 2
    if pad_input:
        amounts = [0, 0]
        for n, k, d in zip(reversed(grid), reversed(module.kernel_size), reversed(module.dilation)):
            amounts += [0, max(0, k * d - n)]
        x = pad(x, amounts)
    p = {name: y.detach().double() for name, y in module.state_dict().items()}
    qkv = torch.nn.functional.linear(x, p["qkv.weight"], p.get("qkv.bias"))
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    out = dense_na(q, k, v, module.kernel_size, module.dilation, module.is_causal, module.scale, bias=p.get("rpb"))
    out = out.flatten(-2)[(slice(None), *(slice(0, n) for n in grid))]
    assert rank == module.rank
    return torch.nn.functional.linear(out, p["proj.weight"], p["proj.bias"])


def close(got, exact, tolerance=2e-5):
    assert got.shape == exact.shape
    error = float((got.double() - exact).detach().abs().max() / exact.detach().abs().max())
    assert error <= tolerance, error


# --- fused calls -----------------------------------------------------------------------------------------------------


def test_ltx_2():
    """Lightricks/LTX-2: bf16, queries scaled by the caller, keyword window, a backend of the original or none."""
    natten.use_kv_parallelism_in_fused_na(False)
    q, k, v = rows(1, 5, 6, 9, 2, 64, dtype=torch.bfloat16)
    q = q * 64**-0.5
    out = natten.na3d(q, k, v, kernel_size=(3, 5, 5), scale=1.0, backend=None)
    assert out.dtype == torch.bfloat16
    close(out, dense_na(q, k, v, (3, 5, 5), scale=1.0), 1e-2)
    with pytest.raises(ValueError, match="CUDA"):  # its other backend needs a GPU, and says so
        natten.na3d(q, k, v, kernel_size=(3, 5, 5), scale=1.0, backend="cutlass-fna")


def test_diffusers():
    """The LTX-2.5 decoder: `get_kernel(...).na3d`, formerly `natten.functional.na3d`."""
    from natten.functional import na3d

    q, k, v = rows(1, 4, 5, 6, 2, 16)
    close(na3d(q, k, v, kernel_size=(3, 3, 3), scale=1.0, backend=None), dense_na(q, k, v, 3, scale=1.0))


@pytest.mark.parametrize(
    "kernel_size, stride, dilation",
    [((5, 4, 8), (1, 1, 1), (1, 2, 1)), ((5, 6, 8), (1, 3, 1), (1, 1, 2)), ((5, 6, 12), (1, 3, 8), 1)],
)
def test_cosmos(kernel_size, stride, dilation):
    from natten.functional import neighborhood_attention_generic

    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    q, k, v = rows(1, 5, 8, 16, 2, 32)
    tiles = {"q_tile_shape": (4, 4, 8), "kv_tile_shape": (4, 4, 8), "backward_q_tile_shape": (4, 4, 4)}
    tiles |= {"backward_kv_tile_shape": (4, 4, 8), "backward_use_pt_reduction": False, "run_persistent_kernel": True}
    options = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": False}
    out = neighborhood_attention_generic(query=q, key=k, value=v, **options, **tiles)
    close(out, dense_na(q, k, v, kernel_size, dilation, stride=stride))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_physicsnemo(rank):
    function = getattr(natten.functional, f"na{rank}d")
    q, k, v = rows(1, *(5, 6, 7)[:rank], 2, 8)
    close(function(q, k, v, 3, dilation=2), dense_na(q, k, v, 3, 2))
    close(function(q, k, v, 3, is_causal=True, scale=0.5), dense_na(q, k, v, 3, causal=True, scale=0.5))


def test_anyup():
    """Values of another width than keys, a dilation per axis that is the ratio of two grids."""
    from natten import na2d

    (q, k), (v,) = rows(1, 12, 18, 2, 8, count=2), rows(1, 12, 18, 2, 24, count=1)
    out = na2d(q, k, v, kernel_size=(3, 5), dilation=(4, 3), stride=1)
    close(out, dense_na(q, k, v, (3, 5), (4, 3)))


def test_k_diffusion():
    """Asks for the fused operator and takes it, else the two of 0.17; cosine similarity, a scale of its own."""
    assert natten.has_fused_na()
    q, k, v = rows(2, 6, 7, 3, 8)
    q, k = (torch.nn.functional.normalize(x, dim=-1) * 10**0.5 for x in (q, k))
    fused = natten.functional.na2d(q, k, v, 5, scale=1.0)
    exact = dense_na(q, k, v, 5, scale=1.0)
    close(fused, exact)
    q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
    attn = torch.softmax(natten.functional.na2d_qk(q, k, 5), dim=-1)
    close(natten.functional.na2d_av(attn, v, 5).movedim(1, -2), exact)


def test_flocoder():
    """Branches on the version; its tensors are heads-first, which the fused operator points out. Checkpointed."""
    from natten import has_half, use_fused_na

    use_fused_na(True)
    assert has_half()
    assert tuple(int(n) for n in natten.__version__.split(".")[:2]) >= (0, 20)
    q, k, v = rows(1, 4, 16, 16, 8)  # [batch, heads, y, x, head_dim]
    with pytest.warns(UserWarning, match="heads first"):
        natten.functional.na2d(q, k, v, kernel_size=7)
    q, k, v = (x.movedim(1, -2).requires_grad_() for x in (q, k, v))

    def block(q, k, v):
        return natten.functional.na2d(q, k, v, kernel_size=7)

    out = checkpoint(block, q, k, v, use_reentrant=False)
    close(out, dense_na(q, k, v, 7))
    again = torch.autograd.grad(out.sum(), (q, k, v))
    for a, b in zip(again, torch.autograd.grad(block(q, k, v).sum(), (q, k, v))):
        assert torch.equal(a, b)


def test_segman():
    """A scale above one on purpose, and a header full of imports."""
    from natten import NeighborhoodAttention2D, use_fused_na, use_gemm_na  # noqa: F401
    from natten.flops import add_natten_handle, av_2d_flop, qk_2d_rpb_flop  # noqa: F401
    from natten.functional import na2d, na2d_av, na2d_qk, natten2dav, natten2dqkrpb  # noqa: F401

    use_fused_na(True)
    use_gemm_na(True)
    q, k, v = rows(1, 6, 9, 2, 8)
    out = na2d(q, k, v, kernel_size=3, dilation=2, scale=float(8**0.5))
    close(out, dense_na(q, k, v, 3, 2, scale=8**0.5))


@pytest.mark.parametrize(
    "grid, kernel_size, causal",
    [((1, 4, 5), (3, 3, 3), False), ((4, 5, 6), (1, 3, 3), True), ((3, 5, 4), (9, 9, 9), (True, False, False))],
)
def test_comfy_kitchen(grid, kernel_size, causal):
    """A competing drop-in clamps windows and takes windows and axes of one."""
    q, k, v = rows(1, *grid, 2, 48)
    out = natten.na3d(q, k, v, kernel_size, is_causal=causal, scale=None)
    close(out, dense_na(q, k, v, kernel_size, causal=causal))


# --- unfused calls ---------------------------------------------------------------------------------------------------


def exact_attention(q, k, v, window, dilation=1, rpb=None):
    rpb = None if rpb is None else rpb.double()
    return dense_unfused.attention(q.double(), k.double(), v.double(), window, dilation, False, rpb)


def test_all_in_one():
    """mir-aidj/all-in-one: 0.14.6 names in one and two dimensions, five and four arguments."""
    from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb

    for grid, qkrpb, av in (((17,), natten1dqkrpb, natten1dav), ((10, 14), natten2dqkrpb, natten2dav)):
        q, k, v = rows(2, 3, *grid, 12)
        rpb = torch.randn(3, *(9 for _ in grid), requires_grad=True)
        attn = qkrpb(q, k, rpb, 5, 2)
        logits, exact = exact_attention(q, k, v, 5, 2, rpb.detach())
        close(attn, logits)
        out = av(softmax(attn, dim=-1), v, 5, 2)
        close(out, exact)
        assert torch.autograd.grad(out.sum(), rpb)[0].isfinite().all()


def test_transformers_before_0_14_5():
    """Four and three arguments; the padded input of the layer around them is the caller's."""
    from natten.functional import natten2dav, natten2dqkrpb

    q, k, v = rows(1, 2, 14, 15, 8)
    rpb = torch.randn(2, 13, 13)
    attn = natten2dqkrpb(q, k, rpb, 2)
    logits, exact = exact_attention(q, k, v, 7, 2, rpb)
    close(attn, logits)
    close(natten2dav(softmax(attn, dim=-1), v, 2), exact)


def test_jafar():
    """Wants the weights as well."""
    from natten.functional import na2d_av, na2d_qk

    q, k, v = rows(1, 2, 9, 9, 16)
    attn = na2d_qk(q, k, kernel_size=(3, 3), dilation=(2, 2)).softmax(-1)
    _, exact = exact_attention(q, k, v, 3, 2)
    close(na2d_av(attn, v, kernel_size=(3, 3), dilation=(2, 2)), exact)
    q, k, v = (x.movedim(1, -2) for x in (q, k, v))
    out, weights = natten.na2d(q, k, v, kernel_size=(3, 3), dilation=(2, 2), scale=1.0, return_weights=True)
    close(out.movedim(-2, 1), exact)
    close(weights, attn.double())


def test_stylenat():
    """HydraNA: heads in groups, the last ones larger, each group with its window, dilation and bias."""
    from natten import use_autotuner, use_fused_na
    from natten.functional import na2d_av, na2d_qk

    use_fused_na(True)
    use_autotuner(True)
    heads, head_dim, kernel_sizes, dilations = 5, 8, [3, 7], [1, 2]
    groups = [2, 3]
    qkv = torch.nn.Linear(heads * head_dim, 3 * heads * head_dim)
    x = torch.randn(2, 14, 16, heads * head_dim)
    tables = [torch.randn(h, 2 * k - 1, 2 * k - 1) for h, k in zip(groups, kernel_sizes)]
    q, k, v = qkv(x).reshape(2, 14, 16, 3, heads, head_dim).permute(3, 0, 4, 1, 2, 5)
    q = q * head_dim**-0.5
    outs, exacts = [], []
    for _q, _k, _v, kernel_size, dilation, rpb in zip(
        q.split(groups, 1), k.split(groups, 1), v.split(groups, 1), kernel_sizes, dilations, tables
    ):
        attn = na2d_qk(_q, _k, kernel_size=kernel_size, dilation=dilation, rpb=rpb)
        attn = dropout(softmax(attn, dim=-1), 0.0)
        outs.append(na2d_av(attn, _v, kernel_size=kernel_size, dilation=dilation))
        exacts.append(exact_attention(_q.detach(), _k.detach(), _v.detach(), kernel_size, dilation, rpb)[1])
    out = torch.cat(outs, 1).permute(0, 2, 3, 1, 4).reshape(x.shape)
    close(out, torch.cat(exacts, 1).permute(0, 2, 3, 1, 4).reshape(x.shape))


def test_overlock():
    """ContMix: weights of its own, shared by the channels of a group."""
    from natten.functional import na2d_av

    weights, (value,) = torch.rand(2, 4, 9, 11, 25), rows(2, 4, 9, 11, 6, count=1)
    where, _ = dense_unfused.slots_of((9, 11), 5, 1, False)
    exact = dense_unfused.dense_av(weights.double(), value.double(), None, where)
    close(na2d_av(weights, value, kernel_size=5), exact)


def test_agileformer():
    """0.15 names, all positional."""
    from natten.functional import na2d_av, na2d_qk_with_bias

    q, k, v = rows(1, 2, 9, 10, 8)
    rpb = torch.randn(2, 9, 9)
    attn = na2d_qk_with_bias(q, k, rpb, 5, 1)
    logits, exact = exact_attention(q, k, v, 5, 1, rpb)
    close(attn, logits)
    close(na2d_av(attn.softmax(-1), v, 5, 1), exact)


def test_superpixels():
    """Weights changed between the two steps."""
    from natten.functional import natten2dav, natten2dqkrpb

    q, k, v = rows(1, 2, 8, 9, 8)
    attn = natten2dqkrpb(q, k, torch.zeros(2, 9, 9), 5, 1)
    weights = attn.softmax(-1) * torch.rand_like(attn)
    weights = weights / weights.sum(-1, keepdim=True)
    where, _ = dense_unfused.slots_of((8, 9), 5, 1, False)
    close(natten2dav(weights, v, 5, 1), dense_unfused.dense_av(weights.double(), v.double(), None, where))


def test_native_segmentation():
    """Logits with a bias alone, keys in the place of queries."""
    from natten.functional import na2d_qk

    q, k, v = rows(1, 2, 8, 9, 8)
    bias = torch.randn(2, 5, 5)
    close(na2d_qk(k, q, kernel_size=3, rpb=bias), exact_attention(k, q, v, 3, 1, bias)[0])


def test_cosmology():
    """Three axes, a radial bias between the steps, periodic padding around them."""
    from natten.functional import na3d, na3d_av, na3d_qk

    q, k, v = (pad(x.flatten(0, 1).movedim(-1, 1), (1,) * 6, mode="circular") for x in rows(1, 2, 4, 5, 6, 8))
    q, k, v = (x.movedim(1, -1)[None] for x in (q, k, v))
    radial = torch.randn(27)
    attn = na3d_qk(q, k, kernel_size=3, dilation=1) + radial
    logits, _ = exact_attention(q, k, v, 3)
    close(attn, logits + radial.double())
    where, _ = dense_unfused.slots_of(q.shape[2:-1], 3, 1, False)
    exact = dense_unfused.dense_av(attn.double().softmax(-1), v.double(), None, where)
    close(na3d_av(attn.softmax(-1), v, kernel_size=3, dilation=1), exact)
    q, k, v = (x.movedim(1, -2) for x in (q, k, v))
    close(na3d(q, k, v, kernel_size=3), dense_na(q, k, v, 3))


# --- layers ----------------------------------------------------------------------------------------------------------


def test_earth2studio():
    """A list for a window, periodic longitude around it."""
    from natten import NeighborhoodAttention2D

    layer = NeighborhoodAttention2D(32, num_heads=4, kernel_size=[3, 5], qkv_bias=True)
    x = pad(torch.randn(1, 32, 6, 8), (2, 2, 0, 0), mode="circular").movedim(1, -1)
    close(layer(x)[:, :, 2:-2], dense_layer(layer, x)[:, :, 2:-2])


def test_torch_harmonics():
    from natten import NeighborhoodAttention2D

    options = {"num_heads": 2, "qkv_bias": True, "qk_scale": None, "proj_drop": 0.0}
    layer = NeighborhoodAttention2D(16, kernel_size=(3, 5), dilation=1, **options)
    x = torch.randn(1, 7, 9, 16)
    close(layer(x), dense_layer(layer, x))


@pytest.mark.parametrize("name", ["embed_dim", "dim"])
def test_graph_weather(name):
    from natten import NeighborhoodAttention3D

    layer = NeighborhoodAttention3D(**{name: 16}, num_heads=2, kernel_size=(3, 5, 5))
    x = torch.randn(1, 3, 6, 7, 16)
    close(layer(x), dense_layer(layer, x))


@pytest.mark.parametrize("spelling", ["rel_pos_bias", "bias"])
def test_nat_and_dinat(spelling):
    """The NAT repository: layers with a bias, `dilation=None`, and inputs smaller than a window. Its published
    detection models were trained with padding, whichever spelling the installed release took."""
    from natten import NeighborhoodAttention2D
    from natten.flops import add_natten_handle  # noqa: F401

    assert hasattr(natten, "context")
    context.set_oversize("pad")
    for kernel_size, dilation, grid in ((7, None, (9, 12)), (3, 4, (7, 20)), (7, None, (5, 4))):
        options = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0, spelling: True}
        layer = NeighborhoodAttention2D(24, kernel_size=kernel_size, dilation=dilation, num_heads=3, **options)
        assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "rpb"}
        x = torch.randn(2, *grid, 24)
        close(layer(x), dense_layer(layer, x, pad_input=True))


def test_oneformer():
    """Never asks for the bias that its checkpoints have, for it was the default of 0.14.6."""
    from natten import NeighborhoodAttention2D

    options = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0}
    layer = NeighborhoodAttention2D(16, kernel_size=3, dilation=4, num_heads=2, **options)
    trained = NeighborhoodAttention2D(16, kernel_size=3, dilation=4, num_heads=2, bias=True, **options)
    layer.load_state_dict(trained.state_dict())
    context.set_oversize("pad")
    x = torch.randn(1, 10, 13, 16)
    close(layer(x), dense_layer(trained, x, pad_input=True))


def test_nac_tcn():
    from natten import NeighborhoodAttention1D

    layer = NeighborhoodAttention1D(dim=16, num_heads=4, kernel_size=5, dilation=2)
    x = torch.randn(3, 21, 16)
    close(layer(x), dense_layer(layer, x))


def test_hilbert_local_attention():
    """One axis along a space-filling curve."""
    from natten import NeighborhoodAttention1D

    bias = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}
    layer = NeighborhoodAttention1D(dim=16, kernel_size=7, dilation=None, num_heads=2, **bias)
    x = torch.randn(2, 64, 16)[:, torch.randperm(64)]
    close(layer(x), dense_layer(layer, x))
