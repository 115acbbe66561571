# SPDX-License-Identifier: MIT
"""How a C++ op becomes differentiable and transformable. Knows nothing of attention; one function, `register`.

The rules stand in one public torch.autograd.Function (setup_context, backward, jvp, vmap), and the *op* calls it from
two dispatch keys, so Dynamo, export and make_fx see one opaque op and never the Function:

    functorch transform active   FuncTorchDynamicLayerFrontMode -> Function.apply -> functorch's documented path
    otherwise                    Autograd                       -> Function.apply -> backward and forward mode
    nothing to differentiate     Autograd                       -> straight to the C++ kernel

The Function's forward calls the op again with autograd switched off, so that modes and fake tensors below see it.
"""

import torch
from torch.autograd import forward_ad

# NOTE: private; torch.library itself stands on it since 2.4.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_RULES = ("setup_context", "backward", "jvp", "vmap")


def register(library: torch.library.Library, op, rules: type) -> None:
    """Gives `op` the rules of the class `rules`: static methods as those of torch.autograd.Function."""

    def below(*args):
        with _below_autograd():
            return op(*args)

    name = op.name().split("::")[1].split(".")[0]
    members = {rule: staticmethod(getattr(rules, rule)) for rule in _RULES}
    function = type(name, (torch.autograd.Function,), {"forward": staticmethod(below), **members})

    def autograd(*args):
        return function.apply(*args) if _differentiates(args) else below(*args)

    library.impl(name, autograd, "Autograd")
    library.impl(name, function.apply, "FuncTorchDynamicLayerFrontMode")


def _differentiates(args) -> bool:
    # NOTE: private, but only a short cut: a torch without the name takes the recording path.
    if getattr(forward_ad, "_current_level", 0) >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
