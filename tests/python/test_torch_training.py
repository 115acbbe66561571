# SPDX-License-Identifier: MIT
"""What training code does around the op: checkpoints that keep some results, hooks, parametrized weights, saved
modules, counters. (Plain checkpoints and determinism: test_determinism.py; autocast: test_autocast.py.)"""

import copy
import functools
import io
import pickle

import cases
import dense
import pytest
import torch
from cases import Case
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import natten
import natten.flops

CASE = Case((6, 9), (3, 4), causal=(True, False), heads=2, bias=True, extra=3)
FWD, BWD = torch.ops.natten.na_fwd.default, torch.ops.natten.na_bwd.default
MODULES = [natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D, natten.NeighborhoodAttention3D]
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append(op)
        return op(*args, **(kwargs or {}))


def module_and_input(rank, **options):
    module = MODULES[rank - 1](8, 2, 3, rel_pos_bias=True, **options)
    torch.nn.init.normal_(module.rpb)
    return module, torch.randn(2, *(5, 4, 6)[-rank:], 8)


@pytest.mark.parametrize("kept", [True, False])
def test_selective_checkpoint(kept):
    """Where the op's results are kept, it runs once; where not, twice; with the same gradients."""
    inputs = cases.make_inputs(CASE, torch.float32)
    keep = functools.partial(create_selective_checkpoint_contexts, [FWD] if kept else [])

    def function(tensors):
        names = [name for name in cases.INPUTS if name in tensors]

        def inner(*leaves):
            return cases.call(CASE, dict(zip(names, leaves)), return_lse=True)

        return checkpoint(inner, *(tensors[name] for name in names), use_reentrant=False, context_fn=keep)

    with CountOps() as count:
        got = cases.results_of(function, inputs)
    assert count.calls.count(FWD) == (1 if kept else 2) and count.calls.count(BWD) == 1
    for name, tensor in cases.results(CASE, inputs).items():
        assert torch.equal(got[name], tensor), name


def test_hooks():
    """On a tensor, on its accumulated gradient, on a module, on the node of the graph."""
    module, x = module_and_input(2)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    module.register_full_backward_hook(lambda m, dx, dout: seen.append("module"))
    module.rpb.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x.requires_grad_()
    out = module(x)
    q, k, v = (torch.randn(1, 5, 6, 2, 4, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(natten.na2d(q, k, v, 3).sum(), (q, k, v))
    direct = natten.na2d(q, k, v, 3)
    direct.grad_fn.register_hook(lambda dx, dout: seen.append("node"))
    k.register_hook(lambda gradient: 2 * gradient)
    (out.sum() + direct.sum()).backward()
    assert sorted(seen) == sorted(["before", "after", "module", "accumulated", "node"])
    assert torch.equal(q.grad, expected[0]) and torch.equal(k.grad, 2 * expected[1])


@RANKS
def test_weight_norm(rank):
    """The layer that holds the weight computes it anew: results and gradients follow."""
    module, x = module_and_input(rank)
    normed = copy.deepcopy(module)
    parametrizations.weight_norm(normed.qkv)
    parametrizations.weight_norm(normed.proj)
    torch.testing.assert_close(normed(x), module(x))
    normed(x).square().sum().backward()
    parameters = dict(normed.named_parameters())
    assert "qkv.parametrizations.weight.original0" in parameters
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())


def test_a_parametrized_bias():
    """A bias made symmetric by a parametrization, as translation-invariant models want it."""

    class Symmetric(torch.nn.Module):
        def forward(self, table):
            return (table + table.flip(-1)) / 2

    module, x = module_and_input(1)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        expected.rpb.copy_(Symmetric()(module.rpb))
    parametrize.register_parametrization(module, "rpb", Symmetric())
    torch.testing.assert_close(module(x), expected(x))
    module(x).square().sum().backward()
    gradient = module.parametrizations.rpb.original.grad
    assert torch.equal(gradient, gradient.flip(-1)) and gradient.abs().sum() > 0


@RANKS
def test_modules_survive_copies(rank):
    module, x = module_and_input(rank, is_causal=True, proj_drop=0.0)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), module(x))
        other(x).sum().backward()
        assert other.rpb.grad is not None and module.rpb.grad is None


# The modules of each era, by the arguments that its clients used; all hold the same parameters.
ERAS = {
    "0.11 to 0.14": {"dim": 8, "num_heads": 2, "kernel_size": 3, "dilation": 1, "bias": True},
    "0.15 to 0.17": {"dim": 8, "num_heads": 2, "kernel_size": 3, "dilation": 1, "rel_pos_bias": True},
    "0.20 on": {"embed_dim": 8, "num_heads": 2, "kernel_size": 3, "dilation": 1, "stride": 1},
}


@RANKS
def test_state_dicts_of_every_era(rank):
    """What one era saved, every other loads. A bias that the module does not have comes with the checkpoint; one that
    the checkpoint does not have is missing."""
    modules = {era: MODULES[rank - 1](**arguments) for era, arguments in ERAS.items()}
    x = torch.randn(1, *(5, 4, 6)[-rank:], 8)
    for module in modules.values():
        for p in module.parameters():
            torch.nn.init.normal_(p)
    for era, module in modules.items():
        for other_era, source in modules.items():
            state = source.state_dict()
            assert set(state) - {"rpb"} == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
            target = copy.deepcopy(module)
            lacks_bias = module.rpb is not None and source.rpb is None
            report = target.load_state_dict(state, strict=not lacks_bias)
            assert set(report.missing_keys) == ({"rpb"} if lacks_bias else set()), (era, other_era)
            assert lacks_bias or torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    "case",
    [
        Case((19,), 5, dilation=2, heads=2, extra=3),
        Case((6, 9), (3, 4), causal=(True, False), heads=2, head_dim=8, head_dim_v=4, bias=True),
        Case((6, 9), (3, 4), stride=(2, 3), heads=4, heads_kv=2, extra=2),
        Case((3, 4, 6), (2, 9, 3), heads=2),
    ],
    ids=str,
)
def test_flops_are_exact(case):
    """Pairs counted from the dense reference: its probabilities that are not zero."""
    inputs = cases.make_inputs(case, torch.float64)
    leaves = {name: inputs[name].requires_grad_() for name in cases.INPUTS if name in inputs}
    with FlopCounterMode(display=False) as counter:
        out, lse = cases.call(case, leaves, return_lse=True)
    mask = dense.window_mask(case.grid, *case.parameters)
    pairs = case.batch * case.heads * (int(mask.sum()) + mask.shape[0] * case.extra)
    dim, dim_v = case.head_dim, case.head_dim_v or case.head_dim
    assert counter.get_total_flops() == 2 * pairs * (dim + dim_v)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad([out, lse], list(leaves.values()), [inputs["dout"], inputs["dlse"]])
    assert counter.get_total_flops() == 2 * pairs * (3 * dim + 2 * dim_v)
