# SPDX-License-Identifier: MIT
"""Era 0.17: the extension module, as far as code outside of the original called it. `natten._libnatten` is the same."""

import torch

from .legacy_context import (
    has_cuda,
    has_gemm,
    is_gemm_na_enabled,
    is_tf32_in_gemm_na_enabled,
    is_tiled_na_enabled,
    use_gemm_na,
    use_tf32_in_gemm_na,
    use_tiled_na,
)

__all__ = ["compute_delta", "has_cuda", "has_gemm", "get_gemm_na", "get_gemm_tf32", "get_tiled_na", "set_gemm_na",
           "set_gemm_tf32", "set_tiled_na"]  # fmt: skip

get_tiled_na, set_tiled_na = is_tiled_na_enabled, use_tiled_na
get_gemm_na, set_gemm_na = is_gemm_na_enabled, use_gemm_na
get_gemm_tf32, set_gemm_tf32 = is_tf32_in_gemm_na_enabled, use_tf32_in_gemm_na


def compute_delta(out: torch.Tensor, d_out: torch.Tensor, delta: torch.Tensor) -> None:
    """Writes sums over the last axis of out * d_out into `delta`; computed in its type, float32 at least."""
    if out.shape != d_out.shape or delta.shape != out.shape[:-1]:
        raise ValueError(
            f"compute_delta expects out and d_out of one shape and delta without its last axis, got {list(out.shape)}, "
            f"{list(d_out.shape)} and {list(delta.shape)}"
        )
    kept = torch.float64 if delta.dtype == torch.float64 else torch.float32
    delta.copy_((out.to(kept) * d_out.to(kept)).sum(-1))
