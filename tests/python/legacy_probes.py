# SPDX-License-Identifier: MIT
"""Calls every name of legacy_names.py and compares what it gives: operators and layers with the dense fp64 reference,
switches with their rules, helpers with what they say they do.
"""

import warnings

import dense
import dense_unfused
import torch
from legacy_names import RANKS, probe

import natten

GRIDS = {1: (11,), 2: (7, 8), 3: (4, 5, 6)}


def rank_of(name: str) -> int:
    return next(int(c) for c in name if c.isdigit())


def rows(rank, heads=2, dim=8, dtype=torch.float64):
    """Heads-first queries, keys and values."""
    return [torch.randn(2, heads, *GRIDS[rank], dim, dtype=dtype) for _ in range(3)]


def last(x):
    return x.movedim(1, -2)


def close(a, b):
    torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=1e-5, atol=1e-5)


def dense_na(q, k, v, window, dilation=1, causal=False, scale=None, bias=None):
    rank = q.dim() - 3
    geometry = [dense_unfused.per_axis(x, rank) for x in (window, 1, dilation, causal)]
    return dense.attention(q, k, v, *geometry, q.shape[-1] ** -0.5 if scale is None else scale, bias)[0]


def names(template, *values):
    return [template.format(value) for value in values]


# --- unfused operators -----------------------------------------------------------------------------------------------


def expected(rank, window=3, dilation=1, biased=False):
    q, k, v = rows(rank)
    bias = torch.randn(2, *[2 * w - 1 for w in dense_unfused.per_axis(window, rank)], dtype=q.dtype) if biased else None
    logits, out = dense_unfused.attention(q, k, v, window, dilation, False, bias)
    return q, k, v, bias, logits, out


@probe(*names("functional.natten{}dqkrpb", "1", "2"))
def check_qkrpb(name, function):
    q, k, _, bias, logits, _ = expected(rank_of(name), 3, 2, True)
    for sizes in ((2,), (3, 2)):
        close(function(q, k, bias, *sizes), logits)
    close(function(q, k, bias, dilation=2), logits)
    close(function(q, k, bias, kernel_size=3, dilation=2), logits)


@probe(*names("functional.natten{}dqk", "1", "2"), *names("functional.na{}d_qk", *RANKS))
def check_qk(name, function):
    q, k, _, _, logits, _ = expected(rank_of(name), 3, 1)
    close(function(q, k, 3, 1), logits)


@probe(*names("functional.natten{}dav", "1", "2"), *names("functional.na{}d_av", *RANKS))
def check_av(name, function):
    _, _, v, _, logits, out = expected(rank_of(name), 3, 1)
    attn = logits.softmax(-1)
    close(function(attn, v, 3, 1), out)
    if "natten" in name:
        close(function(attn, v, 1), out)


@probe("functional.natten3dqkrpb", "functional.natten3dqk", "functional.natten3dav")
def check_natten3d(name, function):
    q, k, v, bias, logits, out = expected(3, (2, 3, 3), (2, 1, 1), name.endswith("rpb"))
    sizes = 2, 3, 2, 1
    if name.endswith("av"):
        close(function(logits.softmax(-1), v, *sizes), out)
    else:
        close(function(q, k, *([bias] if bias is not None else []), *sizes), logits)


@probe(*names("functional.na{}d_qk_with_bias", *RANKS))
def check_with_bias(name, function):
    rank = rank_of(name)
    window, dilation = ((2, 3, 3), (2, 1, 1)) if rank == 3 else (3, 2)
    q, k, _, bias, logits, _ = expected(rank, window, dilation, True)
    close(function(q, k, bias, *((2, 3, 2, 1) if rank == 3 else (3, 2))), logits)


@probe(
    *names("functional.NeighborhoodAttention{}DQKAutogradFunction", *RANKS),
    *names("functional.NeighborhoodAttention{}DAVAutogradFunction", *RANKS),
)
def check_autograd_function(name, function):
    q, k, v, bias, logits, out = expected(rank_of(name), 3, 1, True)
    if "QK" in name:
        close(function.apply(q, k, bias, None, 3, 1, False), logits)
    else:
        close(function.apply(logits.softmax(-1), v, None, 3, 1, False), out)


@probe(
    *names("nattencuda2d.{}", "NATTENQKRPBFunction", "NATTENAVFunction"),
    *names("nattencuda1d.{}", "NATTEN1DQKRPBFunction", "NATTEN1DAVFunction"),
)
def check_first_autograd_function(name, function):
    q, k, v, bias, logits, out = expected(rank_of(name), 3, 2, True)
    close(function.apply(q, k, bias, 2) if "QK" in name else function.apply(logits.softmax(-1), v, 2),
          logits if "QK" in name else out)  # fmt: skip


@probe(*names("functional.FusedNeighborhoodAttention{}D", *RANKS))
def check_fused_function(name, function):
    q, k, v = map(last, rows(rank_of(name)))
    close(function.apply(q, k, v, None, 3, 1, False, 0.5, None, None), dense_na(q, k, v, 3, scale=0.5))


@probe(*names("experimental.na{}d", *RANKS), *names("experimental.na{}d_forward_op", *RANKS))
def check_experimental(name, function):
    q, k, v = map(last, rows(rank_of(name)))
    close(function(q, k, v, 3, 2, True), dense_na(q, k, v, 3, 2, True))


@probe(*names("nested.na{}d_qk_nested", *RANKS), *names("nested.na{}d_av_nested", *RANKS))
def check_nested(name, function):
    rank = rank_of(name)
    shapes = [tuple(n + i for n in GRIDS[rank]) for i in (0, 1)]
    samples = [[torch.randn(2, *grid, 4, dtype=torch.float64) for grid in shapes] for _ in range(3)]
    q, k, v = (torch.nested.nested_tensor(x, requires_grad=True) for x in samples)
    exact = [dense_unfused.attention(*(x[i][None] for x in samples), 3) for i in (0, 1)]
    if "qk" in name:
        out = function(q, k, None, 3, 1)
    else:
        attn = torch.nested.nested_tensor([logits[0].softmax(-1) for logits, _ in exact])
        out = function(attn, v, 3, 1)
    for sample, pair in zip(out.unbind(), exact):
        close(sample, pair["av" in name][0])
    total = sum(sample.sum() for sample in out.unbind())
    (gradient,) = torch.autograd.grad(total, q if "qk" in name else v)
    assert gradient.is_nested and all(g.abs().sum() > 0 for g in gradient.unbind())


@probe(*names("ops.{}", "qk_cross_forward", "qk_cross_backward", "av_cross_forward", "av_cross_backward"))
def check_cross(name, function):
    query, extra = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 7, 6)
    attn = torch.einsum("bhyxd,bhnd->bhyxn", query, extra)
    d_attn = torch.randn_like(attn)
    if name.endswith("qk_cross_forward"):
        wide = torch.zeros(2, 3, 4, 5, 16)
        function(query, extra, wide[..., 9:])
        close(wide[..., 9:], attn)
    elif name.endswith("qk_cross_backward"):
        d_query, d_key = function(query, d_attn, extra)
        close(d_query, torch.einsum("bhyxn,bhnd->bhyxd", d_attn, extra))
        close(d_key, torch.einsum("bhyxn,bhyxd->bhnd", d_attn, query))
    elif name.endswith("av_cross_forward"):
        close(function(attn, extra), torch.einsum("bhyxn,bhnd->bhyxd", attn, extra))
    else:
        found, d_value = function(query, extra, attn)
        close(found, attn)
        close(d_value, torch.einsum("bhyxn,bhyxd->bhnd", attn, query))


# --- fused operators -------------------------------------------------------------------------------------------------


@probe(
    *names("na{}d", *RANKS),
    *names("backends.na{}d_flex", *RANKS),
    *names("backends.reference.na{}d_reference", *RANKS),
)
def check_fused(name, function):
    q, k, v = map(last, rows(rank_of(name)))
    close(function(q, k, v, 3, stride=1, dilation=2, is_causal=True), dense_na(q, k, v, 3, 2, True))


@probe(
    "functional.neighborhood_attention_generic", "backends.flex_fna_generic", "backends.reference.reference_fna_generic"
)
def check_generic(name, function):
    for rank in (1, 2, 3):
        q, k, v = map(last, rows(rank))
        close(function(q, k, v, 3, dilation=2), dense_na(q, k, v, 3, 2))
        if "backends" in name:
            close(function(q, k, v, 3, 1, 2), dense_na(q, k, v, 3, 2))


@probe("attention", "backends.flex_fmha")
def check_attention(name, function):
    q, k, v = (torch.randn(2, 9, 3, 8) for _ in range(3))
    close(function(q, k, v, True, 0.5), dense.full_attention(q, k, v, 0.5, True)[0])


@probe("merge_attentions")
def check_merge(name, function):
    q, k, v = (torch.randn(1, 8, 2, 4, dtype=torch.float64) for _ in range(3))
    halves = [dense.full_attention(q, k[:, part], v[:, part], 0.5) for part in (slice(0, 3), slice(3, 8))]
    out, lse = function([x for x, _ in halves], [x for _, x in halves])
    for a, b in zip((out, lse), dense.full_attention(q, k, v, 0.5)):
        close(a, b)


@probe(
    *names("backends.{}_fna_generic", "cutlass", "cutlass_hopper", "cutlass_blackwell"),
    *names("backends.na{}d_cutlass_fna", *RANKS),
    *names("backends.na{}d_cutlass_hopper_fna", *RANKS),
    *names("backends.na{}d_cutlass_blackwell_fna", *RANKS),
    *names("backends.{}_fmha", "cutlass", "cutlass_hopper", "cutlass_blackwell"),
)
def check_backend_of_a_gpu(name, function):
    """On CPU tensors they say what they need."""
    dense_kind = name.endswith("fmha")
    q = torch.randn(1, *GRIDS[rank_of(name) if any(c.isdigit() for c in name) else 1], 2, 8)
    try:
        function(q, q, q) if dense_kind else function(q, q, q, 3)
    except ValueError as error:
        assert "CUDA" in str(error)
    else:
        raise AssertionError("ran on the CPU")


@probe(
    *names("backends.can_run_{}_fna", "cutlass", "cutlass_hopper", "cutlass_blackwell"),
    "backends.can_run_flex_attention",
)
def check_can_run(name, function):
    q = torch.randn(1, 5, 5, 2, 8)
    assert function(q, q, q) is ("flex" in name)
    assert function(q, q, q.double()) is False


@probe(*names("backends.{}", "choose_backend", "choose_fmha_backend"))
def check_choose(name, function):
    q = torch.randn(1, 9, 2, 8)
    assert function(q, q, q, torch_compile=False) == ("flex-fmha" if "fmha" in name else "flex-fna")


@probe(*names("backends.get_compatible_{}backends", "", "fmha_"))
def check_compatible(name, function):
    q = torch.randn(1, 9, 2, 8)
    assert function(q, q, q, torch_compile=False) == ["flex-fmha" if "fmha" in name else "flex-fna"]


ENGINES = ("cutlass", "cutlass_hopper", "cutlass_blackwell")


@probe(
    *(f"get_{p}configs_for_{e}_{k}" for p in ("", "bwd_") for e in ENGINES for k in ("fna", "fmha")),
    *(
        f"backends.configs.{e}.get_all_{k}{p}_configs"
        for e in ENGINES
        for k in ("", "fmha_")
        for p in ("forward", "backward")
    ),
)
def check_configs_of_a_gpu(name, function):
    """None on the CPU; in the form of the backend on its GPU, as its own function makes it."""
    q = torch.randn(1, 9, 9, 2, 8)
    assert function(*([q] if "get_all" in name else [q, q, q])) == []


@probe("get_configs_for_flex_fna", "get_configs_for_flex_fmha", "backends.configs.flex.FLEX_FORWARD_TILE_SHAPES")
def check_flex_configs(name, function):
    q = torch.randn(1, 9, 9, 2, 8)
    if name.endswith("SHAPES"):
        assert set(function) == {1, 2, 3}
    elif name.endswith("fna"):
        for q_tile, kv_tile in function(q, q, q):
            close(natten.na2d(q, q, q, 3, q_tile_shape=q_tile, kv_tile_shape=kv_tile), dense_na(q, q, q, 3))
    else:
        q = q[:, 0]
        for q_tile, kv_tile in function(q, q, q):
            close(natten.attention(q, q, q, q_tile_size=q_tile, kv_tile_size=kv_tile), natten.attention(q, q, q))


# --- layers ----------------------------------------------------------------------------------------------------------


def check_layer(layer, rank, grid=None, padded=True):
    """Against the dense reference with the layer's own parameters; `padded`: the input is shorter than a window."""
    layer = layer.double()
    x = torch.randn(2, *(grid or GRIDS[rank]), 16, dtype=torch.float64)
    sizes, dilation = (dense_unfused.per_axis(getattr(layer, name, 1), rank) for name in ("kernel_size", "dilation"))
    amounts = [0, 0]
    for n, w, d in zip(reversed(x.shape[1:-1]), reversed(sizes), reversed(dilation)):
        amounts += [0, max(0, w * d - n) if padded else 0]
    wide = torch.nn.functional.pad(x, amounts)
    q, k, v = layer.qkv(wide).unflatten(-1, (3, layer.num_heads, -1)).unbind(-3)
    out = dense_na(q, k, v, sizes, dilation, getattr(layer, "is_causal", False), layer.scale, layer.rpb).flatten(-2)
    close(layer(x), layer.proj(out[(slice(None), *(slice(0, n) for n in x.shape[1:-1]))]))


@probe(
    *names("nattencuda{0}d.NeighborhoodAttention{0}D", "1", "2"),
    "NeighborhoodAttention",
    "nattencuda.NeighborhoodAttention",
)
def check_layer_of_013(name, layer):
    rank = rank_of(name) if any(c.isdigit() for c in name) else 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = layer(16, 5, 2, True, None, 0.0, 0.0, 2)
    deprecated = [w for w in caught if issubclass(w.category, DeprecationWarning)]
    assert bool(deprecated) == ("d." not in name)
    check_layer(module, rank, (9, 11)[:rank])
    for size in (4, 1):
        with_assertion(layer, 16, size, 2)


def with_assertion(call, *arguments):
    try:
        call(*arguments)
    except AssertionError:
        return
    raise AssertionError("nothing was asserted")


@probe(
    "nattentorch2d.LegacyNeighborhoodAttention2D",
    "LegacyNeighborhoodAttention2D",
    "LegacyNeighborhoodAttention",
    "nattentorch.LegacyNeighborhoodAttention",
)
def check_layer_of_torch_ops(name, layer):
    for mode in (0, 1):
        for grid in ((7, 9), (5, 5), (4, 9), (3, 2)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                check_layer(layer(16, 5, 2, mode=mode), 2, grid)


@probe(*names("natten{0}d.NeighborhoodAttention{0}D", *RANKS))
def check_layer_of_0146(name, layer):
    rank = rank_of(name)
    check_layer(layer(16, 2, 3, 3, 5) if rank == 3 else layer(16, 2, 3, 5), rank)
    assert layer(16, 2, 3, bias=False).rpb is None


@probe(*names("na{0}d.NeighborhoodAttention{0}D", *RANKS))
def check_layer_of_017(name, layer):
    rank = rank_of(name)
    check_layer(layer(16, 2, 3, 2, True), rank, padded=False)
    assert layer(16, 2, 3).rpb is None and layer(16, 2, 3, rel_pos_bias=True).rpb is not None
    assert callable(getattr(natten, f"na{rank}d"))


@probe(*names("NeighborhoodAttention{}D", *RANKS))
def check_layer_of_now(name, layer):
    rank = rank_of(name)
    check_layer(layer(16, 2, 3, 1, 2, False), rank, padded=False)
    check_layer(layer(dim=16, num_heads=2, kernel_size=3, dilation=None, rel_pos_bias=True), rank, padded=False)
