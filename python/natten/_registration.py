# SPDX-License-Identifier: MIT
"""How a C++ op becomes differentiable and transformable. Knows nothing of attention; one function, `register`.

The rules stand in public torch.autograd.Functions (setup_context, backward, jvp, vmap), and the *op* calls one of them
from two dispatch keys, so Dynamo, export and make_fx see one opaque op and never a Function:

    functorch transform active   FuncTorchDynamicLayerFrontMode -> Function.apply -> functorch's documented path
    otherwise                    Autograd                       -> Function.apply -> backward and forward mode
    nothing to differentiate     Autograd                       -> straight to the C++ kernel

The package's own functions take a third way in eager mode: to the same Function or kernel, past the dispatcher.

A Function's forward calls the op again with autograd switched off, so that modes and fake tensors below see it.
"""

import torch
from torch.autograd import forward_ad

from . import _tracing

# NOTE: private; torch.library itself stands on it since 2.4.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def register(library: torch.library.Library, op, rules: type, traced=None):
    """Gives `op` the rules of the class `rules`: static methods as those of torch.autograd.Function.

    Returns a function that does what the op does, and in eager mode spares the dispatcher's way through Python: half
    of a call that records. `traced` is what torch.compile and torch.export see in its place; None is the op.
    """

    def below(*args):
        with _below_autograd():
            return op(*args)

    def recording_forward(ctx, *args):
        outputs = below(*args)
        rules.setup_context(ctx, args, outputs)
        return outputs

    # NOTE: torch.func wants setup_context apart from forward; such a Function reads the signature of its forward at
    # each call, which takes 20 us, so the one that records has them in one.
    name = op.name().split("::")[1].split(".")[0]
    common = {"backward": staticmethod(rules.backward), "jvp": staticmethod(rules.jvp)}
    recording = type(name, (torch.autograd.Function,), {"forward": staticmethod(recording_forward), **common})
    for_func = {"setup_context": staticmethod(rules.setup_context), "vmap": staticmethod(rules.vmap)}
    transformable = type(name, (torch.autograd.Function,), {"forward": staticmethod(below), **for_func, **common})

    def autograd(*args):
        return recording.apply(*args) if _differentiates(args) else below(*args)

    def call(*args):
        if torch.compiler.is_compiling():
            return (traced or op)(*args)
        if torch._C._get_tracing_state() is not None:  # NOTE: torch.jit.is_tracing() asks the same, in 0.1 us more
            return _tracing.call(op, *args)
        if torch.is_inference_mode_enabled() or _is_transformed():
            return op(*args)
        return autograd(*args)

    library.impl(name, autograd, "Autograd")
    library.impl(name, transformable.apply, "FuncTorchDynamicLayerFrontMode")
    return call


# NOTE: private, and what torch.autograd.Function itself asks; a torch without the name goes through the dispatcher.
_is_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _differentiates(args) -> bool:
    # NOTE: private, but only a short cut: a torch without the name takes the recording path.
    if getattr(forward_ad, "_current_level", 0) >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)


def save(ctx, tensors, options) -> None:
    """What a rule's `setup_context` keeps, for backward and for tangents."""
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def add(x, y):
    """Their sum, where None is zero."""
    return x if y is None else y if x is None else x + y


def present(gradients, inputs) -> tuple:
    """An op gives an empty tensor for an absent input, torch wants None."""
    return tuple(None if x is None else g for x, g in zip(inputs, gradients, strict=True))
