# SPDX-License-Identifier: MIT
"""Era 0.21: environment variables, read once. Those of the build have no meaning here; CMake has its own."""

import os

__all__ = ["DISABLE_TQDM", "TOKPERM_DEFAULT_IMPL", "USE_TORCH_OPS"]


def _switch(name: str, default: bool = False) -> bool:
    value = os.environ.get(name)
    return default if value is None else value.strip().lower() not in ("", "0", "false", "off", "no")


_RUN_EXTENDED_TESTS = _switch("NATTEN_RUN_EXTENDED_TESTS")
_RUN_FLEX_TESTS = _switch("NATTEN_RUN_FLEX_TESTS", default=True)
_RUN_ADDITIONAL_KV_TESTS = _switch("NATTEN_RUN_ADDITIONAL_KV_TESTS", default=True)
_NUM_RAND_SWEEP_TESTS = int(os.environ.get("NATTEN_RAND_SWEEP_TESTS") or 1000)
USE_TORCH_OPS = True  # NOTE: NATTEN_DISABLE_TORCH_OPS has no effect: there is no other way to our kernels
DISABLE_TQDM = _switch("NATTEN_DISABLE_TQDM")
TOKPERM_DEFAULT_IMPL = os.environ.get("NATTEN_TOKPERM_DEFAULT_IMPL") or "torch"
