# SPDX-License-Identifier: MIT
"""Calls every counter, check and type of legacy_names.py and compares it with its rule."""

import os
import subprocess
import sys
import tempfile
import types
import unittest

import torch
from legacy_names import RANKS, probe

import natten


def names(template, *values):
    return [template.format(value) for value in values]


def refused(kind, call, *arguments):
    try:
        call(*arguments)
    except kind as error:
        assert "\n" not in str(error)
        return
    raise AssertionError(f"{kind.__name__} expected")


# --- counters --------------------------------------------------------------------------------------------------------


@probe(
    *names("flops.{}", "qk_rpb_flop", "av_flop"),
    *names("flops.qk_{}d_rpb_flop", *RANKS),
    *names("flops.av_{}d_flop", *RANKS),
)
def check_handle(name, count):
    rank = next((int(c) for c in name if c.isdigit()), 2)
    grid, tokens = (5, 6, 7)[:rank], (5, 30, 210)[rank - 1]
    q, attn, rpb = [2, 3, *grid, 8], [2, 3, *grid, 3**rank], [3, *[5] * rank]
    if "qk" in name:
        assert count([q, q, rpb], [attn]) == 2 * 3 * tokens * 3**rank * 9
    else:
        assert count([attn, q], [q]) == 2 * 3 * tokens * 3**rank * 8


@probe(*names("flops.{}_flop_count", "fna", "na_qk", "na_av"))
def check_flop_count(name, count):
    first, second = (1, 5, 6, 2, 8), (1, 2, 5, 6, 8)
    pairs = 2 * 5 * 6 * 9
    shapes = [first] * (3 if "fna" in name else 2)
    dims = 16 if "fna" in name else 8
    assert count(*shapes, (3, 3), (1, 1), (False, False), True) == 2 * dims * pairs
    assert count(*shapes, (3, 3), (1, 1), (False, False), True, return_macs=True) == dims * pairs
    shapes = [second] * len(shapes)
    causal = 2 * 5 * 3 * (1 + 2 + 3 * 4)
    assert count(*shapes, (3, 3), (1, 1), (False, True), False) == 2 * dims * causal


class _Attention(torch.nn.Module):
    """A layer and the unfused operators, so that all of their ops are in one graph."""

    def __init__(self):
        super().__init__()
        self.layer = natten.NeighborhoodAttention2D(16, 2, 3, is_causal=(True, False), rel_pos_bias=True)

    def forward(self, x):
        q = self.layer(x).unflatten(-1, (2, 8)).movedim(-2, 1)
        attn = natten.functional.natten2dqkrpb(q, q, self.layer.rpb, 3, 2)
        return natten.functional.natten2dav(attn.softmax(-1), q, 3, 2)


MACS = 7 * 9 * 16 * 16 * 4 + 2 * (1 + 2 + 5 * 3) * 9 * 3 * 17 + 2 * 7 * 9 * 9 * (8 + 1 + 8)


@probe("flops.get_flops", "extras.get_gflops")
def check_get_flops(name, get_flops):
    scale = 1e9 if name.startswith("extras") else 1
    assert get_flops(_Attention(), torch.randn(1, 7, 9, 16), disable_warnings=True) == MACS / scale


@probe("flops.add_natten_handle")
def check_add_handle(name, add_natten_handle):
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(_Attention().eval(), torch.randn(2, 7, 9, 16)))
    assert counter.unsupported_ops_warnings(False).total() == 2 * MACS


class _Picture(_Attention):
    def forward(self, x):
        return super().forward(x.mean(1, keepdim=True).expand(-1, 16, -1, -1).movedim(1, -1))


@probe("extras.get_imagenet_gflops")
def check_imagenet(name, get_imagenet_gflops):
    count = get_imagenet_gflops(_Picture(), img_size=14, disable_warnings=True)
    linear, tokens = 14 * 14 * 16 * 16 * 4, 14 * 14
    assert count * 1e9 == linear + 2 * (1 + 2 + 12 * 3) * 14 * 3 * 17 + 2 * tokens * 9 * 17


@probe("extras.get_mparams")
def check_mparams(name, get_mparams):
    assert get_mparams(torch.nn.Linear(1000, 1000)) == 1.001


@probe("gradcheck1d", "gradcheck2d")
def check_gradcheck(name, module):
    sizes = ["-x", "9"] if name.endswith("1d") else ["-x", "9", "-y", "9"]
    command = [
        sys.executable,
        "-m",
        f"natten.{name}",
        "-b",
        "1",
        "-n",
        "2",
        *sizes,
        "-d",
        "8",
        "-k",
        "3",
        "--dilation",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("passed") == 4, done.stdout + done.stderr[-500:]


# --- checks and types ------------------------------------------------------------------------------------------------


@probe(
    *names("utils.check_{}", "all_args", "kernel_size_arg", "dilation_arg", "causal_arg"), "utils.checks.check_all_args"
)
def check_checks(name, check):
    sizes = {
        "kernel_size_arg": ((3,), (3, 3)),
        "dilation_arg": ((None,), (1, 1)),
        "causal_arg": ((None,), (False, False)),
    }
    kind = name.split("check_")[-1]
    if kind in sizes:
        arguments, expected = sizes[kind]
    elif name.startswith("utils.checks"):
        arguments, expected = (3, 1, [1, 2], True), ((3, 3), (1, 1), (1, 2), (True, True))
    else:
        arguments, expected = (3, [1, 2], True), ((3, 3), (1, 2), (True, True))
    assert check(2, *arguments) == expected
    refused(ValueError, check, 2, *[(1, 1, 1)] * len(arguments))
    refused(ValueError, check, 2, *["3"] * len(arguments))


@probe(*names("utils.check_{}", "tiling_config", "backward_tiling_config"))
def check_tiling(name, check):
    backward = "backward" in name
    config = ((8, 8), [4, 4], (1, 1), True) if backward else ((8, 8), [4, 4])
    assert check(2, config) == (((8, 8), (4, 4), (1, 1), True) if backward else ((8, 8), (4, 4)))
    refused(ValueError, check, 2, ((8, 8),))
    refused(ValueError, check, 3, config)


@probe(*names("utils.{}", "check_additional_keys", "check_additional_values"))
def check_additional(name, check):
    x, extra, attn = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 7)
    if name.endswith("keys"):
        assert check(x, None) == 0 and check(x, extra) == 4
        refused(ValueError, check, x, extra[0])
    else:
        assert check(attn, extra, x, 3) == 4 and check(attn, None, x, 7) == 0
        refused(ValueError, check, attn, extra, x, 7)


@probe(*names("utils.{}", "get_num_na_weights", "get_device_cc", "make_attn_tensor_from_input"))
def check_utilities(name, function):
    if name.endswith("weights"):
        assert function((3, 5)) == 15 and function(7) == 7
    elif name.endswith("cc"):
        assert (function() > 0) is torch.cuda.is_available()
    else:
        assert function(torch.zeros(1, 2, 5, 8).half(), 3).shape == (1, 2, 5, 3)


@probe(*names("types.{}", "create_dim_from_int", "create_causal_arg_from_bool"))
def check_create(name, create):
    value = True if "causal" in name else 3
    assert create(3, value) == (value,) * 3
    refused(ValueError, create, 4, value)


@probe(
    *names("types.Dimension{}DType", *RANKS),
    *names("types.Dimension{}DTypeOrDed", *RANKS),
    *names("types.CausalArg{}DType", *RANKS),
    *names("types.CausalArg{}DTypeOrDed", *RANKS),
    *names("types.{}", "FnaTileShapeType", "FnaForwardConfigType", "FnaBackwardConfigType", "NoneType"),
    *names("types.{}", "CausalArgType", "DimensionType"),
)
def check_type(name, kind):
    assert isinstance(kind, type | types.GenericAlias | types.UnionType)


@probe("types.KernelSchedule")
def check_schedule(name, schedule):
    members = {"NonPersistent": 0, "WarpSpecializedCooperative": 1, "WarpSpecializedPingpong": 2}
    assert {member.name: member.value for member in schedule} == members
    q = torch.randn(1, 9, 2, 8)
    assert torch.equal(natten.na1d(q, q, q, 3, kernel_schedule=schedule(1)), natten.na1d(q, q, q, 3))


@probe("autotuner.autotune_fna")
def check_autotune(name, autotune_fna):
    forward, backward = autotune_fna(2, torch.zeros(1, 8, 8, 2, 8), 3, 1, False)
    assert forward == ((8, 8), (8, 8)) and backward == ((8, 8), (8, 8), (1, 1), False)


@probe("HAS_LIBNATTEN", "__version__")
def check_facts(name, value):
    assert value is True or tuple(int(n) for n in value.split(".")[:2]) >= (0, 22)


@probe(*names("_environment.{}", "_NUM_RAND_SWEEP_TESTS", "_RUN_FLEX_TESTS"))
def check_environment(name, value):
    assert isinstance(value, int)


@probe("utils.dtype.is_fp8")
def check_fp8(name, is_fp8):
    assert is_fp8(torch.float8_e4m3fn) and is_fp8(torch.float8_e5m2) and not is_fp8(torch.float16)


@probe(*names("utils.log.{}", "get_logger", "NattenLogger", "_get_log_pipe"))
def check_log(name, thing):
    with tempfile.NamedTemporaryFile("r+", suffix=".log") as file:
        kept = {key: os.environ.get(key) for key in ("NATTEN_LOG_LEVEL", "NATTEN_LOG_PIPE")}
        try:
            os.environ |= {"NATTEN_LOG_LEVEL": "info", "NATTEN_LOG_PIPE": file.name}
            if name.endswith("_pipe"):
                assert thing() == file.name
                os.environ["NATTEN_LOG_PIPE"] = "/dev/null"
                assert thing() is None
                os.environ["NATTEN_LOG_PIPE"] = "STDERR"
                assert thing() is sys.stderr
                return
            logger = thing("natten.probe")
            logger.debug("unheard")
            logger.info("heard %d", 3)
            assert "heard 3" in file.read()
        finally:
            for key, value in kept.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


@probe("utils.varlen.generate_varlen_parameters")
def check_varlen(name, generate):
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    lengths = torch.tensor([4, 0, 5], dtype=torch.int32)
    parameters = generate(q, k, v, lengths, lengths)
    assert parameters[0].tolist() == [0, 4, 4, 9] and parameters[0].dtype == torch.int32 and parameters[2:] == (5, 5)
    assert generate(q, k, v) == (None, None, 0, 0)
    keywords = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
    out = natten.attention(q, k, v, **dict(zip(keywords, parameters)))
    parts = [natten.attention(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in ((0, 4), (4, 9))]
    assert torch.equal(out, torch.cat(parts, 1))
    refused(ValueError, generate, q, k, v, lengths.long(), lengths)


@probe(*names("token_permute.token_{}_operation", "permute", "unpermute"))
def check_token_permute(name, function):
    module = natten.token_permute
    x = torch.arange(2.0 * 5 * 6 * 3 * 4).reshape(2, 5, 6, 3, 4)
    for dilation in (None, (2, 1)):
        for flip in (True, False):
            tokens, layout, padded = module.token_permute_operation(x, (2, 4), dilation, flip)
            assert tokens.shape[0] == 2 * (2 if dilation else 1) and layout == (5, 6)
            assert tokens.shape[1] == padded[0] * padded[1]
            assert torch.equal(module.token_unpermute_operation(tokens, layout, (2, 4), dilation, flip), x)
    tokens, _, _ = module.token_permute_operation(x, (2, 4), None, False)
    assert torch.equal(tokens[:, :8].reshape(2, 2, 4, 3, 4), x[:, :2, :4])  # the first tile, row-major
    flipped, _, _ = module.token_permute_operation(x, (2, 4))
    assert torch.equal(flipped[:, :8].reshape(2, 4, 2, 3, 4).transpose(1, 2), x[:, :2, :4])


_HARDWARE = ("cuda", "gemm", "blackwell", "hopper")


@probe(
    *names("utils.testing.skip_if_{}", "cuda_is_not_supported", "fna_is_not_supported", "gemm_is_not_supported"),
    "utils.testing.skip_if_gemm_does_not_support_double_precision",
    "utils.testing.skip_if_nested_is_not_supported",
    *names("utils.testing.skip_if_{}_not_supported", "blackwell_kernels", "hopper_kernels", "libnatten_is"),
    *names("utils.testing.skip_if_flex{}_is_not_supported", "", "_compile"),
    "utils.testing.skip_if_not_running_extended_tests",
)
def check_skip(name, skip_if):
    class Case(unittest.TestCase):
        @skip_if()
        def test(self):
            pass

    result = unittest.TestResult()
    Case("test").run(result)
    may_skip = any(word in name for word in _HARDWARE) or name.endswith("extended_tests")
    assert result.wasSuccessful() and (may_skip or not result.skipped)
    assert not any(word in name for word in _HARDWARE) or torch.cuda.is_available() or result.skipped


@probe(*names("utils.testing.supports_{}", "bfloat16", "float16"))
def check_supports(name, supports):
    assert supports(torch.device("cpu"))
