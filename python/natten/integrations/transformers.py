# SPDX-License-Identifier: MIT
"""Hugging Face transformers: DiNAT, and OneFormer with a DiNAT backbone.

Releases from the middle of 2025 on bring queries, keys and values into an order of axes that no release of the
original takes: [batch, x, y, heads, head_dim]. `patch` tries the layer with a small input and, only where its answer is
not that of the operator, puts a forward pass of ours in its place; parameters and checkpoints stay as they are.
"""

import torch

_MARK = "_natten_forward_of_transformers"


def patch() -> bool:
    """Repairs what needs repair in the installed transformers; whether anything did. Calling it again does nothing."""
    from transformers.models.dinat import modeling_dinat

    from ..functional import natten2dav, natten2dqkrpb

    # NOTE: transformers looks for an installed distribution, and else keeps functions that raise.
    modeling_dinat.natten2dqkrpb, modeling_dinat.natten2dav = natten2dqkrpb, natten2dav
    modeling_dinat.requires_backends = _without_natten(modeling_dinat.requires_backends)
    layer = modeling_dinat.NeighborhoodAttention
    if hasattr(layer, _MARK) or _is_right(layer, modeling_dinat.DinatConfig):
        return False
    setattr(layer, _MARK, layer.forward)
    layer.forward = _forward
    return True


def unpatch() -> None:
    """Undoes `patch`."""
    from transformers.models.dinat import modeling_dinat

    layer = modeling_dinat.NeighborhoodAttention
    if hasattr(layer, _MARK):
        layer.forward = getattr(layer, _MARK)
        delattr(layer, _MARK)


def _without_natten(requires_backends):
    if getattr(requires_backends, "knows_natten", False):
        return requires_backends

    def check(obj, backends):
        names = [backends] if isinstance(backends, str) else backends
        rest = [name for name in names if name != "natten"]
        if rest:
            requires_backends(obj, rest)

    check.knows_natten = True
    return check


@torch.no_grad()
def _is_right(layer, config) -> bool:
    """Whether the layer computes the operator, on a plane whose sizes differ from each other and from the heads."""
    module = layer(config(), 12, 3, 3, 1).eval().to(torch.float64)
    x = torch.linspace(-1, 1, 5 * 7 * 12, dtype=torch.float64).sin().reshape(1, 5, 7, 12)
    for i, p in enumerate(module.parameters()):
        p.copy_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).mul(3 + i).cos().reshape(p.shape))
    try:
        found = module(x)[0]
    except (ValueError, RuntimeError, TypeError):
        return False
    expected = _forward(module, x)[0]
    return found.shape == expected.shape and torch.allclose(found, expected)


def _forward(self, hidden_states, output_attentions=False):
    """The layer's forward pass: [batch, y, x, channels] -> the same and, on request, the weights."""
    from ..functional import na2d_av, na2d_qk

    heads, head_dim = self.num_attention_heads, self.attention_head_size
    q, k, v = (
        project(hidden_states).unflatten(-1, (heads, head_dim)).movedim(-2, 1)
        for project in (self.query, self.key, self.value)
    )
    logits = na2d_qk(q * head_dim**-0.5, k, self.kernel_size, self.dilation, rpb=self.rpb)
    weights = self.dropout(logits.softmax(-1))
    out = na2d_av(weights, v, self.kernel_size, self.dilation).movedim(1, -2).flatten(-2)
    return (out, weights) if output_attentions else (out,)
