# SPDX-License-Identifier: MIT
"""Calls every switch of legacy_names.py and compares it with its rule."""

import contextlib

import torch
from legacy_names import probe

import natten
from natten import context


def names(template, *values):
    return [template.format(value) for value in values]


@contextlib.contextmanager
def initial_state():
    context.NattenContext.reset()
    context.AutotunerContext.reset()
    try:
        yield
    finally:
        context.NattenContext.reset()
        context.AutotunerContext.reset()


def refused(kind, call, *arguments):
    try:
        call(*arguments)
    except kind as error:
        assert "\n" not in str(error)
        return
    raise AssertionError(f"{kind.__name__} expected")


# --- switches --------------------------------------------------------------------------------------------------------

SWITCHES = {
    "use_deterministic_algorithms": "are_deterministic_algorithms_enabled",
    "use_fused_na": "is_fused_na_enabled",
    "use_fna": "is_fna_enabled",
    "use_kv_parallelism_in_fused_na": "is_kv_parallelism_in_fused_na_enabled",
    "use_tiled_na": "is_tiled_na_enabled",
    "use_gemm_na": "is_gemm_na_enabled",
    "use_tf32_in_gemm_na": "is_tf32_in_gemm_na_enabled",
    "allow_flex_compile": "is_flex_compile_allowed",
    "allow_flex_compile_backprop": "is_flex_compile_backprop_allowed",
}
_DEFAULT_ON = ("use_kv_parallelism_in_fused_na", "use_tiled_na", "use_gemm_na", "use_tf32_in_gemm_na")


@probe(*SWITCHES, "context.use_fused_na")
def check_switch(name, switch):
    name = name.removeprefix("context.")
    state = getattr(natten, SWITCHES[name])
    with initial_state():
        assert state() is (name in _DEFAULT_ON)
        for mode in (True, False):
            switch(mode)
            assert state() is mode
        refused(ValueError, switch, "yes")
        q = torch.randn(1, 6, 7, 2, 8)
        switch(True)
        on = natten.na2d(q, q, q, 3)
        switch(False)
        assert torch.equal(on, natten.na2d(q, q, q, 3))


@probe(*SWITCHES.values())
def check_state(name, state):
    assert state() in (True, False)


@probe(
    *names("{}able_tf32", "en", "dis"), *names("{}able_tiled_na", "en", "dis"), *names("{}able_gemm_na", "en", "dis")
)
def check_old_switch(name, switch):
    state = {"tf32": "tf32_in_gemm_na"}.get(name.split("_", 1)[1], name.split("_", 1)[1])
    with initial_state():
        for _ in range(2):
            switch()
            assert getattr(natten, f"is_{state}_enabled")() is name.startswith("en")


@probe("use_flex_attention", "force_flex_attention")
def check_flex_switch(name, switch):
    assert switch() is None and switch(False) is None
    refused(ValueError, switch, 3)


@probe("disable_flex_compile", "disable_flex_compile_backprop")
def check_flex_compile(name, disable):
    with initial_state():
        natten.allow_flex_compile(True, True)
        disable()
        assert natten.is_flex_compile_allowed() is name.endswith("backprop")
        assert natten.is_flex_compile_backprop_allowed() is not name.endswith("backprop")


@probe("use_autotuner")
def check_autotuner(name, use_autotuner):
    with initial_state():
        use_autotuner(True, None, True)
        assert natten.is_autotuner_enabled_for_forward() and not natten.is_autotuner_enabled_for_backward()
        assert natten.is_autotuner_thorough_for_forward() and not natten.is_autotuner_thorough_for_backward()
        use_autotuner(backward_pass=True, thorough_mode_backward=True, warmup_steps_forward=2, steps_backward=3)
        assert natten.is_autotuner_enabled_for_forward() and natten.is_autotuner_thorough_for_backward()
        refused(ValueError, use_autotuner, "yes")
        refused(ValueError, use_autotuner, None, None, None, None, 0)
        natten.use_deterministic_algorithms(True)
        assert not natten.is_autotuner_enabled() and not natten.is_kv_parallelism_in_fused_na_enabled()
        refused(RuntimeError, use_autotuner, True)
        refused(RuntimeError, natten.use_kv_parallelism_in_fused_na, True)
        refused(RuntimeError, natten.use_fused_na, True)


@probe(
    "is_autotuner_enabled",
    *names("is_autotuner_enabled_for_{}", "forward", "backward"),
    *names("is_autotuner_thorough_for_{}", "forward", "backward"),
)
def check_autotuner_state(name, state):
    with initial_state():
        assert state() is False
        natten.use_autotuner(True, True, True, True)
        assert state() is True


@probe("disable_autotuner")
def check_disable_autotuner(name, disable):
    with initial_state():
        natten.use_autotuner(True, True)
        disable()
        assert not natten.is_autotuner_enabled()


@probe("context.NattenContext", "context.AutotunerContext")
def check_context(name, state):
    with initial_state():
        natten.use_fused_na(True)
        natten.use_autotuner(True)
        state.reset()
        assert natten.is_fused_na_enabled() is not name.endswith("NattenContext")
        assert natten.is_autotuner_enabled() is not name.endswith("AutotunerContext")


@probe("context.MemoryUsagePreference")
def check_preferences(name, preference):
    assert [(p.name, p.value) for p in preference] == [("Default", 0), ("Strict", 1), ("Unrestricted", 2)]


@probe(
    *names("{}et_memory_usage_preference", "s", "g"),
    *names("is_memory_usage_{}", "default", "strict", "unrestricted"),
)
def check_memory_preference(name, function):
    with initial_state():
        for wanted in ("strict", "unrestricted", "default"):
            natten.set_memory_usage_preference(wanted)
            assert natten.get_memory_usage_preference() == context.MemoryUsagePreference[wanted.title()]
            if name.startswith("is"):
                assert function() is name.endswith("_" + wanted)
        refused(ValueError, natten.set_memory_usage_preference, "none")


@probe(
    *names("has_{}", "cuda", "half", "bfloat", "gemm", "tf32_gemm", "fp32_gemm", "fp64_gemm", "fna", "fused_na"),
    "context.has_cuda",
    *names("libnatten.has_{}", "cuda", "gemm"),
)
def check_has(name, has):
    everywhere = name in ("has_half", "has_bfloat", "has_fna", "has_fused_na")
    assert has() is (natten.HAS_LIBNATTEN if everywhere else has() and torch.cuda.is_available())
    assert "cuda" in name or has(None) is has()


@probe(*(f"libnatten.{verb}_{what}" for verb in ("get", "set") for what in ("tiled_na", "gemm_na", "gemm_tf32")))
def check_flag_of_the_extension(name, function):
    what = name.split("_", 1)[1]
    with initial_state():
        for mode in (False, True):
            getattr(natten.libnatten, f"set_{what}")(mode)
            assert getattr(natten.libnatten, f"get_{what}")() is mode


@probe("libnatten.compute_delta", "_libnatten.compute_delta")
def check_delta(name, compute_delta):
    out, d_out, delta = torch.randn(2, 5, 3, 8).half(), torch.randn(2, 5, 3, 8).half(), torch.zeros(2, 5, 3)
    compute_delta(out, d_out, delta)
    torch.testing.assert_close(delta.double(), (out.double() * d_out.double()).sum(-1), rtol=0, atol=1e-5)
    refused(ValueError, compute_delta, out, d_out[:1], delta)
