# SPDX-License-Identifier: MIT
"""The config finders of 0.21 list the tiles of our plans, in the forms of the original, and every one may be given
back: to na1d, na2d, na3d and attention, forward and backward."""

import dense
import pytest
import torch

import natten

GRIDS = {1: (90,), 2: (9, 20), 3: (5, 8, 9)}
TILES = ("q_tile_shape", "kv_tile_shape")
BACKWARD = ("backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction")
ENGINES = {"cutlass": "cutlass", "cutlass_hopper": "hopper", "cutlass_blackwell": "blackwell", "flex": "flex"}


def found(name, tensors, backward=False):
    """The configurations of a finder as arguments."""
    for config in getattr(natten.backends.configs, name)(*tensors):
        if not backward and name.startswith("get_configs_for_cutlass_hopper"):
            config, schedule = config
            yield dict(zip(TILES, config, strict=True), kernel_schedule=schedule)
        else:
            yield dict(zip(BACKWARD if backward else TILES, config))


def inputs(grid, dtype):
    return [torch.randn(2, *grid, 2, 32, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def check(function, exactly, tensors, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out, exact = function(*tensors), exactly(*wide)
    dout = torch.randn_like(exact)
    got = out, *torch.autograd.grad(out, tensors, dout.to(dtype))
    for a, b in zip(got, (exact, *torch.autograd.grad(exact, wide, dout))):
        assert (a.double() - b).abs().max() <= tolerance * max(float(b.detach().abs().max()), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_fna(engine, rank, dtype):
    tensors = inputs(GRIDS[rank], dtype)
    backend, function = f"{ENGINES[engine]}-fna", getattr(natten, f"na{rank}d")
    forward = list(found(f"get_configs_for_{engine}_fna", tensors))
    backward = [] if engine == "flex" else list(found(f"get_bwd_configs_for_{engine}_fna", tensors, True))
    runs = backend in natten.backends.get_compatible_backends(*tensors)
    if engine == "flex":
        assert forward and runs
    else:
        assert not (forward or backward) or runs
    tiles = {tuple(config["q_tile_shape"]) for config in forward}
    plans = natten.list_plans(*tensors, [min(7, n) for n in GRIDS[rank]])
    sizes = (plan.split("/q")[1].split("x") if "/q" in plan else [1, 1, 1] for plan in plans)
    assert tiles <= {tuple(int(n) for n in tile[3 - rank :]) for tile in sizes}

    def exactly(*x):
        return dense.attention(*x, [3] * rank, [1] * rank, [1] * rank, [False] * rank, 32**-0.5)[0]

    for config in (*forward, *backward):
        check(lambda *x, c=config: function(*x, 3, backend=backend, **c), exactly, tensors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_fmha(engine, dtype):
    tensors = inputs((40,), dtype)
    backend = f"{ENGINES[engine]}-fmha"
    forward = list(found(f"get_configs_for_{engine}_fmha", tensors))
    backward = [] if engine == "flex" else list(found(f"get_bwd_configs_for_{engine}_fmha", tensors, True))
    assert forward or engine != "flex"
    for config in (*forward, *backward):
        config = {name.replace("_shape", "_size"): x for name, x in config.items()}
        check(
            lambda *x, c=config: natten.attention(*x, backend=backend, **c),
            lambda *x: dense.full_attention(*x, 32**-0.5)[0],
            tensors,
            dtype,
        )


def test_several_plans_are_several_configurations():
    """On the CPU: the sliding kernels' tile, and plans that go query by query."""
    if torch.get_default_device().type != "cpu":
        return
    q, k, v = inputs((9, 20), torch.float32)
    assert [q_tile == kv_tile for q_tile, kv_tile in natten.get_configs_for_flex_fna(q, k, v)] == [True, True]
    assert natten.get_configs_for_cutlass_fna(q, k, v) == []
