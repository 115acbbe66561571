# SPDX-License-Identifier: MIT
"""Era 0.21: where `natten.libnatten` of 0.17 went."""

from .libnatten import compute_delta, has_cuda

__all__ = ["compute_delta", "has_cuda"]
