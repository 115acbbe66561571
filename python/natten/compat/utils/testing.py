# SPDX-License-Identifier: MIT
"""Eras 0.17 to 0.21: decorators for tests of unittest. They skip for hardware that is absent, for nothing else;
only the extended tests wait for NATTEN_RUN_EXTENDED_TESTS, as their name says.
"""

import functools

from .. import _environment
from ..legacy_context import has_cuda, has_fp64_gemm, has_gemm
from .device import get_device_cc


def _skip_unless(condition, reason):
    def skip_if():
        def decorator(test):
            @functools.wraps(test)
            def wrapper(self, *arguments, **options):
                if not condition():
                    self.skipTest(reason)
                return test(self, *arguments, **options)

            return wrapper

        return decorator

    return skip_if


def _always() -> bool:
    return True


skip_if_cuda_is_not_supported = _skip_unless(has_cuda, "there is no CUDA GPU that natten has an engine for")
skip_if_gemm_is_not_supported = _skip_unless(has_gemm, "there is no CUDA GPU with tensor cores")
skip_if_gemm_does_not_support_double_precision = _skip_unless(has_fp64_gemm, "there is no CUDA GPU of sm_80 or newer")
skip_if_hopper_kernels_not_supported = _skip_unless(
    lambda: has_cuda() and get_device_cc() // 10 == 9, "there is no Hopper GPU"
)
skip_if_blackwell_kernels_not_supported = _skip_unless(
    lambda: has_cuda() and get_device_cc() // 10 == 10, "there is no Blackwell GPU"
)
skip_if_fna_is_not_supported = _skip_unless(_always, "")
skip_if_flex_is_not_supported = _skip_unless(_always, "")
skip_if_flex_compile_is_not_supported = _skip_unless(_always, "")
skip_if_nested_is_not_supported = _skip_unless(_always, "")
skip_if_libnatten_is_not_supported = _skip_unless(_always, "")
skip_if_not_running_extended_tests = _skip_unless(
    lambda: _environment._RUN_EXTENDED_TESTS, "NATTEN_RUN_EXTENDED_TESTS is not set"
)


def supports_float16(device) -> bool:
    return True


def supports_bfloat16(device) -> bool:
    return True
