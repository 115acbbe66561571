# SPDX-License-Identifier: MIT
"""Hugging Face DiNAT of the installed transformers, with random weights, after natten.integrations.transformers."""

import math

import dense_unfused
import pytest
import torch
from transformers import DinatBackbone, DinatConfig, DinatForImageClassification
from transformers.models.dinat import modeling_dinat

from natten.integrations import transformers as integration


@pytest.fixture(autouse=True)
def _patched():
    integration.patch()
    yield
    integration.unpatch()


def config(**options):
    sizes = {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 4, 8], "kernel_size": 3, "num_labels": 5}
    return DinatConfig(**sizes, dilations=[[1, 4], [2], [1], [1]], layer_scale_init_value=0.1, **options)


def exact_layer(layer, x):
    """One attention layer in fp64, from its parameters; heads are taken apart as the architecture has it."""
    heads, head_dim = layer.num_attention_heads, layer.attention_head_size
    projected = []
    for linear in (layer.query, layer.key, layer.value):
        y = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        projected.append(y.unflatten(-1, (heads, head_dim)).movedim(-2, 1))
    q, k, v = projected
    bias = layer.rpb.double()
    _, out = dense_unfused.attention(q / math.sqrt(head_dim), k, v, layer.kernel_size, layer.dilation, False, bias)
    return out.movedim(1, -2).flatten(-2)


def randomized(model):
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def test_classification():
    """The whole model, each of its attention layers compared; the second dilation needs the layer's own padding."""
    model = randomized(DinatForImageClassification(config()))
    calls = []

    def compare(layer, inputs, output):
        exact = exact_layer(layer, inputs[0])
        torch.testing.assert_close(output[0].double(), exact, rtol=1e-4, atol=1e-5)
        calls.append(layer)

    for module in model.modules():
        if isinstance(module, modeling_dinat.NeighborhoodAttention):
            module.register_forward_hook(compare)
    with torch.no_grad():
        result = model(torch.randn(2, 3, 40, 64), output_attentions=True)
    assert len(calls) == 5 and result.logits.shape == (2, 5) and result.logits.isfinite().all()
    assert result.attentions[0].shape == (2, 1, 12, 16, 9)  # padded from 10 rows to kernel_size * dilation
    for weights in result.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_training():
    model = randomized(DinatForImageClassification(config(attention_probs_dropout_prob=0.1))).train()
    result = model(torch.randn(2, 3, 64, 64), labels=torch.tensor([1, 3]))
    result.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_backbone():
    """What OneFormer uses."""
    backbone = DinatBackbone(config(out_features=["stage1", "stage4"])).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 16, 16, 24), (1, 128, 2, 3)]


def test_a_right_layer_is_left_alone():
    """A release without the fault: `patch` finds nothing to repair."""
    integration.unpatch()
    layer = modeling_dinat.NeighborhoodAttention
    kept = layer.forward

    def forward(self, hidden_states, output_attentions=False):
        heads, head_dim = self.num_attention_heads, self.attention_head_size
        shape = (*hidden_states.shape[:-1], heads, head_dim)
        q, k, v = (
            project(hidden_states).view(shape).permute(0, 3, 1, 2, 4) for project in (self.query, self.key, self.value)
        )
        attn = modeling_dinat.natten2dqkrpb(q / math.sqrt(head_dim), k, self.rpb, self.kernel_size, self.dilation)
        out = modeling_dinat.natten2dav(attn.softmax(-1), v, self.kernel_size, self.dilation)
        return (out.permute(0, 2, 3, 1, 4).flatten(-2),)

    try:
        layer.forward = forward
        assert integration.patch() is False and layer.forward is forward
    finally:
        layer.forward = kept
    assert integration.patch() is True and integration.patch() is False
