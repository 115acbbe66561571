# SPDX-License-Identifier: MIT
"""What real projects call, as they call it: arguments, order, layouts. Compared with the dense fp64 reference. Fused
calls and layers; test_clients_unfused.py has the others."""

import pytest
import torch
from clients import close, dense_layer, dense_na, rows
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

import natten
from natten import context

pytestmark = pytest.mark.usefixtures("initial_switches")


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


@pytest.mark.parametrize("compiled", [False, True])
def test_vllm_omni_and_xdit(compiled):
    """They serve the diffusers processor: [batch, heads, tokens, head_dim] of a server's layout, brought into the shape
    of a volume without a copy, in inference mode, in half precision, eager and compiled."""
    grid = (4, 6, 9)
    q, k, v = rows(2, 3, 4 * 6 * 9, 64, dtype=torch.bfloat16)

    def processor(q, k, v):
        q, k, v = (x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v))
        out = natten.functional.na3d(q, k, v, kernel_size=(3, 5, 5), scale=1.0, backend=None)
        return out.flatten(1, 3).flatten(2)

    volumes = [x.transpose(1, 2).unflatten(1, grid) for x in (q * 64**-0.5, k, v)]
    exact = dense_na(*volumes, (3, 5, 5), scale=1.0).flatten(1, 3).flatten(2)
    run = torch.compile(processor, fullgraph=True, backend="aot_eager") if compiled else processor
    with torch.inference_mode():
        close(run(q * 64**-0.5, k, v), exact, 1e-2)


def test_pixal3d():
    """Saganaki22/Pixal3D-ComfyUI: wants release 0.21.6 or newer with its library. Which functions it calls is not
    known: those of that release for volumes, windows larger than the volume among them, and dense attention."""
    assert natten.HAS_LIBNATTEN
    assert tuple(int(n) for n in natten.__version__.split(".")[:3]) >= (0, 21, 6)
    q, k, v = rows(1, 4, 5, 6, 2, 32, dtype=torch.float16)
    options = {"stride": 1, "dilation": 1, "is_causal": False, "scale": None, "backend": None, "return_lse": True}
    out, lse = natten.na3d(q, k, v, (3, 3, 5), **options)
    close(out, dense_na(q, k, v, (3, 3, 5)), 3e-3)
    assert lse.shape == q.shape[:-1] and lse.dtype == torch.float32
    close(natten.na3d(q, k, v, (8, 8, 8), torch_compile=False), dense_na(q, k, v, 8), 3e-3)
    line = [x.flatten(1, 3) for x in (q, k, v)]
    close(natten.attention(*line, run_persistent_kernel=True), dense_na(*line, 120), 3e-3)


def test_ltx_fallback():
    """`fallback_na.eager.na3d`, the eager form that LTX keeps: called as the fused one, windows cut at the volume."""
    q, k, v = rows(1, 3, 6, 9, 2, 16)
    for kernel_size in ((3, 5, 5), (7, 5, 5), (3, 11, 3)):
        close(natten.na3d(q, k, v, kernel_size=kernel_size, scale=1.0), dense_na(q, k, v, kernel_size, scale=1.0))


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


class _Shards(torch.Tensor):
    """A tensor whose class intercepts torch's functions, as its sharded tensors do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_physicsnemo_layers():
    """Normalised queries and keys under autocast, a backend that is passed through, and tensors of another class."""
    norms = [torch.nn.LayerNorm(16) for _ in range(2)]
    q, k, v = rows(1, 8, 9, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = norms[0](q), norms[1](k)
        out = natten.functional.na2d(*normed, v, 3, dilation=2, backend=None)
    assert out.dtype == torch.bfloat16
    close(out, dense_na(*normed, v, 3, 2), 2e-2)
    out = natten.functional.na2d(*(x.as_subclass(_Shards) for x in (q, k, v)), 3, dilation=2)
    close(out.as_subclass(torch.Tensor), dense_na(q, k, v, 3, 2))


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
    for head_dim in (16, 32, 48, 64):
        q, k, v = rows(1, *grid, 2, head_dim)
        out = natten.na3d(q, k, v, kernel_size, is_causal=causal, scale=None)
        close(out, dense_na(q, k, v, kernel_size, causal=causal))
    q, k, v = (x[:, 0] for x in (q, k, v))
    close(natten.na2d(q, k, v, 3, is_causal=None, scale=0.5), dense_na(q, k, v, 3, scale=0.5))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_mps(rank):
    """Another drop-in: fused and unfused operators of three ranks, and grids of several sizes in one call."""
    grids = [(5, 6, 7)[:rank], (4, 3, 5)[:rank], (1, 1, 1)[:rank]]
    tokens = sum(int(torch.tensor(grid).prod()) for grid in grids)
    q, k, v = rows(1, tokens, 2, 8)
    out = getattr(natten.functional, f"na{rank}d_varlen")(q, k, v, grids, 3)
    begin = 0
    for grid in grids:
        end = begin + int(torch.tensor(grid).prod())
        sample = [x[:, begin:end].reshape(1, *grid, 2, 8) for x in (q, k, v)]
        exact = dense_na(*sample, 3)
        close(out[:, begin:end].reshape(exact.shape), exact)
        heads_first = [x.movedim(-2, 1) for x in sample]
        attn = getattr(natten.functional, f"na{rank}d_qk")(heads_first[0] * 8**-0.5, heads_first[1], 3).softmax(-1)
        unfused = getattr(natten.functional, f"na{rank}d_av")(attn.nan_to_num(), heads_first[2], 3)
        close(unfused.movedim(1, -2), exact)
        begin = end


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


@pytest.mark.parametrize(
    "options",
    [{"dilation": 2}, {"qkv_bias": False, "attn_drop": 0.0, "proj_drop": 0.0}, {"rel_pos_bias": True, "dilation": 3}],
    ids=["NAC-TCN", "distilnlp", "PCF-NAT"],
)
def test_lines(options):
    """Projects on sequences, all with `dim=`."""
    from natten import NeighborhoodAttention1D

    layer = NeighborhoodAttention1D(dim=16, num_heads=4, kernel_size=5, **options)
    x = torch.randn(3, 21, 16)
    close(layer(x), dense_layer(layer, x))


def test_hilbert_local_attention():
    """One axis along a space-filling curve."""
    from natten import NeighborhoodAttention1D

    bias = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}
    layer = NeighborhoodAttention1D(dim=16, kernel_size=7, dilation=None, num_heads=2, **bias)
    x = torch.randn(2, 64, 16)[:, torch.randperm(64)]
    close(layer(x), dense_layer(layer, x))
