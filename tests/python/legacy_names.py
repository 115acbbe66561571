# SPDX-License-Identifier: MIT
"""Every name that older releases had and that clients use, by era; and the register of what calls and compares them.

`tools/compat_report.py` prints it, test_legacy_names.py runs it. A name without a probe is a gap, and so is a probe
whose name does not exist.
"""

import importlib.util

RANKS = ("1", "2", "3")


def _each(template, *values):
    return [template.format(value) for value in values]


# Era -> names, after the package's own.
REQUIRED = {
    "0.11": [
        *_each("nattencuda{0}d.NeighborhoodAttention{0}D", "1", "2"),
        "nattentorch2d.LegacyNeighborhoodAttention2D",
        "LegacyNeighborhoodAttention2D",
        "NeighborhoodAttention",
        "LegacyNeighborhoodAttention",
        "nattencuda.NeighborhoodAttention",
        "nattentorch.LegacyNeighborhoodAttention",
        "nattencuda2d.NATTENQKRPBFunction",
        "nattencuda2d.NATTENAVFunction",
        "nattencuda1d.NATTEN1DQKRPBFunction",
        "nattencuda1d.NATTEN1DAVFunction",
        *_each("flops.{}", "qk_rpb_flop", "av_flop", "qk_1d_rpb_flop", "av_1d_flop"),
        *_each("extras.{}", "get_gflops", "get_imagenet_gflops", "get_mparams"),
        *_each("gradcheck{}d", "1", "2"),
    ],
    "0.14": [
        *_each("functional.natten{}dqkrpb", "1", "2"),
        *_each("functional.natten{}dqk", "1", "2"),
        *_each("functional.natten{}dav", "1", "2"),
        *_each("natten{0}d.NeighborhoodAttention{0}D", "1", "2"),
        *_each("NeighborhoodAttention{}D", *RANKS),
        *_each("flops.{}", "get_flops", "add_natten_handle"),
    ],
    "0.15": [
        "natten3d.NeighborhoodAttention3D",
        *_each("functional.natten3d{}", "qkrpb", "qk", "av"),
        *_each("functional.na{}d_qk", *RANKS),
        *_each("functional.na{}d_av", *RANKS),
        *_each("functional.na{}d_qk_with_bias", *RANKS),
        *_each("nested.na{}d_qk_nested", *RANKS),
        *_each("nested.na{}d_av_nested", *RANKS),
        *_each("has_{}", "cuda", "half", "bfloat", "gemm", "tf32_gemm", "fp32_gemm", "fp64_gemm"),
        *_each("enable_{}", "tf32", "tiled_na", "gemm_na"),
        *_each("disable_{}", "tf32", "tiled_na", "gemm_na"),
    ],
    "0.17": [
        *_each("na{0}d.NeighborhoodAttention{0}D", *RANKS),
        *_each("{}_deterministic_algorithms", "use"),
        "are_deterministic_algorithms_enabled",
        *_each("use_{}", "fused_na", "fna", "kv_parallelism_in_fused_na", "autotuner", "tiled_na", "gemm_na"),
        *_each("use_{}", "tf32_in_gemm_na", "flex_attention"),
        "force_flex_attention",
        *_each("is_{}_enabled", "fused_na", "fna", "kv_parallelism_in_fused_na", "autotuner", "tiled_na", "gemm_na"),
        "is_tf32_in_gemm_na_enabled",
        "disable_autotuner",
        *_each("is_autotuner_enabled_for_{}", "forward", "backward"),
        *_each("is_autotuner_thorough_for_{}", "forward", "backward"),
        *_each("has_{}", "fna", "fused_na"),
        *_each("{}et_memory_usage_preference", "s", "g"),
        *_each("is_memory_usage_{}", "default", "strict", "unrestricted"),
        *_each("context.{}", "NattenContext", "AutotunerContext", "MemoryUsagePreference", "use_fused_na", "has_cuda"),
        *_each("functional.NeighborhoodAttention{}DQKAutogradFunction", *RANKS),
        *_each("functional.NeighborhoodAttention{}DAVAutogradFunction", *RANKS),
        *_each("functional.FusedNeighborhoodAttention{}D", *RANKS),
        *_each("flops.qk_{}d_rpb_flop", "2", "3"),
        *_each("flops.av_{}d_flop", "2", "3"),
        *_each("flops.{}_flop_count", "fna", "na_qk", "na_av"),
        *_each("ops.{}", "qk_cross_forward", "qk_cross_backward", "av_cross_forward", "av_cross_backward"),
        *_each("types.Dimension{}DType", *RANKS),
        *_each("types.Dimension{}DTypeOrDed", *RANKS),
        *_each("types.CausalArg{}DType", *RANKS),
        *_each("types.CausalArg{}DTypeOrDed", *RANKS),
        *_each("types.{}", "FnaTileShapeType", "FnaForwardConfigType", "FnaBackwardConfigType", "NoneType"),
        *_each("types.{}", "create_dim_from_int", "create_causal_arg_from_bool"),
        *_each("utils.check_{}", "all_args", "kernel_size_arg", "dilation_arg", "causal_arg", "tiling_config"),
        *_each("utils.check_{}", "backward_tiling_config", "additional_keys", "additional_values"),
        *_each("utils.{}", "get_num_na_weights", "get_device_cc", "make_attn_tensor_from_input"),
        "utils.log.get_logger",
        *_each("utils.testing.skip_if_{}", "cuda_is_not_supported", "fna_is_not_supported", "gemm_is_not_supported"),
        "utils.testing.skip_if_gemm_does_not_support_double_precision",
        "utils.testing.skip_if_nested_is_not_supported",
        "autotuner.autotune_fna",
        *_each("libnatten.{}", "compute_delta", "has_cuda", "has_gemm", "get_tiled_na", "set_tiled_na", "get_gemm_na"),
        *_each("libnatten.{}", "set_gemm_na", "get_gemm_tf32", "set_gemm_tf32"),
        *_each("experimental.na{}d", *RANKS),
        *_each("experimental.na{}d_forward_op", *RANKS),
    ],
    "0.21": [
        *_each("na{}d", *RANKS),
        *_each("{}", "attention", "merge_attentions", "HAS_LIBNATTEN", "__version__"),
        "functional.neighborhood_attention_generic",
        *_each("{}allow_flex_compile", ""),
        *_each("{}", "allow_flex_compile_backprop", "disable_flex_compile", "disable_flex_compile_backprop"),
        *_each("is_flex_compile{}_allowed", "", "_backprop"),
        *_each("get_configs_for_{}_fmha", "cutlass", "cutlass_hopper", "cutlass_blackwell", "flex"),
        *_each("get_configs_for_{}_fna", "cutlass", "cutlass_hopper", "cutlass_blackwell", "flex"),
        *_each("get_bwd_configs_for_{}_fmha", "cutlass", "cutlass_hopper", "cutlass_blackwell"),
        *_each("get_bwd_configs_for_{}_fna", "cutlass", "cutlass_hopper", "cutlass_blackwell"),
        *_each("backends.{}", "choose_backend", "choose_fmha_backend"),
        *_each("backends.get_compatible_{}backends", "", "fmha_"),
        *_each("backends.can_run_{}_fna", "cutlass", "cutlass_hopper", "cutlass_blackwell"),
        "backends.can_run_flex_attention",
        *_each("backends.{}_fna_generic", "cutlass", "cutlass_hopper", "cutlass_blackwell", "flex"),
        *_each("backends.na{}d_cutlass_fna", *RANKS),
        *_each("backends.na{}d_cutlass_hopper_fna", *RANKS),
        *_each("backends.na{}d_cutlass_blackwell_fna", *RANKS),
        *_each("backends.na{}d_flex", *RANKS),
        *_each("backends.{}_fmha", "cutlass", "cutlass_hopper", "cutlass_blackwell", "flex"),
        *_each("backends.reference.na{}d_reference", *RANKS),
        "backends.reference.reference_fna_generic",
        *(
            f"backends.configs.{engine}.get_all_{kind}{pass_}_configs"
            for engine in ("cutlass", "cutlass_hopper", "cutlass_blackwell")
            for kind in ("", "fmha_")
            for pass_ in ("forward", "backward")
        ),
        "backends.configs.flex.FLEX_FORWARD_TILE_SHAPES",
        *_each("token_permute.token_{}_operation", "permute", "unpermute"),
        *_each("types.{}", "CausalArgType", "DimensionType", "KernelSchedule"),
        "utils.checks.check_all_args",
        "utils.dtype.is_fp8",
        *_each("utils.log.{}", "NattenLogger", "_get_log_pipe"),
        "utils.varlen.generate_varlen_parameters",
        *_each("utils.testing.skip_if_{}_not_supported", "blackwell_kernels", "hopper_kernels", "libnatten_is"),
        *_each("utils.testing.skip_if_flex{}_is_not_supported", "", "_compile"),
        "utils.testing.skip_if_not_running_extended_tests",
        *_each("utils.testing.supports_{}", "bfloat16", "float16"),
        *_each("_environment.{}", "_NUM_RAND_SWEEP_TESTS", "_RUN_FLEX_TESTS"),
        "_libnatten.compute_delta",
    ],
}


def resolve(name: str):
    """natten.<name>, by importing whatever part of it is a module."""
    path, found = "natten", importlib.import_module("natten")
    for part in name.split("."):
        path = f"{path}.{part}"
        if hasattr(found, "__path__") and importlib.util.find_spec(path):
            found = importlib.import_module(path)
        else:
            found = getattr(found, part)
    return found


PROBES: dict[str, object] = {}


def probe(*names):
    """Registers `check(name, object)` for names, written as a template and its values or in full."""

    def register(check):
        for name in names:
            assert name not in PROBES, name
            PROBES[name] = check
        return check

    return register


def era_of() -> dict[str, str]:
    """Name -> the first era that had it."""
    return {name: era for era, names in reversed(REQUIRED.items()) for name in names}


def results():
    """(era, name, what is wrong or '') for every name, in order."""
    import legacy_probes  # noqa: F401
    import legacy_probes_of_helpers  # noqa: F401
    import legacy_probes_of_switches  # noqa: F401

    eras = era_of()
    for name in [*eras, *(name for name in PROBES if name not in eras)]:
        problem = ""
        try:
            if name not in eras:
                problem = "has a probe but is not required"
            elif name not in PROBES:
                problem = "is never called"
            else:
                PROBES[name](name, resolve(name))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        yield eras.get(name, "?"), name, problem
