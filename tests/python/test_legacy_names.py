# SPDX-License-Identifier: MIT
"""Every name of older releases is called and compared; and where one name had two meanings, the rule holds."""

import importlib
import itertools
import pickle
import subprocess
import sys
import types

import dense_unfused
import legacy_names
import legacy_probes  # noqa: F401
import legacy_probes_of_helpers  # noqa: F401
import legacy_probes_of_switches  # noqa: F401
import pytest
import torch

import natten
from natten import functional

NAMES = list(legacy_names.era_of())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_name(name):
    legacy_names.PROBES[name](name, legacy_names.resolve(name))


def test_every_probe_is_required():
    assert set(legacy_names.PROBES) == set(NAMES)


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_loads_nothing_old():
    loaded = in_a_new_process("import sys, natten; print([m for m in sys.modules if m.startswith('natten')])")
    for name in ("legacy", "compat", "nested", "backends", "utils", "flops", "fvcore", "transformers", "varlen_"):
        assert f"natten.{name}" not in loaded


def test_unknown_names_are_refused():
    for module in (natten, functional, natten.context):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing
    with pytest.raises(ImportError):
        importlib.import_module("natten.nothing")


# --- one name, two meanings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("statement", ["import natten.na{0}d", "from natten.na{0}d import NeighborhoodAttention{0}D"])
def test_functions_survive_the_import_of_modules_of_their_name(rank, statement):
    grid = "5, " * rank
    in_a_new_process(
        f"import natten, torch\nfunction = natten.na{rank}d\n{statement.format(rank)}\n"
        f"q = torch.ones(1, {grid}2, 8)\n"
        f"assert natten.na{rank}d is function and natten.na{rank}d(q, q, q, 3).shape == q.shape\n"
        f"from natten import na{rank}d\nassert na{rank}d is function\n"
        f"import natten.na{rank}d as module\nassert issubclass(module.NeighborhoodAttention{rank}D, "
        f"natten.NeighborhoodAttention{rank}D)"
    )


def old_pickle(layer, module, state):
    """A layer as the original pickled it: its class by an old path, and only what it kept."""
    stand_in = types.ModuleType(module)
    cls = type(type(layer).__name__, (), {"__module__": module})
    setattr(stand_in, cls.__name__, cls)
    old = cls()
    old.__dict__ = state
    kept, sys.modules[module] = sys.modules.get(module), stand_in
    try:
        return pickle.dumps(old)
    finally:
        sys.modules.pop(module) if kept is None else sys.modules.update({module: kept})


@pytest.mark.parametrize("module", ["natten.na2d", "natten.natten2d", "natten.nattencuda2d"])
def test_pickled_layers_of_old_modules(module):
    layer = natten.NeighborhoodAttention2D(16, 2, 3, dilation=2, rel_pos_bias=module != "natten.na2d").eval()
    state = dict(layer.__dict__)
    if module == "natten.na2d":
        state |= {"kernel_size": (3, 3), "dilation": (2, 2), "is_causal": (False, False)}
    else:
        state |= {"kernel_size": 3, "dilation": 2, "window_size": 6}
        del state["is_causal"]
    for name in ("embed_dim", "oversize", "_default_oversize", "stride"):
        del state[name]
    again = pickle.loads(old_pickle(layer, module, state))
    x = torch.randn(1, 8, 9, 16)
    assert torch.equal(again(x), layer(x))
    short = torch.randn(1, 4, 9, 16)
    assert again(short).shape == short.shape and torch.equal(again(short), layer(short)) == (module == "natten.na2d")


SIZES_015 = (2, 3, 2, 1)  # kernel_size_d, kernel_size, dilation_d, dilation


def test_na3d_qk_and_av_in_both_orders():
    q, k, v = (torch.randn(1, 2, 4, 5, 6, 8, dtype=torch.float64) for _ in range(3))
    extra = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    logits, out = dense_unfused.attention(q, k, v, (2, 3, 3), (2, 1, 1))
    attn = logits.softmax(-1)
    for found in (
        functional.na3d_qk(q, k, *SIZES_015),
        functional.na3d_qk(q, k, kernel_size_d=2, kernel_size=3, dilation_d=2, dilation=1),
        functional.na3d_qk(q, k, (2, 3, 3), (2, 1, 1)),
        functional.na3d_qk(q, k, (2, 3, 3), (2, 1, 1), None, False),
    ):
        torch.testing.assert_close(found, logits)
    for found in (
        functional.na3d_av(attn, v, *SIZES_015),
        functional.na3d_av(attn, v, kernel_size_d=2, kernel_size=3, dilation_d=2, dilation=1),
        functional.na3d_av(attn, v, (2, 3, 3), (2, 1, 1)),
        functional.na3d_av(attn, v, (2, 3, 3), (2, 1, 1), None, False),
    ):
        torch.testing.assert_close(found, out)
    joint = functional.na3d_qk(q, k, (2, 3, 3), (2, 1, 1), extra, False)  # 0.17: additional keys in the fifth place
    assert joint.shape[-1] == 18 + 3
    torch.testing.assert_close(joint[..., :18], logits)
    for sizes in ((2, 3, 2), (2, 3, 2, True), ((2, 3, 3), 1, 2, 1)):
        with pytest.raises(TypeError, match="0.15"):
            functional.na3d_qk(q, k, *sizes)


@pytest.mark.parametrize("rank", [1, 2])
def test_arguments_of_three_four_and_five_in_every_pairing(rank):
    grid = (14, 15)[:rank]
    q, k, v = (torch.randn(1, 2, *grid, 8, dtype=torch.float64) for _ in range(3))
    rpb = torch.randn(2, *[9] * rank, dtype=torch.float64)
    logits, out = dense_unfused.attention(q, k, v, 5, 2, False, rpb)
    qkrpb, av = getattr(functional, f"natten{rank}dqkrpb"), getattr(functional, f"natten{rank}dav")
    for first, second in itertools.product(((2,), (5, 2)), repeat=2):
        attn = qkrpb(q, k, rpb, *first)
        torch.testing.assert_close(attn, logits)
        torch.testing.assert_close(av(attn.softmax(-1), v, *second), out)
    with pytest.raises(TypeError, match="rpb"):
        qkrpb(q, k, None, 2)  # the form of 0.14.4 has no window without a table
    torch.testing.assert_close(qkrpb(q, k, None, 5, 2), getattr(functional, f"natten{rank}dqk")(q, k, 5, 2))
    for call in (
        lambda: qkrpb(q, k, rpb, 5, 2, 1),
        lambda: av(v, v, 5, 2, 1),
        lambda: av(v, v, 5, dilation=2, kernel_size=5),
    ):
        with pytest.raises(TypeError):
            call()
    if rank == 2:
        with pytest.raises(ValueError, match="give kernel_size"):
            av(torch.rand(1, 2, *grid, 15, dtype=torch.float64), v, 2)


def test_a_fifth_positional_argument_is_refused():
    q = torch.randn(1, 8, 8, 2, 8)
    with pytest.raises(TypeError, match="dilation up to natten 0.17 and stride from 0.20"):
        natten.na2d(q, q, q, 3, 2)


def test_positional_orders_of_layers():
    """The module that a layer is imported from says whose order holds; the package's own is that of 0.20."""
    from natten.na2d import NeighborhoodAttention2D as Of017
    from natten.natten2d import NeighborhoodAttention2D as Of0146
    from natten.nattencuda2d import NeighborhoodAttention2D as Of013

    window_first = Of013(30, 5, 3, False)  # dim, kernel_size, num_heads, qkv_bias
    assert window_first.num_heads == 3 and window_first.kernel_size == (5, 5) and window_first.qkv.bias is None
    for layer, stride, dilation in ((Of0146(30, 3, 5, 2), 1, 2), (Of017(30, 3, 5, 2), 1, 2)):
        assert layer.num_heads == 3 and layer.kernel_size == (5, 5)
        assert layer.dilation == (dilation,) * 2 and layer.stride == (stride,) * 2
    now = natten.NeighborhoodAttention2D(30, 3, 5, 2)
    assert now.stride == (2, 2) and now.dilation == (1, 1)
    with pytest.raises(TypeError, match="stride"):
        natten.NeighborhoodAttention2D(30, 5, 3, True)  # a bool in the fourth place: qkv_bias of 0.14.4


def test_check_all_args_of_two_eras():
    assert natten.utils.check_all_args(2, 3, 2, True) == ((3, 3), (2, 2), (True, True))
    assert natten.utils.checks.check_all_args(2, 3, 1, 2, True) == ((3, 3), (1, 1), (2, 2), (True, True))


# --- layers of old releases ------------------------------------------------------------------------------------------


def test_a_dilation_in_words():
    """0.13: "maximum" is as large as the input allows, at every call."""
    from natten.nattencuda2d import NeighborhoodAttention2D

    layer = NeighborhoodAttention2D(16, 3, 2, dilation="maximum")
    for grid, dilation in (((9, 14), 3), ((6, 7), 2), ((2, 7), 1)):
        twin = NeighborhoodAttention2D(16, 3, 2, dilation=dilation)
        twin.load_state_dict(layer.state_dict())
        x = torch.randn(1, *grid, 16)
        assert torch.equal(layer(x), twin(x))


def test_checkpoints_pass_between_all_layers():
    """One state dict for the layer of torch ops, those of every era and ours."""
    from natten.na2d import NeighborhoodAttention2D as Of017
    from natten.natten2d import NeighborhoodAttention2D as Of0146
    from natten.nattencuda2d import NeighborhoodAttention2D as Of013

    first = natten.LegacyNeighborhoodAttention2D(16, 5, 2)
    x = torch.randn(1, 7, 8, 16)
    others = Of013(16, 5, 2), Of0146(16, 2, 5), Of017(16, 2, 5, rel_pos_bias=True)
    for layer in (
        *others,
        natten.NeighborhoodAttention2D(16, 2, 5, bias=True),
        natten.NeighborhoodAttention2D(16, 2, 5),
    ):
        layer.load_state_dict(first.state_dict())
        torch.testing.assert_close(layer(x), first(x))


def test_nested_tensors_reach_the_public_operators():
    samples = [torch.randn(2, *grid, 8) for grid in ((5, 6), (7, 4))]
    q = torch.nested.nested_tensor(samples)
    attn = functional.na2d_qk(q, q, 3)
    out = functional.na2d_av(attn, q, 3)
    for sample, a, o in zip(samples, attn.unbind(), out.unbind()):
        torch.testing.assert_close(a, functional.na2d_qk(sample[None], sample[None], 3)[0])
        torch.testing.assert_close(o, functional.na2d_av(a[None], sample[None], 3)[0])
    for mixed in ((q, samples[0][None]), (samples[0][None], q)):
        with pytest.raises(ValueError, match="not nested"):
            functional.na2d_qk(*mixed, 3)
    with pytest.raises(ValueError, match="nested one"):
        functional.na2d_qk(q, q, 3, rpb=torch.nested.nested_tensor([torch.zeros(2, 5, 5)] * 2))
