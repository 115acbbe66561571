# SPDX-License-Identifier: MIT
"""Where the names of older releases come from: modules of the folder `compat`, each loaded when it is first asked for.

The folder is part of the package's path, so `natten.nested` is compat/nested.py. Its modules stand on the public API;
nothing outside knows them, but for the tables below and three `__getattr__`.
"""

import importlib
from pathlib import Path

FOLDER = str(Path(__file__).with_name("compat"))

# Names of the package itself, by the module that has them.
TOP_LEVEL = {
    "legacy_modules": (
        "LegacyNeighborhoodAttention",
        "LegacyNeighborhoodAttention2D",
        "NeighborhoodAttention",
    ),
    "legacy_context": (
        "disable_autotuner",
        "disable_gemm_na",
        "disable_tf32",
        "disable_tiled_na",
        "enable_gemm_na",
        "enable_tf32",
        "enable_tiled_na",
        "force_flex_attention",
        "has_bfloat",
        "has_cuda",
        "has_fna",
        "has_fp32_gemm",
        "has_fp64_gemm",
        "has_fused_na",
        "has_gemm",
        "has_half",
        "has_tf32_gemm",
        "is_autotuner_enabled",
        "is_autotuner_enabled_for_backward",
        "is_autotuner_enabled_for_forward",
        "is_autotuner_thorough_for_backward",
        "is_autotuner_thorough_for_forward",
        "is_fna_enabled",
        "is_fused_na_enabled",
        "is_gemm_na_enabled",
        "is_tf32_in_gemm_na_enabled",
        "is_tiled_na_enabled",
        "use_autotuner",
        "use_flex_attention",
        "use_fna",
        "use_fused_na",
        "use_gemm_na",
        "use_tf32_in_gemm_na",
        "use_tiled_na",
    ),
    "backends.configs": tuple(
        f"get_{pass_}configs_for_{engine}_{kind}"
        for pass_ in ("", "bwd_")
        for engine in ("cutlass", "cutlass_hopper", "cutlass_blackwell", "flex")
        for kind in ("fmha", "fna")
        if (pass_, engine) != ("bwd_", "flex")
    ),
}
_HOME = {name: module for module, names in TOP_LEVEL.items() for name in names}
# Modules that the original imported by itself: `import natten; natten.X.y` found them.
_SUBMODULES = ("backends", "flops", "libnatten", "nested", "ops", "token_permute", "types", "utils")


def finder(module: str, home: str):
    """The `__getattr__` of `module` for the names that the legacy module `home` lists in `__all__`."""

    def __getattr__(name: str):
        if not name.startswith("_"):
            legacy = importlib.import_module("." + home, module.rpartition(".")[0])
            if name in legacy.__all__:
                return getattr(legacy, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def names() -> list[str]:
    """Everything that `attribute` finds."""
    return [*_HOME, *_SUBMODULES]


def attribute(package: str, name: str):
    """`natten.name` for a name of an older release."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{package}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{package}.{_HOME[name]}"), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
