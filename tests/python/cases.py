# SPDX-License-Identifier: MIT
"""One problem as a value: its inputs, its answer by the package and by the dense reference, and the comparison of both.

`check` is what most tests call. The tolerance table stands here and nowhere else.
"""

import dataclasses
import itertools

import dense
import torch

import natten

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = FLOATS + HALVES
INPUTS = ("q", "k", "v", "bias", "extra_k", "extra_v")

# Max error over max |reference|. The half types follow FlashAttention's rule instead: at most twice the error of the
# dense computation in the same type, beside the rounding of the result itself.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Inputs have variance one. These are sums of differences P * (dP - delta), which may cancel to nothing (at window 1
# they do), and are then measured against what has cancelled.
DIFFERENCES = ("dq", "dk", "dbias", "dextra_k")

FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


def per_axis(value, rank):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


@dataclasses.dataclass(frozen=True)
class Case:
    grid: tuple
    window: object
    stride: object = 1
    dilation: object = 1
    causal: object = False
    batch: int = 1
    heads: int = 1
    heads_kv: int = 0  # 0: as many as heads
    head_dim: int = 4
    head_dim_v: int = 0  # 0: as head_dim
    extra: int = 0
    bias: bool = False
    scale: object = None

    @property
    def rank(self):
        return len(self.grid)

    @property
    def parameters(self):
        """Window, stride, dilation and causal, one entry per axis each."""
        return [per_axis(value, self.rank) for value in (self.window, self.stride, self.dilation, self.causal)]

    @property
    def scale_value(self):
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def shapes(self):
        heads_kv, dim_v = self.heads_kv or self.heads, self.head_dim_v or self.head_dim
        shapes = {
            "q": (self.batch, *self.grid, self.heads, self.head_dim),
            "k": (self.batch, *self.grid, heads_kv, self.head_dim),
            "v": (self.batch, *self.grid, heads_kv, dim_v),
        }
        if self.bias:
            shapes["bias"] = (self.heads, *(2 * window - 1 for window in self.parameters[0]))
        if self.extra:
            shapes["extra_k"] = (self.batch, self.extra, heads_kv, self.head_dim)
            shapes["extra_v"] = (self.batch, self.extra, heads_kv, dim_v)
        shapes["dout"] = (self.batch, *self.grid, self.heads, dim_v)
        shapes["dlse"] = (self.batch, *self.grid, self.heads)
        return shapes

    def __str__(self):
        fields = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return ",".join(fields).replace(" ", "")


def make_inputs(case, dtype, seed=0):
    """Normal numbers that `dtype` holds exactly, as a dict of tensors without gradient, dout and dlse among them."""
    generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers on every device
    inputs = {}
    for name, shape in case.shapes().items():
        kept = torch.float32 if name == "dlse" and dtype in HALVES else dtype
        numbers = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
        inputs[name] = numbers.to(torch.get_default_device(), kept)
    return inputs


def call(case, tensors, plan=None, **kwargs):
    """The package's function for the rank of the case."""
    _, stride, dilation, causal = case.parameters
    return FUNCTIONS[case.rank](
        tensors["q"],
        tensors["k"],
        tensors["v"],
        case.parameters[0],
        stride=stride,
        dilation=dilation,
        is_causal=causal,
        scale=case.scale,
        rpb=tensors.get("bias"),
        additional_keys=tensors.get("extra_k"),
        additional_values=tensors.get("extra_v"),
        plan=engine(plan),
        **kwargs,
    )


def call_dense(case, tensors):
    return dense.attention(
        *(tensors[name] for name in "qkv"),
        *case.parameters,
        case.scale_value,
        **{name: tensors.get(name) for name in ("bias", "extra_k", "extra_v")},
    )


def results_of(function, inputs, dtype=None, lse_gradient=True):
    """out, lse and all gradients of `function(tensors) -> (out, lse)`, as a dict; computed in `dtype` if given."""
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in inputs.items()}
    leaves = {name: tensors[name].detach().requires_grad_() for name in INPUTS if name in tensors}
    out, lse = function({**tensors, **leaves})
    if lse_gradient:
        outputs, gradients = [out, lse], [tensors["dout"], tensors["dlse"].to(lse.dtype)]
    else:
        outputs, gradients = [out], [tensors["dout"]]
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return {"out": out.detach(), "lse": lse.detach(), **{"d" + name: g for name, g in zip(leaves, found)}}


def results(case, inputs, plan=None, lse_gradient=True, **kwargs):
    return results_of(lambda t: call(case, t, plan, return_lse=True, **kwargs), inputs, lse_gradient=lse_gradient)


def expected(case, inputs, lse_gradient=True):
    return expected_of(lambda t: call_dense(case, t), inputs, lse_gradient)


def expected_of(function, inputs, lse_gradient=True):
    """The exact results of a dense function and, for half types (else None), what it gives in that type."""
    exact = results_of(function, inputs, torch.float64, lse_gradient)
    dtype = inputs["q"].dtype
    return exact, results_of(function, inputs, dtype, lse_gradient) if dtype in HALVES else None


def scale_of(name, exact):
    """The largest number of a reference, or what that would be in a problem without degenerate windows."""
    smallest = 1.0 if name in DIFFERENCES else 0.1
    if name == "dbias":  # sums over all queries
        smallest = max(exact["lse"][..., 0].numel(), 1) ** 0.5
    return max(float(exact[name].abs().max()), smallest)


def errors_of(results, exact):
    """Largest error of each result, relative to the largest number of its reference."""
    return {
        name: float((results[name].double() - reference).abs().max()) / scale_of(name, exact)
        if reference.numel()
        else 0.0
        for name, reference in exact.items()
    }


def allowed_errors(exact, same, dtype):
    if same is None:
        return dict.fromkeys(exact, TOLERANCE[dtype])
    errors = errors_of(same, exact)
    # A bias table of five entries is no sample of the dense computation's error: all gradients together are.
    of_gradients = max((error for name, error in errors.items() if name.startswith("d")), default=0.0)
    rounding = torch.finfo(dtype).eps / 2
    return {name: 2 * (of_gradients if name.startswith("d") else errors[name]) + rounding for name in exact}


def compare(got, exact, same, dtype, what="", largest_logit=0.0):
    """Every result within the tolerance of `dtype`.

    A logit of 1e4 is itself rounded, as lse is, which is an error of all weights exp(logit - lse) that no engine can
    avoid: where logits are extreme, `largest_logit` says by how much.
    """
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        kept = torch.float32 if name == "lse" and dtype in HALVES else dtype
        assert tensor.dtype == kept, f"{name} is {tensor.dtype} ({what})"
        assert tensor.shape == exact[name].shape, f"{name} is {tuple(tensor.shape)} ({what})"
    allowed = allowed_errors(exact, same, dtype)
    logit_rounding = 2 * largest_logit * torch.finfo(got["lse"].dtype).eps
    for name, error in errors_of(got, exact).items():
        limit = allowed[name] + (0 if name == "lse" else logit_rounding)
        assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g} ({what}, {dtype})"  # NaN fails too


def engine(plan):
    """What a plan of the CPU is called on the default device; "cpu" stands for the best engine."""
    if plan is None or torch.get_default_device().type == "cpu":
        return plan
    return {"reference": "cuda-reference", "cpu": None}.get(plan, plan)


def composed_nondeterminism():
    """Second derivatives are composed of torch's functions, some of which add up by atomics on a GPU."""
    return 0.0 if torch.get_default_device().type == "cpu" else 1e-12


def plans_of(case, dtype):
    """Engines that can run the case forward and backward, each forced by the first two parts of its plan's name; not
    those in TF32, whose results are not as exact as the dtype (test_cuda.py)."""
    inputs = {name: torch.empty(shape, dtype=dtype) for name, shape in case.shapes().items()}
    families = []
    for backward in (False, True):
        window, stride, dilation, causal = case.parameters
        plans = natten.list_plans(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            window,
            stride=stride,
            dilation=dilation,
            is_causal=causal,
            rpb=inputs.get("bias"),
            additional_keys=inputs.get("extra_k"),
            backward=backward,
        )
        names = dict.fromkeys("/".join(plan.split("/")[:2]) for plan in plans)
        families.append([name for name in names if not name.endswith("-tf32")])
    assert engine("reference") in families[0] and engine("reference") in families[1]
    return [family for family in families[0] if family in families[1]]


def check(case, dtypes=DTYPES, plans=None, seed=0, lse_gradient=True):
    """Forward and backward of a case against the dense reference, for all dtypes and all plans that it has."""
    for dtype in dtypes:
        inputs = make_inputs(case, dtype, seed)
        exact, same = expected(case, inputs, lse_gradient)
        for plan in plans if plans is not None else plans_of(case, dtype):
            got = results(case, inputs, plan, lse_gradient)
            compare(got, exact, same, dtype, f"{case} plan={plan}")


def product(**choices):
    """All combinations of keyword choices, as dicts."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
