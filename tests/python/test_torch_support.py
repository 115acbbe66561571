# SPDX-License-Identifier: MIT
"""What works with what: each feature of torch, tried on a function and on a module, against dense attention.

The outcome is the table in docs/torch.md; the test fails when the two differ.
    python tests/python/test_torch_support.py     writes the table anew
"""

import copy
import functools
import io
import pickle
import re
import sys
import tempfile
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import natten
import natten.flops

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"
CASE = cases.Case((4, 5), (3, 2), dilation=(1, 2), batch=2, heads=2, head_dim=2)


class FunctionSubject(torch.nn.Module):
    """natten.na2d as a module without parameters, so that exporters take it."""

    name = "`na1d`, `na2d`, `na3d`"

    def forward(self, q, k, v):
        return cases.call(CASE, {"q": q, "k": k, "v": v})

    def exactly(self, q, k, v):
        return cases.call_dense(CASE, {"q": q, "k": k, "v": v})[0]

    def inputs(self, dtype):
        return tuple(torch.randn(3, *CASE.shapes()["q"], dtype=torch.float64).to(dtype))


class ModuleSubject(torch.nn.Module):
    name = "`NeighborhoodAttention{1,2,3}D`"

    def __init__(self):
        super().__init__()
        self.attention = natten.NeighborhoodAttention2D(4, 2, CASE.window, dilation=CASE.dilation, rel_pos_bias=True)
        torch.nn.init.normal_(self.attention.rpb)

    def forward(self, x):
        return self.attention(x)

    def exactly(self, x):
        a = self.attention
        q, k, v = a.qkv(x).unflatten(-1, (3, 2, 2)).unbind(-3)
        return a.proj(cases.call_dense(CASE, {"q": q, "k": k, "v": v, "bias": a.rpb})[0].flatten(-2))

    def inputs(self, dtype):
        return (torch.randn(2, *CASE.grid, 4, dtype=torch.float64).to(dtype),)


def close(got, expected, tolerance=1e-9):
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


def loss_of(run):
    return lambda *x: run(*x).sin().sum()


def both(transform, s, x):
    """`transform(run)(*x)` gives for our function what it gives for the dense one."""
    wanted = tuple(range(len(x)))
    close(transform(s, wanted)(*x), transform(s.exactly, wanted)(*x))


def gradients(run, x):
    leaves = [y.detach().clone().requires_grad_() for y in x]
    return torch.autograd.grad(loss_of(run)(*leaves), leaves)


def dual_numbers(run, _):
    def tangent(*x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(*(forward_ad.make_dual(y, y.cos()) for y in x))).tangent

    return tangent


def double_backward(run, x):
    leaves = [y.detach().clone().requires_grad_() for y in x]
    first = torch.autograd.grad(loss_of(run)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def compiled(s, **options):
    torch.compiler.reset()
    return torch.compile(s, fullgraph=True, backend="aot_eager", **options)


def dynamic_shapes(s, x):
    run = compiled(s, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 7, 9):  # not 4: Dynamo takes sizes for the same that are equal at first
            y = [torch.randn(3, rows, *z.shape[2:], dtype=z.dtype) for z in x]
            close(gradients(run, y), gradients(s.exactly, y))


def exported(s, x, strict=False):
    """With a dynamic number of rows, and an input of another number than it was exported with."""
    shapes = ({1: torch.export.Dim("rows", min=3, max=32)},) * len(x)
    x = [torch.cat([z, z], 1) for z in x]
    program = torch.export.export(s, tuple(x), dynamic_shapes=shapes, strict=strict)
    return program, [torch.cat([z, z], 1) for z in x]


def export(s, x):
    for strict in (True, False):
        program, y = exported(s, x, strict)
        close(program.module()(*y), s.exactly(*y))


def aot_inductor(s, x):
    s = s.float()
    program, y = exported(s, [z.float() for z in x])
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        close(torch._inductor.aoti_load_package(package)(*y), s.exactly(*y), 1e-5)


def onnx(s, x):
    import onnxruntime

    s, y = s.float(), [z.float() for z in x]
    size = {0: torch.export.Dim("n", min=3, max=32)}
    y = [torch.cat([z, z, z]) for z in y]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(s.eval(), tuple(y), path, dynamo=True, verbose=False, dynamic_shapes=(size,) * len(y))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        got = session.run(None, {name: z.numpy() for name, z in zip(names, y)})[0]
    np.testing.assert_allclose(got, s.exactly(*y).detach().numpy(), rtol=0, atol=1e-5)


def checkpoints(s, x):
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.natten.na_fwd.default])
    for options in ({"use_reentrant": False}, {"use_reentrant": False, "context_fn": keep}):
        close(gradients(lambda *y, o=options: checkpoint(s, *y, **o), x), gradients(s.exactly, x))
    leaves = [y.detach().clone().requires_grad_() for y in x]
    loss_of(lambda *y: checkpoint(s, *y, use_reentrant=True))(*leaves).backward()
    close([y.grad for y in leaves], gradients(s.exactly, x))


def compiled_autograd(s, x):
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compiler.reset()
        close(torch.compile(lambda *y: gradients(s, y), backend="aot_eager")(*x), gradients(s.exactly, x))


def autocast(s, x):
    s, leaves = s.float(), [y.float().requires_grad_() for y in x]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = s(*leaves)
    assert out.dtype == torch.bfloat16
    close(out, s.exactly(*leaves), 0.1)
    scaler.scale(out.float().sum()).backward()
    assert all(y.grad.dtype == torch.float32 and y.grad.isfinite().all() for y in leaves)


def flop_counter(s, x):
    with FlopCounterMode(display=False) as counter:
        loss_of(s)(*(y.requires_grad_() for y in x)).backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.natten.na_fwd] > 0 and counts[torch.ops.natten.na_bwd] > 0


def copies(s, x):
    file = io.BytesIO()
    torch.save(s, file)
    file.seek(0)
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s)), torch.load(file, weights_only=False)):
        close(other(*x), s(*x), 0)


def weight_norm(s, x):
    needs_parameters(s)
    expected = s.exactly(*x)
    for module in s.modules():
        if isinstance(module, torch.nn.Linear):
            parametrizations.weight_norm(module)
    close(s(*x), expected)


def deterministic_mode(s, x):
    """Thrown between forward and backward."""
    leaves = [y.detach().clone().requires_grad_() for y in x]
    loss = loss_of(s)(*leaves)
    torch.use_deterministic_algorithms(True)
    try:
        close(torch.autograd.grad(loss, leaves), gradients(s, x), 0)
    finally:
        torch.use_deterministic_algorithms(False)


def hooks(s, x):
    seen = []
    handles = [
        s.register_forward_hook(lambda *_: seen.append(1)),
        s.register_full_backward_hook(lambda *_: seen.append(2)),
    ]
    leaves = [y.detach().clone().requires_grad_() for y in x]
    out = s(*leaves)
    out.grad_fn.register_hook(lambda *_: seen.append(3))
    leaves[0].register_hook(lambda g: 2 * g)
    out.sin().sum().backward()
    for handle in handles:
        handle.remove()
    assert sorted(seen) == [1, 2, 3]
    close(leaves[0].grad / 2, gradients(s.exactly, x)[0])


def partially_frozen(s, x):
    for i in range(len(x)):
        leaves = [y.detach().clone().requires_grad_(i == j) for j, y in enumerate(x)]
        for p in s.parameters():
            p.requires_grad_(False)
        close(torch.autograd.grad(loss_of(s)(*leaves), leaves[i]), gradients(s.exactly, x)[i])


class NotApplicable(Exception):
    pass


def needs_parameters(s):
    if not list(s.parameters()):
        raise NotApplicable


def parameters_transformed(s, x):
    needs_parameters(s)
    names = [name for name, _ in s.named_parameters()]
    values = [p.detach() for _, p in s.named_parameters()]

    def loss(*p):
        return functional_call(s, dict(zip(names, p)), x).sin().sum()

    expected = torch.autograd.grad(loss_of(s.exactly)(*x), list(s.parameters()))
    close(grad(loss, tuple(range(len(names))))(*values), expected)


def nested(s, x):
    pieces = [torch.nested.nested_tensor([y[0], y[0][:3]], layout=torch.jagged) for y in x]
    s(*pieces)


def double_backward_of_compiled(s, x):
    double_backward(compiled(s), x)


# Feature: (check, what a reader should know). A check raises where the feature does not work; the table quotes it.
FEATURES = {
    "backward": (lambda s, x: close(gradients(s, x), gradients(s.exactly, x)), ""),
    "double backward": (
        lambda s, x: close(double_backward(s, x), double_backward(s.exactly, x)),
        "composed of torch ops: memory for every window",
    ),
    "forward mode (`torch.autograd.forward_ad`)": (
        lambda s, x: both(dual_numbers, s, x),
        "tangents are composed of torch ops: memory for every window",
    ),
    "`torch.func.grad`": (lambda s, x: both(lambda run, n: grad(loss_of(run), n), s, x), ""),
    "`torch.func.vjp`": (lambda s, x: both(lambda run, n: lambda *y: vjp(run, *y)[1](torch.cos(run(*y))), s, x), ""),
    "`torch.func.jvp`": (lambda s, x: both(lambda run, n: lambda *y: jvp(run, y, y)[1], s, x), "as forward mode"),
    "`torch.func.vmap`": (
        lambda s, x: both(lambda run, n: lambda *y: vmap(run)(*(torch.stack([z, z.cos()]) for z in y)), s, x),
        "folds into the batch, or into the heads where there is a bias",
    ),
    "`torch.func.jacrev`": (lambda s, x: both(lambda run, n: jacrev(run, n), s, x), ""),
    "`torch.func.jacfwd`": (lambda s, x: both(lambda run, n: jacfwd(run, n), s, x), "as forward mode"),
    "`torch.func.hessian`": (lambda s, x: both(lambda run, n: hessian(loss_of(run), n), s, x), "as double backward"),
    "`vmap(grad)`": (
        lambda s, x: both(
            lambda run, n: lambda *y: vmap(grad(loss_of(run), n))(*(torch.stack([z, z.cos()]) for z in y)), s, x
        ),
        "",
    ),
    "`torch.func.functional_call`, gradients of parameters": (parameters_transformed, ""),
    "`torch.compile(fullgraph=True)`, forward and backward": (
        lambda s, x: close(gradients(compiled(s), x), gradients(s.exactly, x)),
        "",
    ),
    "`torch.compile(dynamic=True)`": (
        dynamic_shapes,
        "one graph for every batch and grid; windows may be made of sizes",
    ),
    "`torch.compile` of `torch.func.grad`": (
        lambda s, x: close(
            compiled(grad(loss_of(s), tuple(range(len(x)))))(*x), grad(loss_of(s.exactly), tuple(range(len(x))))(*x)
        ),
        "",
    ),
    "double backward of a compiled function": (double_backward_of_compiled, "differentiate first, then compile"),
    "compiled autograd": (compiled_autograd, ""),
    "`torch.export`, strict and not": (export, "the op stays one node"),
    "AOTInductor": (aot_inductor, "a dynamic axis too"),
    "`torch.onnx.export(dynamo=True)`": (onnx, "gathers of windows; any batch, but a grid of fixed size"),
    "checkpoints: reentrant, not, selective": (checkpoints, "recomputes the same bits"),
    "`torch.autocast`, `GradScaler`": (autocast, "float64 is left alone"),
    "hooks on tensors, modules, graph nodes": (hooks, ""),
    "partially frozen inputs and parameters": (partially_frozen, ""),
    "`torch.use_deterministic_algorithms`": (deterministic_mode, "every plan is deterministic"),
    "`FlopCounterMode`": (flop_counter, "import `natten.flops` first; exact pairs"),
    "`deepcopy`, `pickle`, `torch.save`": (copies, ""),
    "`torch.nn.utils.parametrize`, weight norm": (weight_norm, ""),
    "`torch.func.functionalize`": (lambda s, x: torch.func.functionalize(s)(*x), ""),
    "nested tensors (`torch.jagged`)": (nested, "pack samples and call `natten.attention` with `seqlens_Q`"),
}
SUBJECTS = [FunctionSubject, ModuleSubject]


def outcome(subject, feature):
    """yes, or no and the sentence that says so; - where there is nothing to try."""
    torch.manual_seed(0)
    s = subject().double()
    try:
        FEATURES[feature][0](s, s.inputs(torch.float64))
    except NotApplicable:
        return "-"
    except (RuntimeError, NotImplementedError) as error:
        torch_refuses = "natten" not in str(error).split("\n")[0] and not isinstance(error, NotImplementedError)
        sentence = re.sub(r"\s+", " ", str(error).split("\n")[0].split(". ")[0]).replace("|", "/")
        return f"no{', says torch' if torch_refuses else ''}: {sentence[:110]}"
    return "yes"


def table():
    lines = [f"| feature | {' | '.join(s.name for s in SUBJECTS)} | remark |", "|---|---|---|---|"]
    for feature, (_, remark) in FEATURES.items():
        lines.append(f"| {feature} | {' | '.join(outcome(s, feature) for s in SUBJECTS)} | {remark} |")
    return lines


REFUSED = {"double backward of a compiled function", "`torch.func.functionalize`", "nested tensors (`torch.jagged`)"}
WRITTEN_UNDER = f"Written under torch {torch.__version__.split('+')[0]}."


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, subject):
    found = outcome(subject, feature)
    assert found.startswith("no") == (feature in REFUSED), found
    if WRITTEN_UNDER in PAGE.read_text():  # another torch says no in other words
        row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {feature} |"))
        assert row.split(" | ")[1 + SUBJECTS.index(subject)] == found, "write the table anew: see the head of this file"


def test_the_page_has_a_row_for_each_feature():
    rows = [row for row in PAGE.read_text().split("<!-- table -->\n")[1].splitlines() if row.startswith("| ")]
    rows = rows[1 : 1 + len(FEATURES)]
    assert [row.split(" | ")[0][2:] for row in rows] == list(FEATURES)


if __name__ == "__main__":
    head, _, tail = PAGE.read_text().partition("<!-- table -->\n")
    _, _, tail = tail.partition("<!-- end of table -->")
    lines = "\n".join([*table(), "", WRITTEN_UNDER])
    PAGE.write_text(head + "<!-- table -->\n" + lines + "\n<!-- end of table -->" + tail)
    sys.exit(0)
