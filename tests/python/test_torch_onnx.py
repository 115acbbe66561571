# SPDX-License-Identifier: MIT
"""torch.onnx.export(dynamo=True): modules and functions become standard ONNX; onnxruntime gives the same numbers."""

import numpy as np
import onnxruntime
import pytest
import torch

import natten


def exported(module, inputs, tmp_path, **options):
    path = tmp_path / "model.onnx"
    torch.onnx.export(module.eval(), inputs, path, dynamo=True, verbose=False, **options)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session, *inputs):
    names = [x.name for x in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})


MODULES = [
    natten.NeighborhoodAttention1D(8, 2, 5, dilation=2, is_causal=True),
    natten.NeighborhoodAttention2D(8, 2, (3, 4), stride=(1, 2), rel_pos_bias=True),
    natten.NeighborhoodAttention3D(8, 2, (3, 2, 9), rel_pos_bias=True),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_modules(module, tmp_path):
    x = torch.randn(2, *(11, 9, 4)[-module.rank :], 8)
    session = exported(module, (x,), tmp_path, dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (2, 5):
        x = torch.randn(batch, *x.shape[1:])
        np.testing.assert_allclose(run(session, x)[0], module(x).detach().numpy(), rtol=0, atol=1e-5)


class Everything(torch.nn.Module):
    def forward(self, q, k, v, extra_k, extra_v):
        return natten.na2d(
            q, k, v, 3, dilation=(1, 2), additional_keys=extra_k, additional_values=extra_v, return_lse=True
        )


def test_a_function_with_all_its_tensors(tmp_path):
    inputs = [torch.randn(1, 6, 7, 4, 8), *torch.randn(2, 1, 6, 7, 2, 8), *torch.randn(2, 1, 3, 2, 8)]
    session = exported(Everything(), tuple(inputs), tmp_path)
    for got, expected in zip(run(session, *inputs), Everything()(*inputs)):
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-5)


def test_a_dynamic_grid_is_refused(tmp_path):
    """The exporter tries other ways when it meets our refusal, and ends at an op that ONNX does not have."""
    x, height = torch.randn(1, 6, 7, 8), torch.export.Dim("height", min=3, max=50)
    with pytest.raises(Exception, match="only the batch may be dynamic|na_fwd"):
        exported(MODULES[1], (x,), tmp_path, dynamic_shapes=({1: height},))
