# SPDX-License-Identifier: MIT
"""T-65: every combination of type, widths, masks and gradient runs on the CPU and is right. Plans, and forcing them."""

import json
import os
import re
import subprocess
import sys

import cases
import pytest
import torch
from cases import Case

import natten

KERNELS = re.compile(r"reference|cpu/(sliding|loops)-(avx512|avx2|portable)")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 3, 5, 8, 13, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 512])
def test_every_width(head_dim, dtype):
    cases.check(Case((3, 19), (2, 5), head_dim=head_dim), dtypes=(dtype,))
    cases.check(Case((17,), 17, causal=True, head_dim=head_dim), dtypes=(dtype,))
    cases.check(Case((2, 2, 9), (2, 2, 4), stride=(1, 2, 3), head_dim=head_dim), dtypes=(dtype,))


OPTIONS = cases.product(
    dilation=[1, 2],
    causal=[False, True],
    stride=[1, 2],
    heads_kv=[1, 4],
    head_dim_v=[8, 6],
    extra=[0, 2],
    bias=[False, True],
)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(11,), (5, 9), (2, 3, 7)], ids=str)
def test_every_combination(grid, dtype):
    window = (2, 2, 3)[-len(grid) :]
    for options in OPTIONS:
        cases.check(Case(grid, window, heads=4, head_dim=8, **options), dtypes=(dtype,))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_without_gradient(dtype):
    """Plans of the forward pass alone, by their full names."""
    for options in OPTIONS:
        case = Case((5, 18), (2, 3), heads=4, head_dim=8, **options)
        inputs = cases.make_inputs(case, dtype)
        plans = list_plans(case, inputs)
        exact, same = (x and {name: x[name] for name in ("out", "lse")} for x in cases.expected(case, inputs))
        outs = {}
        for plan in [None, *plans]:
            outs[plan], lse = cases.call(case, inputs, plan, return_lse=True)
            cases.compare({"out": outs[plan], "lse": lse}, exact, same, dtype, f"{case} plan={plan}")
        assert torch.equal(outs[None], outs[plans[0]]), "the best plan is the first of the list"


def list_plans(case, inputs, backward=False, function=natten.list_plans):
    window, stride, dilation, causal = case.parameters
    return function(
        *(inputs[name] for name in "qkv"),
        window,
        stride=stride,
        dilation=dilation,
        is_causal=causal,
        additional_keys=inputs.get("extra_k"),
        rpb=inputs.get("bias"),
        backward=backward,
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", [
    Case((40,), 9, heads=2),
    Case((16, 40), (5, 7), dilation=(1, 2), causal=(True, False), heads=2),
    Case((16, 40), (5, 6), stride=(2, 3), heads=4, heads_kv=2, extra=3, bias=True),
    Case((4, 8, 20), (3, 4, 5), heads=2),
], ids=str)  # fmt: skip
def test_lists_of_plans(case, backward):
    for dtype in cases.DTYPES:
        inputs = cases.make_inputs(case, dtype)
        plans = list_plans(case, inputs, backward)
        assert plans and len(set(plans)) == len(plans)
        assert all(KERNELS.match(plan) for plan in plans), plans
        assert plans[-1].startswith("reference"), "the oracle is the last resort"
        assert any(plan.startswith("cpu/") for plan in plans)
        on_meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
        assert list_plans(case, on_meta, backward) == plans
        rejections = list_plans(case, inputs, backward, natten.list_rejections)
        assert not set(rejections) & set(plans)
        for name, reason in rejections.items():
            assert name and reason and "\n" not in reason


def prefixes(plan):
    """What may stand for a plan: every piece of it that ends before a '/' or '-'."""
    return [plan[: match.start()] for match in re.finditer("[/-]", plan)] + [plan]


def test_prefixes_of_plans():
    case = Case((6, 20), (3, 4), heads=2)
    inputs = cases.make_inputs(case, torch.float32)
    plans = list_plans(case, inputs)
    for plan in plans:
        for prefix in prefixes(plan):
            best = next(p for p in plans if p == prefix or p.startswith((prefix + "/", prefix + "-")))
            assert torch.equal(cases.call(case, inputs, prefix), cases.call(case, inputs, best)), prefix


def test_plans_with_tiles_also_serve_the_backward_pass():
    case = Case((6, 20), (3, 4), heads=2)
    inputs = cases.make_inputs(case, torch.float32)
    exact, same = cases.expected(case, inputs)
    for plan in list_plans(case, inputs):
        family = "/".join(plan.split("/")[:2])
        if family in cases.plans_of(case, torch.float32):
            cases.compare(cases.results(case, inputs, plan), exact, same, torch.float32, plan)


def test_a_kernel_that_cannot_run_says_why():
    case = Case((6, 20), (3, 4), stride=2, heads=2)
    inputs = cases.make_inputs(case, torch.float32)
    rejections = list_plans(case, inputs, function=natten.list_rejections)
    assert any("sliding" in name for name in rejections)
    for name in rejections:
        if not name.startswith("cpu/"):
            continue
        with pytest.raises((ValueError, NotImplementedError)) as error:
            cases.call(case, inputs, name)
        assert "\n" not in str(error.value) and rejections[name] in str(error.value)


@pytest.mark.parametrize("backend, engine", [("cpu", "cpu"), ("reference", "reference")])
def test_backends_of_ours(backend, engine):
    case = Case((6, 20), (3, 4), heads=2)
    inputs = cases.make_inputs(case, torch.float32)
    assert torch.equal(cases.call(case, inputs, backend=backend), cases.call(case, inputs, engine))
    out = natten.attention(*(inputs[name].flatten(1, 2) for name in "qkv"), backend=backend)
    assert torch.equal(out, natten.attention(*(inputs[name].flatten(1, 2) for name in "qkv"), plan=engine))


def test_flex_is_the_best_engine():
    case = Case((6, 20), (3, 4), heads=2)
    inputs = cases.make_inputs(case, torch.float32)
    assert torch.equal(cases.call(case, inputs, backend="flex-fna"), cases.call(case, inputs))


def run_python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_info():
    text = run_python("-m", "natten", "info")
    assert text.returncode == 0, text.stderr
    assert natten.__version__ in text.stdout and torch.__version__ in text.stdout
    answer = run_python("-m", "natten", "info", "--json")
    assert answer.returncode == 0, answer.stderr
    info = json.loads(answer.stdout)
    assert info["version"] == natten.__version__
    backends = {backend["name"]: backend for backend in info["backends"]}
    assert backends["cpu"]["available"] and backends["reference"]["available"]
    assert all(backend["available"] or backend["reason"] for backend in backends.values())


def test_versions():
    assert tuple(map(int, natten.__version__.split(".")[:2])) >= (0, 22)
    assert natten.HAS_LIBNATTEN is True


def test_import_without_the_library():
    """Importing works, and the first call says in one sentence what is missing."""
    code = """if True:
        import torch, natten
        assert natten.HAS_LIBNATTEN is False
        q = torch.randn(1, 5, 1, 4)
        for call in (lambda: natten.na1d(q, q, q, 3), lambda: natten.attention(q, q, q)):
            try:
                call()
            except RuntimeError as error:
                assert "\\n" not in str(error) and "no-such-library.so" in str(error), error
            else:
                raise AssertionError("no error")
        natten.NeighborhoodAttention1D(8, 2, 3)
        out, lse = natten.merge_attentions([q, q], [q[..., 0], q[..., 0]])
        print("fine")
    """
    result = run_python("-c", code, NATTEN_LIBRARY="no-such-library.so")
    assert result.stdout.strip() == "fine", result.stderr
    info = run_python("-m", "natten", "info", NATTEN_LIBRARY="no-such-library.so")
    assert info.returncode == 0 and "no-such-library.so" in info.stdout


def test_two_grids_in_threads():
    """Calls from several Python threads at once give the bits of calls in a row."""
    from concurrent.futures import ThreadPoolExecutor

    problems = [
        Case((9, 20), (3, 4), heads=2),
        Case((60,), 7, dilation=2, bias=True),
        Case((3, 5, 9), 2, stride=2, extra=2),
    ]
    prepared = [(case, cases.make_inputs(case, torch.float32)) for case in problems]
    alone = [cases.results(case, inputs) for case, inputs in prepared]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cases.results, *prepared[i % 3]) for i in range(60)]
        for i, future in enumerate(futures):
            assert all(torch.equal(a, b) for a, b in zip(future.result().values(), alone[i % 3].values()))


def test_engines_agree_on_larger_problems(restore_threads):
    """Grids of several tiles along every axis, more heads than threads."""
    torch.set_num_threads(2)
    for case in (
        Case((300,), 31, dilation=3, heads=3, head_dim=32, batch=2),
        Case((40, 70), (7, 13), dilation=(2, 1), causal=(False, True), heads=3, head_dim=16),
        Case((33, 65), (8, 5), stride=(4, 5), heads=2, head_dim=32),
        Case((9, 12, 33), (5, 4, 7), heads=2, head_dim=16),
    ):
        inputs = cases.make_inputs(case, torch.float32)
        reference = cases.results(case, {name: x.double() for name, x in inputs.items()}, "reference")
        for plan in cases.plans_of(case, torch.float32):
            cases.compare(cases.results(case, inputs, plan), reference, None, torch.float32, f"{case} {plan}")


def test_all_plans_of_one_isa_are_listed_together():
    """Each instruction set that this machine has offers both of its kernels, and the portable one is always there."""
    case = Case((16, 40), 7, heads=2, head_dim=32)
    inputs = cases.make_inputs(case, torch.float32)
    for backward in (False, True):
        families = {"/".join(plan.split("/")[:2]) for plan in list_plans(case, inputs, backward)}
        assert {"cpu/sliding-portable", "cpu/loops-portable", "reference"} <= families
        for isa in ("avx2", "avx512"):
            assert (f"cpu/sliding-{isa}" in families) == (f"cpu/loops-{isa}" in families)
