# SPDX-License-Identifier: MIT
"""Our ops under torch.jit.trace, which cannot record lists of booleans: one Python call stands in the graph for an op.

Such a graph runs in the process that traced it, forward alone. It exists for counters that read graphs, such as fvcore
(natten.flops.add_natten_handle).
"""

import torch


class NattenOp(torch.autograd.Function):
    """`apply(op, *arguments of op)`."""

    @staticmethod
    def forward(ctx, op, *arguments):
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # what happens inside is not recorded a second time
        try:
            return op(*arguments)
        finally:
            torch._C._set_tracing_state(state)


def call(op, *arguments):
    """`op(*arguments)`, also while a graph is traced, where sizes are tensors."""
    with torch.no_grad():  # NOTE: what requires a gradient cannot leave an op of which nothing was recorded
        return NattenOp.apply(op, *(_plain(x) for x in arguments))


def _plain(x):
    return [int(y) if isinstance(y, torch.Tensor) else y for y in x] if isinstance(x, list | tuple) else x
