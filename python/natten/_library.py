# SPDX-License-Identifier: MIT
"""Finds libnatten.so, loads its ops into torch and wraps its few plain C functions.

Nothing here raises at import time: without the library `HAS_LIBNATTEN` is False, `REASON` says why, and `refuse` stands
in for every op. The C functions are reached by ctypes, only when somebody asks (info, plans, pair counts).
"""

import contextlib
import ctypes
import functools
import json
import os
from pathlib import Path

import torch

from ._geometry import in_full

NAMESPACE = "natten"  # a hub build, which may live beside an installed copy, changes this one word
_HOW_TO_BUILD = (
    "install it with `pip install .` in the source tree, or build it with "
    "`cmake --preset dev && cmake --build --preset dev` and set NATTEN_LIBRARY=build/dev/libnatten.so"
)
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def _load(path: Path) -> str:
    """Loads the library; returns why it could not, or ''."""
    # NOTE: two libraries that define one op namespace end the process inside dlopen, where no exception gets out.
    if hasattr(getattr(torch.ops, NAMESPACE), "na_fwd"):
        return f"another copy of it has already registered the ops torch.ops.{NAMESPACE} in this process"
    if not path.is_file():
        return f"there is no file {path}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        return f"{path} does not load ({cause})"
    return ""


PATH = Path(os.environ.get("NATTEN_LIBRARY") or Path(__file__).with_name("libnatten.so")).absolute()
REASON = _load(PATH)
HAS_LIBNATTEN = not REASON


def refuse(*args, **kwargs):
    """Stands in for every op when there is no library."""
    raise RuntimeError(f"natten's native library is not loaded: {REASON}; {_HOW_TO_BUILD}")


def _op(name: str):
    return getattr(getattr(torch.ops, NAMESPACE), name).default if HAS_LIBNATTEN else refuse


NA_FWD, NA_BWD, KEY_SPANS = _op("na_fwd"), _op("na_bwd"), _op("key_spans")
NA_VARLEN_FWD, NA_VARLEN_BWD = _op("na_varlen_fwd"), _op("na_varlen_bwd")
NA_QK, NA_QK_BWD, NA_AV, NA_AV_BWD = _op("na_qk"), _op("na_qk_bwd"), _op("na_av"), _op("na_av_bwd")


@functools.cache
def _c_functions() -> ctypes.CDLL:
    if not HAS_LIBNATTEN:
        refuse()
    library = ctypes.CDLL(str(PATH))  # the copy that torch has loaded, not a second one
    sizes, flags = ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int32)
    library.natten_info.argtypes = []
    library.natten_info.restype = ctypes.c_char_p
    library.natten_num_pairs.argtypes = [ctypes.c_int, sizes, sizes, sizes, sizes, flags]
    library.natten_num_pairs.restype = ctypes.c_int64
    library.natten_key_spans.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_int, sizes]
    library.natten_key_spans.restype = None
    numbers = [ctypes.c_int] * 6
    library.natten_list_plans.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, *[sizes] * 4, flags, *numbers
    ]  # fmt: skip
    library.natten_list_plans.restype = ctypes.c_char_p
    return library


def _cut(number) -> int:
    """Into the range of a C int, whose ends the core refuses: a huge number must not come back as a small one."""
    return max(-(2**31), min(int(number), 2**31 - 1))


def _axes(extent, *axes):
    rank = len(extent)
    window, stride, dilation, causal = in_full(*axes)
    sizes = [(ctypes.c_int64 * rank)(*(_cut(x) for x in xs)) for xs in (extent, window, stride, dilation)]
    return rank, *sizes, (ctypes.c_int32 * rank)(*(int(x) for x in causal))


def info() -> dict:
    """What the library says of itself: version, instruction set in use, backends and why one is off."""
    return json.loads(_c_functions().natten_info())


def num_pairs(extent, window, stride, dilation, causal) -> int:
    """Query-key pairs of one sample and head, exact for every parameter; additional keys are not counted."""
    return _c_functions().natten_num_pairs(*_axes(extent, window, stride, dilation, causal))


def key_spans(extent: int, window: int, stride: int, dilation: int, causal: bool) -> list[list[int]]:
    """What the op `key_spans` gives, as numbers: for each token of an axis its first key and how many there are.
    The axis must be that of a valid problem, see `plans`."""
    rows = (ctypes.c_int64 * (2 * extent))()
    _c_functions().natten_key_spans(extent, window, stride, dilation, causal, rows)
    return [[rows[2 * i], rows[2 * i + 1]] for i in range(extent)]


def plans(backward: bool, device: torch.device, dtype: torch.dtype, geometry: tuple, numbers: tuple) -> dict:
    """{"plans": [...], "rejections": [{"name", "reason"}, ...]} of a problem, best plan first, or {"error"}. Any device
    but CUDA stands for the CPU.

    geometry: (extent, window, stride, dilation, causal). numbers: (heads, heads_kv, head_dim, head_dim_v, additional
    keys, whether there is a bias).
    """
    if dtype not in _DTYPES:
        raise NotImplementedError(f"natten has no engine for {dtype}: use one of {', '.join(_DTYPES.values())}")
    on_cuda = device.type == "cuda"
    arguments = int(backward), on_cuda, _DTYPES[dtype].encode(), *_axes(*geometry), *(_cut(x) for x in numbers)
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        return json.loads(_c_functions().natten_list_plans(*arguments))
