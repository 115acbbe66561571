# SPDX-License-Identifier: MIT
"""Switches that hold for the whole process.

Two of them act: `set_oversize` and `set_layout_check`. The others belong to the original, whose clients call them; they
are kept, checked and readable, and change nothing here: our engines are deterministic, do not trade memory for
parallelism over keys, and never compile FlexAttention.
"""

import enum
import warnings

import torch

from . import _legacy

_OVERSIZE = ("clamp", "error", "pad")
_LAYOUT_CHECKS = ("warn", "error", "off")


class MemoryUsagePreference(enum.Enum):
    Default = 0
    Strict = 1
    Unrestricted = 2


class NattenContext:
    """The state of every switch."""

    oversize: str | None
    layout_check: str
    deterministic: bool
    kv_parallelism: bool
    memory_preference: MemoryUsagePreference
    flex_compile: bool
    flex_compile_backprop: bool
    # What releases before 0.20 switched; natten.legacy_context has the functions. No engine asks for these.
    fused: bool
    tiled: bool
    gemm: bool
    tf32_in_gemm: bool

    @classmethod
    def reset(cls) -> None:
        """Back to the state after import."""
        cls.oversize = None
        cls.layout_check = "warn"
        cls.deterministic = False
        cls.kv_parallelism = True
        cls.memory_preference = MemoryUsagePreference.Default
        cls.flex_compile = False
        cls.flex_compile_backprop = False
        cls.fused = False
        cls.tiled = cls.gemm = cls.tf32_in_gemm = True


class AutotunerContext:
    """The state of the autotuner of releases before 0.20; here plans are chosen by a model, not by trial."""

    forward: bool
    backward: bool
    thorough_forward: bool
    thorough_backward: bool
    warmup_steps_forward: int
    warmup_steps_backward: int
    steps_forward: int
    steps_backward: int

    @classmethod
    def reset(cls) -> None:
        """Back to the state after import."""
        cls.forward = cls.backward = cls.thorough_forward = cls.thorough_backward = False
        cls.warmup_steps_forward = cls.warmup_steps_backward = cls.steps_forward = cls.steps_backward = 5


NattenContext.reset()
AutotunerContext.reset()


__getattr__ = _legacy.finder(__name__, "legacy_context")


def check_oversize(mode: str | None) -> str | None:
    """`mode` if it names one, else ValueError."""
    if mode is not None and mode not in _OVERSIZE:
        raise ValueError(
            f"oversize is {mode!r}: give one of {', '.join(map(repr, _OVERSIZE))}, or None for the default"
        )
    return mode


def set_oversize(mode: str | None) -> None:
    """What happens where kernel_size * dilation exceeds an axis, for every call that does not say so itself.

    "clamp": the window is cut to what the axis (with dilation: each of its groups) can fill. "error": ValueError.
    "pad": zeros are appended to the axis and attended, as the modules of natten 0.14 did; needed for detection
    checkpoints of that time. None: the default, which is "clamp", or "pad" in a module that was given `bias=`, the
    spelling of 0.14. An `oversize=` argument of a call or module wins over this switch.
    """
    NattenContext.oversize = check_oversize(mode)


def get_oversize() -> str | None:
    return NattenContext.oversize


def resolve_oversize(argument: str | None, default: str = "clamp") -> str:
    """The mode of one call: its own argument, else this module's switch, else `default`."""
    return check_oversize(argument) or NattenContext.oversize or default


def set_layout_check(mode: str) -> None:
    """What na1d, na2d and na3d do about a tensor that looks heads-first, [batch, heads, *grid, head_dim].

    They would silently read it as another grid. "warn" (default), "error" (ValueError) or "off"; under torch.compile
    nothing is looked at.
    """
    if mode not in _LAYOUT_CHECKS:
        raise ValueError(f"layout check is {mode!r}: give one of {', '.join(map(repr, _LAYOUT_CHECKS))}")
    NattenContext.layout_check = mode


def get_layout_check() -> str:
    return NattenContext.layout_check


def _checked(name: str, mode) -> bool:
    if not isinstance(mode, bool):
        raise ValueError(f"{name} expects a bool, got {type(mode).__name__}")
    return mode


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Accepted for the original's clients: our engines are deterministic with and without it."""
    NattenContext.deterministic = _checked("use_deterministic_algorithms", mode)
    if mode:
        NattenContext.kv_parallelism = False
        AutotunerContext.forward = AutotunerContext.backward = False


def are_deterministic_algorithms_enabled() -> bool:
    return NattenContext.deterministic


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Accepted for the original's clients: nothing here trades determinism for it.

    Raises RuntimeError if `use_deterministic_algorithms` is on; warns and stays off if only torch's own mode is on.
    """
    if _checked("use_kv_parallelism_in_fused_na", mode) and NattenContext.deterministic:
        raise RuntimeError("KV parallelism excludes natten.use_deterministic_algorithms(): switch one of them off")
    if mode and torch.are_deterministic_algorithms_enabled():
        warnings.warn("KV parallelism stays off: torch.use_deterministic_algorithms is on", stacklevel=2)
        return
    NattenContext.kv_parallelism = mode


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    return NattenContext.kv_parallelism


def set_memory_usage_preference(pref: str = "default") -> None:
    """Accepted for the original's clients: "default", "strict" or "unrestricted"."""
    names = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if pref not in names:
        raise ValueError(f"memory usage preference is {pref!r}: give one of {', '.join(map(repr, names))}")
    NattenContext.memory_preference = names[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    return NattenContext.memory_preference


def is_memory_usage_default() -> bool:
    return NattenContext.memory_preference is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return NattenContext.memory_preference is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return NattenContext.memory_preference is MemoryUsagePreference.Unrestricted


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Accepted for the original's clients: a `flex-*` backend is served by our engines, which need no compiler."""
    NattenContext.flex_compile = _checked("allow_flex_compile", mode)
    NattenContext.flex_compile_backprop = _checked("allow_flex_compile", backprop)


def allow_flex_compile_backprop(mode: bool = True) -> None:
    NattenContext.flex_compile_backprop = _checked("allow_flex_compile_backprop", mode)


def disable_flex_compile() -> None:
    NattenContext.flex_compile = False


def disable_flex_compile_backprop() -> None:
    NattenContext.flex_compile_backprop = False


def is_flex_compile_allowed() -> bool:
    return NattenContext.flex_compile


def is_flex_compile_backprop_allowed() -> bool:
    return NattenContext.flex_compile_backprop
