# SPDX-License-Identifier: MIT
"""What only a GPU can show: streams, graphs, devices (T-34), sizes past 2^31 and grids past 65535 (T-20 to T-23), mixed
precision with a gradient scaler, TF32 (T-54). The problems of the other files run on the GPU too, see conftest.py."""

import threading

import cases
import pytest
import sampled
import torch
from cases import Case

import natten

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use (cuda)")

CASE = Case((9, 20), (3, 4), dilation=(1, 2), batch=2, heads=4, heads_kv=2, head_dim=16, extra=3, bias=True)
PLAIN = Case((24, 30), 7, batch=2, heads=2, head_dim=32)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def on_cuda():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
    torch.cuda.empty_cache()


def plans_of(case, dtype):
    return [None, *cases.plans_of(case, dtype)]


# --- what there is ----------------------------------------------------------------------------------------------------
def test_engines_and_their_names():
    inputs = cases.make_inputs(CASE, torch.float64)
    q, k, v = (inputs[name] for name in "qkv")
    assert natten.list_plans(q, k, v, 3)[-1] == "cuda-reference"
    with pytest.raises(ValueError, match="it needs CUDA tensors|no plan|cannot run") as error:
        natten.na2d(q, k, v, 3, plan="cpu")
    assert "\n" not in str(error.value)
    by_name = natten.na2d(q, k, v, 3, backend="reference")
    assert torch.equal(by_name, natten.na2d(q, k, v, 3, plan="cuda-reference"))
    with pytest.raises(ValueError, match="CPU tensors"):
        natten.na2d(q, k, v, 3, backend="cpu")


def test_info_names_the_gpu():
    from natten import __main__

    report = __main__.collect()
    assert report["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    assert {b["name"]: b["available"] for b in report["backends"]}["cuda-reference"]


@pytest.mark.parametrize("position", range(3))
def test_mixed_devices(position):
    tensors = [torch.randn(1, 6, 7, 2, 8) for _ in range(3)]
    tensors[position] = tensors[position].cpu()
    with pytest.raises(ValueError, match="device") as error:
        natten.na2d(*tensors, 3)
    assert "\n" not in str(error.value)
    parameters = [3, 3], [1, 1], [1, 1], [False, False], 1.0, True, ""
    with pytest.raises((RuntimeError, ValueError), match="another device"):
        torch.ops.natten.na_fwd(*tensors, None, None, None, *parameters)
    x = torch.randn(1, 6, 7, 2, 8)
    lse = torch.zeros(1, 6, 7, 2, device="cpu")
    with pytest.raises((RuntimeError, ValueError), match="another device"):
        torch.ops.natten.na_bwd(x, None, x, x, x, None, None, None, x, lse, *parameters)


def test_the_bare_op_takes_any_stride():
    """The Python functions copy what has no unit last stride; whoever calls the op gets it copied on the device."""
    q, k, v = torch.randn(3, 1, 8, 6, 7, 2).movedim(2, -1)
    bias = torch.randn(5, 5, 2).movedim(-1, 0)
    parameters = [3, 3], [1, 1], [1, 1], [False, False], 1.0, True, ""
    out, _ = torch.ops.natten.na_fwd(q, k, v, bias, None, None, *parameters)
    dense_ones = (x.contiguous() for x in (q, k, v, bias))
    assert torch.equal(out, torch.ops.natten.na_fwd(*dense_ones, None, None, *parameters)[0])


# --- T-34: streams, graphs, threads, devices --------------------------------------------------------------------------
@pytest.mark.parametrize("case", [CASE, PLAIN], ids=str)
def test_work_stays_on_the_current_stream(case):
    """While a side stream sleeps nothing appears and the default stream stays idle."""
    inputs = cases.make_inputs(case, torch.float32)
    for plan in plans_of(case, torch.float32):
        expected = cases.results(case, inputs, plan)
        stream, done = torch.cuda.Stream(), torch.cuda.Event()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(500_000_000)
            got = cases.results(case, inputs, plan)
            done.record()
        assert not done.query() and torch.cuda.default_stream().query(), plan
        stream.synchronize()
        assert all(torch.equal(got[name], expected[name]) for name in expected), plan


def capture(run):
    """A CUDA graph of `run`, warmed up on another stream, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASE, PLAIN], ids=str)
def test_cuda_graphs(case, dtype):
    """Forward and backward are captured, and replayed on other numbers."""
    names = [name for name in cases.INPUTS if name in cases.make_inputs(case, dtype)]
    for plan in plans_of(case, dtype):
        static = cases.make_inputs(case, dtype)

        def run(static=static, plan=plan):
            leaves = {name: static[name].detach().requires_grad_() for name in names}
            out, lse = cases.call(case, {**static, **leaves}, plan, return_lse=True)
            return out, lse, *torch.autograd.grad([out, lse], list(leaves.values()), [static["dout"], static["dlse"]])

        graph, captured = capture(run)
        for name, x in cases.make_inputs(case, dtype, seed=1).items():
            static[name].copy_(x)
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b), plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_graphs_of_packed_samples(dtype):
    """Their places travel with the launches: 40 samples are more than one launch takes."""
    grids = [(3 + i % 5, 4 + i % 7) for i in range(40)]
    tokens = sum(a * b for a, b in grids)
    q, k, v = (torch.randn(1, tokens, 2, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, tokens, 2, 32, dtype=dtype)

    def run():
        out = natten.functional.na2d_varlen(q, k, v, grids, 3)
        lengths = [a * b for a, b in grids]
        out = out + natten.attention(q, k, v, seqlens_Q=lengths, seqlens_KV=lengths)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    graph, captured = capture(run)
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    torch.compiler.reset()

    def function(q, k, v):
        return natten.na2d(q * 2, k, v, 7).sin()

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for seed in range(4):
        inputs = cases.make_inputs(PLAIN, torch.float32, seed)
        leaves = [inputs[name].requires_grad_() for name in "qkv"]
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*leaves)
        got = [out.detach().clone(), *torch.autograd.grad(out, leaves, inputs["dout"])]
        exact = function(*leaves)
        for a, b in zip(got, [exact, *torch.autograd.grad(exact, leaves, inputs["dout"])], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_threads_on_two_streams():
    inputs = cases.make_inputs(PLAIN, torch.float32)
    expected = cases.results(PLAIN, inputs)
    failures = []

    def work():
        with torch.device("cuda"), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                got = cases.results(PLAIN, inputs)
                torch.cuda.current_stream().synchronize()
                failures.extend(name for name in expected if not torch.equal(got[name], expected[name]))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


if torch.cuda.device_count() > 1:

    def test_tensors_on_the_second_device():
        inputs = cases.make_inputs(PLAIN, torch.float32)
        expected = cases.results(PLAIN, inputs)
        before = torch.cuda.memory_allocated(0)
        with torch.device("cuda:1"):
            moved = {name: x.to("cuda:1") for name, x in inputs.items()}
            got = cases.results(PLAIN, moved)
        assert torch.cuda.current_device() == 0 and torch.cuda.memory_allocated(0) == before
        assert all(torch.equal(got[name].to("cuda:0"), expected[name]) for name in expected)


# --- precision --------------------------------------------------------------------------------------------------------
def test_float32_is_exact_until_tf32_is_allowed():
    """T-54. With torch's switch thrown the plan in TF32 runs both passes, and its results are as good as TF32 is."""
    inputs = cases.make_inputs(PLAIN, torch.float32)
    exact, same = cases.expected(PLAIN, inputs)
    for plan in plans_of(PLAIN, torch.float32):
        cases.compare(cases.results(PLAIN, inputs, plan), exact, same, torch.float32, f"{plan}")
    torch.compiler.reset()
    compiled = torch.compile(lambda t: cases.call(PLAIN, t, return_lse=True), fullgraph=True, backend="aot_eager")
    plans, got = {False: None, True: "portable/boxes-tf32"}, {}
    try:
        for allowed in (False, True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            got[allowed] = cases.results(PLAIN, inputs)
            forced = cases.results(PLAIN, inputs, plans[allowed])
            for results in (forced, cases.results_of(compiled, inputs)):
                assert all(torch.equal(got[allowed][name], results[name]) for name in got[allowed])
            without_grad = cases.call(PLAIN, inputs)
            assert torch.equal(got[allowed]["out"], without_grad), "the same bits with and without a gradient"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert max(cases.errors_of(got[True], exact).values()) < 3e-3
    assert not torch.equal(got[True]["out"], got[False]["out"])


@pytest.mark.parametrize("half", cases.HALVES, ids=str)
def test_training_under_autocast(half):
    """Loss falls, parameters stay finite; float16 with a gradient scaler."""
    block = natten.NeighborhoodAttention2D(64, 2, 7, dilation=2, rel_pos_bias=True)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", enabled=half == torch.float16)
    x, target = torch.randn(2, 4, 16, 20, 64)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", dtype=half):
            out = block(x)
        assert out.dtype == half
        loss = (out.float() - target).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.isfinite().all() and p.grad.dtype == torch.float32 for p in block.parameters())
    assert losses[-1] < 0.9 * losses[0]


# --- sizes ------------------------------------------------------------------------------------------------------------
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def large_inputs(case, dtype):
    return {name: torch.randn(shape, dtype=dtype) for name, shape in case.shapes().items() if name in "qkv"}


def check_sampled(case, dtype, samples=(0,), queries=None, tensors=None, backward=True):
    tensors = tensors or large_inputs(case, dtype)
    for plan in cases.plans_of(case, dtype):
        sampled.check(case, tensors, plan, samples, queries or sampled.corners(case.grid), TOLERANCE[dtype], backward)


@pytest.mark.parametrize("tokens", [2**21, 2**21 + 1])
def test_rows_past_2_to_the_31(tokens):
    """T-20: a row stride of 1024 times the tokens crosses 2^31."""
    check_sampled(Case((tokens,), 15, heads=16, head_dim=64), torch.float16)


def test_elements_past_2_to_the_31():
    """T-21: 2.27e9 elements of values."""
    case = Case((1216, 1216), 15, dilation=16, heads=4, head_dim=32, head_dim_v=384)
    check_sampled(case, torch.float32, backward=False)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_batch_strides_past_2_to_the_31(name):
    """T-22: two small samples of one tensor that are 2^31 elements apart."""
    case = Case((16, 20), 5, batch=2, heads=2, head_dim=32)
    tensors = large_inputs(case, torch.bfloat16)
    sample = tensors[name][0].numel()
    buffer = torch.empty(2**31 + 64 + sample, dtype=torch.bfloat16)
    far = buffer.as_strided(tensors[name].shape, (2**31 + 64, *tensors[name].stride()[1:]))
    far.copy_(tensors[name])
    check_sampled(case, torch.bfloat16, samples=(0, 1), tensors={**tensors, name: far})


@pytest.mark.parametrize("case", [
    Case((4, 4), 3, batch=70_000, heads=1, head_dim=8),
    Case((256, 256), 3, dilation=80, heads=16, head_dim=32),
    Case((70_001,), 5, dilation=70_000 // 5, heads=3, head_dim=16),
    Case((9_000_000,), 3, heads=1, head_dim=8),
    Case((2, 3), 2, batch=3, heads=70_000, head_dim=8),
    Case((70_000, 2, 2), (3, 2, 2), heads=1, head_dim=8),
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*heads first")
def test_grids_past_65535(case):
    """T-23: more samples, heads times dilation groups, tokens than a grid dimension holds."""
    check_sampled(case, torch.bfloat16, samples=sorted({0, case.batch - 1}))


@pytest.mark.parametrize("case", [
    Case((56, 56), 7, batch=128, heads=2, head_dim=32),
    Case((200, 304), 7, batch=8, heads=4, head_dim=32),
    Case((60, 40), 7, batch=100, heads=4, head_dim=64),
], ids=str)  # fmt: skip
def test_samples_that_share_no_launch(case):
    """Enough work for the window kernels to cut the last samples into shorter strips, by a launch of their own."""
    check_sampled(case, torch.bfloat16, samples=(0, case.batch // 2, case.batch - 2, case.batch - 1))


@pytest.mark.parametrize(
    "case", [Case((1,), 1), Case((1, 1, 1), 1, head_dim=8), Case((3, 1), (2, 1), heads=3)], ids=str
)
def test_tiny_launches(case):
    """T-24."""
    cases.check(case)
