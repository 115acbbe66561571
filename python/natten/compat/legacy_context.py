# SPDX-License-Identifier: MIT
"""Eras 0.15 to 0.17: switches and questions about the GPU, as `natten.X` and `natten.context.X`.

Every switch is kept, checked and readable, and none changes a result: modules are always fused here, engines are chosen
by plan, and nothing is tuned by trial. `has_*` tell what can run: half types everywhere, since the CPU engine has them;
the rest asks for the GPU that it asked for.
"""

import warnings

import torch

from . import _library
from ._arguments import flag
from ._legacy import TOP_LEVEL
from .context import AutotunerContext, NattenContext, use_kv_parallelism_in_fused_na
from .utils.log import get_logger

__all__ = list(TOP_LEVEL["legacy_context"])


_log = get_logger("natten.context")


def _accepted(switch: str, value) -> None:
    _log.debug("%s(%s): accepted, and changes no result here", switch, value)


def _switched_on(feature: str) -> bool:
    """Whether a feature that is not deterministic may be switched on; RuntimeError under natten's own mode."""
    if NattenContext.deterministic:
        raise RuntimeError(f"{feature} excludes natten.use_deterministic_algorithms(): switch one of them off")
    if torch.are_deterministic_algorithms_enabled():
        warnings.warn(f"{feature} stays off: torch.use_deterministic_algorithms is on", stacklevel=3)
        return False
    return True


# --- fused operators in modules --------------------------------------------------------------------------------------


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    """Modules are fused here with and without it. Switching it on also sets KV parallelism, as it did."""
    flag("use_flex_attention", use_flex_attention), flag("force_flex_attention", force_flex_attention)
    flag("kv_parallel", kv_parallel)
    NattenContext.fused = flag("mode", mode)
    _accepted("use_fused_na", mode)
    if mode:
        use_kv_parallelism_in_fused_na(kv_parallel)


def is_fused_na_enabled() -> bool:
    return NattenContext.fused


use_fna, is_fna_enabled = use_fused_na, is_fused_na_enabled


def use_flex_attention(mode: bool = True) -> None:
    """Accepted: no FlexAttention is needed here (0.17.5)."""
    flag("mode", mode)


force_flex_attention = use_flex_attention

# --- kernels of the unfused operators --------------------------------------------------------------------------------


def use_tiled_na(mode: bool = True) -> None:
    NattenContext.tiled = flag("mode", mode)
    _accepted("use_tiled_na", mode)


def use_gemm_na(mode: bool = True) -> None:
    NattenContext.gemm = flag("mode", mode)
    _accepted("use_gemm_na", mode)


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    """Accepted: float32 is computed in float32 here."""
    NattenContext.tf32_in_gemm = flag("mode", mode)
    _accepted("use_tf32_in_gemm_na", mode)


def is_tiled_na_enabled() -> bool:
    return NattenContext.tiled


def is_gemm_na_enabled() -> bool:
    return NattenContext.gemm


def is_tf32_in_gemm_na_enabled() -> bool:
    return NattenContext.tf32_in_gemm


def enable_tiled_na() -> None:
    use_tiled_na(True)


def disable_tiled_na() -> None:
    use_tiled_na(False)


def enable_gemm_na() -> None:
    use_gemm_na(True)


def disable_gemm_na() -> None:
    use_gemm_na(False)


def enable_tf32() -> None:
    use_tf32_in_gemm_na(True)


def disable_tf32() -> None:
    use_tf32_in_gemm_na(False)


# --- the autotuner ---------------------------------------------------------------------------------------------------


def use_autotuner(
    forward_pass=None,
    backward_pass=None,
    thorough_mode_forward=None,
    thorough_mode_backward=None,
    warmup_steps_forward=None,
    warmup_steps_backward=None,
    steps_forward=None,
    steps_backward=None,
) -> None:
    """Accepted: nothing is tuned by trial here. None leaves a setting as it is.

    Raises RuntimeError when it would switch on under `use_deterministic_algorithms`, ValueError for wrong types.
    """
    booleans = {
        "forward": forward_pass,
        "backward": backward_pass,
        "thorough_forward": thorough_mode_forward,
        "thorough_backward": thorough_mode_backward,
    }
    counts = {
        "warmup_steps_forward": warmup_steps_forward,
        "warmup_steps_backward": warmup_steps_backward,
        "steps_forward": steps_forward,
        "steps_backward": steps_backward,
    }
    for name, value in booleans.items():
        if value is not None:
            flag(name, value)
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
    if (forward_pass or backward_pass) and not _switched_on("the autotuner"):
        return
    for name, value in (booleans | counts).items():
        if value is not None:
            setattr(AutotunerContext, name, value)


def disable_autotuner() -> None:
    use_autotuner(False, False, False, False)


def is_autotuner_enabled_for_forward() -> bool:
    return AutotunerContext.forward


def is_autotuner_enabled_for_backward() -> bool:
    return AutotunerContext.backward


def is_autotuner_enabled() -> bool:
    return AutotunerContext.forward or AutotunerContext.backward


def is_autotuner_thorough_for_forward() -> bool:
    return AutotunerContext.forward and AutotunerContext.thorough_forward


def is_autotuner_thorough_for_backward() -> bool:
    return AutotunerContext.backward and AutotunerContext.thorough_backward


# --- what can run ----------------------------------------------------------------------------------------------------


def _capability(device_index=None) -> int:
    """10 * major + minor of a GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def has_cuda() -> bool:
    """Whether the library has an engine for CUDA and torch a GPU."""
    if not _library.HAS_LIBNATTEN or not torch.cuda.is_available():
        return False
    return any(
        backend["available"] for backend in _library.info()["backends"] if backend["name"] in ("portable", "sm90")
    )


def has_half(device_index=None) -> bool:
    return _library.HAS_LIBNATTEN


def has_bfloat(device_index=None) -> bool:
    return _library.HAS_LIBNATTEN


def has_fused_na(device_index=None) -> bool:
    return _library.HAS_LIBNATTEN


has_fna = has_fused_na


def has_gemm(device_index=None) -> bool:
    return has_cuda() and _capability(device_index) >= 70


def has_tf32_gemm(device_index=None) -> bool:
    return has_cuda() and _capability(device_index) >= 80


has_fp32_gemm = has_fp64_gemm = has_tf32_gemm
