# SPDX-License-Identifier: MIT
"""What each of two gloo ranks does for test_torch_distributed.py: sharded tensors against whole ones."""

import cases
import torch
import torch.distributed as dist
from cases import Case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import natten.distributed

CASES = [
    Case((9,), 3, batch=4, heads=4, head_dim=8),
    Case((5, 6), (3, 4), dilation=(1, 2), batch=2, heads=4, head_dim=4, bias=True, extra=3),
    Case((3, 4, 4), (3, 2, 3), causal=(True, False, False), batch=2, heads=8, heads_kv=2, head_dim=4, bias=True),
    Case((9,), 3, batch=3, heads=3, head_dim=8),  # pieces of unequal size
    Case((9,), 3, batch=3, heads=6, heads_kv=3, head_dim=8),  # heads that cannot be cut: redistributed, and right
]


def placements(case, name, what):
    if what == "whole":
        return Replicate()
    if what == "batch":
        return Replicate() if name == "bias" else Shard(0)
    return Shard(0 if name == "bias" else 2 if name.startswith("extra") else case.rank + 1)


def check(case, what, mesh):
    inputs = cases.make_inputs(case, torch.float64)
    expected = cases.results(case, inputs)
    leaves = {
        name: distribute_tensor(inputs[name], mesh, [placements(case, name, what)]).requires_grad_()
        for name in cases.INPUTS
        if name in inputs
    }
    out, lse = cases.call(case, leaves, return_lse=True)
    assert isinstance(out, DTensor) and isinstance(lse, DTensor)
    uncut = what == "heads" and case.heads_kv % 2 and case.heads_kv != case.heads
    assert uncut or out.placements == (placements(case, "q", what),), out.placements
    cotangents = [distribute_tensor(inputs[name], mesh, [Replicate()]) for name in ("dout", "dlse")]
    gradients = torch.autograd.grad([out, lse], list(leaves.values()), cotangents)
    got = {"out": out, "lse": lse, **{"d" + name: g for name, g in zip(leaves, gradients)}}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.full_tensor(), expected[name], rtol=0, atol=1e-12)


def check_module(mesh):
    """A module whose parameters are replicated and whose input is sharded over the batch, as in data parallelism."""
    module = natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).double()
    x = torch.randn(4, 5, 6, 8, dtype=torch.float64)
    expected = torch.autograd.grad(module(x).sin().sum(), list(module.parameters()))
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            replicated = distribute_tensor(p.detach(), mesh, [Replicate()])
            owner.register_parameter(name, torch.nn.Parameter(replicated))
    out = module(distribute_tensor(x, mesh, [Shard(0)]))
    got = torch.autograd.grad(out.sin().sum(), list(module.parameters()))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.full_tensor(), b, rtol=0, atol=1e-12)


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for case in CASES:
        for what in ("whole", "batch", "heads"):
            check(case, what, mesh)
    check_module(mesh)
    print(f"rank {dist.get_rank()}: {3 * len(CASES) + 1} checks passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
