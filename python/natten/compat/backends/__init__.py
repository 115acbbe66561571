# SPDX-License-Identifier: MIT
"""Era 0.21: backends of the original by their names. Which of ours stands behind each: natten.functional, `backend`."""

from .. import _arguments as _args
from .. import functional as _functional
from .._tuning import plan_of as _plan_of
from .configs import *  # noqa: F403

_ENGINES = ("blackwell", "hopper", "cutlass", "flex")  # in the order of preference
_PREFIXES = {"cutlass": "cutlass", "hopper": "cutlass_hopper", "blackwell": "cutlass_blackwell"}


def _can_run(backend, query, key, value, raise_error=False) -> bool:
    try:
        _args.tensors_agree(backend, ("query", query), ("key", key), ("value", value))
        _plan_of(backend, None, query)
    except (ValueError, NotImplementedError):
        if raise_error:
            raise
        return False
    return True


def get_compatible_backends(query, key, value, torch_compile=False) -> list[str]:
    """Names of backends that can run na1d, na2d and na3d on these tensors, best first."""
    return [f"{e}-fna" for e in _ENGINES if _can_run(f"{e}-fna", query, key, value)]


def get_compatible_fmha_backends(query, key, value, is_causal=False, is_varlen=False, torch_compile=False) -> list[str]:
    """Names of backends that can run `attention` on these tensors, best first."""
    return [f"{e}-fmha" for e in _ENGINES if _can_run(f"{e}-fmha", query, key, value)]


def _first(names, query):
    if not names:
        raise NotImplementedError(f"natten has no backend for {query.dtype} tensors on {query.device}")
    return names[0]


def choose_backend(query, key, value, torch_compile=False) -> str:
    return _first(get_compatible_backends(query, key, value, torch_compile), query)


def choose_fmha_backend(query, key, value, is_causal=False, is_varlen=False, torch_compile=False) -> str:
    return _first(get_compatible_fmha_backends(query, key, value, is_causal, is_varlen, torch_compile), query)


def _predicate(backend):
    def can_run(query, key, value, *arguments, raise_error=False, **options):
        return _can_run(backend, query, key, value, raise_error)

    return can_run


def _fused(backend, name):
    function = getattr(_functional, name)

    def call(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, **options):
        geometry = {"stride": stride, "dilation": dilation, "is_causal": is_causal, "scale": scale}
        return function(query, key, value, kernel_size, **geometry, backend=backend, **options)

    return call


def _dense(backend):
    def call(query, key, value, is_causal=False, scale=None, **options):
        samples = {name: options.pop(name, None) for name in ("cumulative_seqlen_Q", "cumulative_seqlen_KV")}
        if samples["cumulative_seqlen_Q"] is not None:
            options |= samples
        else:
            options = {name: x for name, x in options.items() if not name.startswith("max_seqlen")}
        return _functional.attention(query, key, value, is_causal, scale, backend=backend, **options)

    return call


for _engine, _prefix in _PREFIXES.items():
    globals()[f"can_run_{_prefix}_fna"] = _predicate(f"{_engine}-fna")
    globals()[f"can_run_{_prefix}_fmha"] = _predicate(f"{_engine}-fmha")
    globals()[f"{_prefix}_fna_generic"] = _fused(f"{_engine}-fna", "neighborhood_attention_generic")
    globals()[f"{_prefix}_fmha"] = _dense(f"{_engine}-fmha")
    for _rank in (1, 2, 3):
        globals()[f"na{_rank}d_{_prefix}_fna"] = _fused(f"{_engine}-fna", f"na{_rank}d")
can_run_flex_attention = _predicate("flex-fna")
flex_fna_generic, flex_fmha = _fused("flex-fna", "neighborhood_attention_generic"), _dense("flex-fmha")
na1d_flex, na2d_flex, na3d_flex = (_fused("flex-fna", f"na{_rank}d") for _rank in (1, 2, 3))

__all__ = [name for name in globals() if not name.startswith("_")]
