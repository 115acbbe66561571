# SPDX-License-Identifier: MIT
"""The tuning arguments of the original: which engine, which tiles. Engines map to plans of ours; the rest is checked
for its form and then ignored, because our plans have no such knob. None of them changes a result.
"""

import enum
import inspect
from collections.abc import Mapping

import torch

from ._arguments import flag, integers
from ._errors import WrongType

_SCHEDULES = ("non", "coop", "pp")
_ORIGINAL = tuple(
    f"{engine}-{kind}" for engine in ("cutlass", "hopper", "blackwell", "flex") for kind in ("fna", "fmha")
)
_OWN = ("cpu", "portable", "sm90", "reference", "cuda-reference")
_CAPABILITY = {"hopper": 9, "blackwell": 10, "sm90": 9}  # the major compute capability that an engine needs


def _tile(name, value, rank):
    if value is not None and min(integers(name, value, rank)) < 1:
        raise ValueError(f"{name} is {value}: every size must be at least 1")


def _tile_size(name, value, rank):
    _tile(name, value, 1)


def _flag(name, value, rank):
    if value is not None:
        flag(name, value)


def _schedule(name, value, rank):
    if value is None or value in _SCHEDULES or isinstance(value, enum.Enum):
        return
    raise ValueError(f"{name} is {value!r}: give one of {', '.join(map(repr, _SCHEDULES))}, or None")


def _attention_kwargs(name, value, rank):
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise WrongType(f"{name} must be a dict or None, got {type(value).__name__}")
    for key in value:
        if key != "backend" and key not in DENSE_TUNING:
            raise ValueError(f"{name} has the key {key!r}: only the tuning arguments of natten.attention belong there")
    check({key: x for key, x in value.items() if key != "backend"}, 1, DENSE_TUNING)
    if value.get("backend") is not None:
        check_backend_name(value["backend"])


# Name of the argument: its default in the original, and what checks its form.
TUNING = {
    "attention_kwargs": (None, _attention_kwargs),
    "q_tile_shape": (None, _tile),
    "kv_tile_shape": (None, _tile),
    "backward_q_tile_shape": (None, _tile),
    "backward_kv_tile_shape": (None, _tile),
    "backward_kv_splits": (None, _tile),
    "backward_use_pt_reduction": (False, _flag),
    "run_persistent_kernel": (True, _flag),
    "kernel_schedule": (None, _schedule),
    "torch_compile": (False, _flag),
}
DENSE_TUNING = {
    "q_tile_size": (None, _tile_size),
    "kv_tile_size": (None, _tile_size),
    "backward_q_tile_size": (None, _tile_size),
    "backward_kv_tile_size": (None, _tile_size),
    "backward_kv_splits": (None, _tile_size),
    **{name: TUNING[name] for name in ("backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule")},
    "torch_compile": (False, _flag),
}


def check(arguments: dict, rank: int, table: dict, function: str = "attention") -> None:
    """Checks the form of tuning arguments; one that `table` does not know is a TypeError, as in any call."""
    for name, value in arguments.items():
        if name not in table:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if name == "kernel_schedule" or value is not table[name][0]:
            table[name][1](name, value, rank)


def with_signature_of(implementation):
    """Lets `inspect.signature` (help, editors) show what `**options` stands for: the arguments of `implementation`
    behind its first two, and the tuning arguments."""

    def decorate(function):
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [p for p in inspect.signature(implementation).parameters.values() if p.kind is not p.VAR_KEYWORD][2:]
        shown = [inspect.Parameter(name, keyword, default=default) for name, (default, _) in TUNING.items()]
        function.__signature__ = inspect.Signature(own + shown)
        return function

    return decorate


def check_backend_name(backend) -> None:
    if not isinstance(backend, str):
        raise WrongType(f"backend must be a string or None, got {type(backend).__name__}")
    if backend not in _ORIGINAL and backend not in _OWN:
        names = ", ".join(map(repr, _OWN + _ORIGINAL))
        raise ValueError(f"backend {backend!r} is unknown: give one of {names}, or None for the best one")


def tf32_is_allowed() -> bool:
    """Whether torch's own products of float32 matrices on CUDA may be in TF32, by any of its switches."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# NOTE: private; what torch.compiler.assume_constant_result does, but that would import Dynamo. Dynamo cannot trace the
# question; the answer stays true, for every graph is guarded by that switch.
tf32_is_allowed._dynamo_marked_constant = True


def plan_of(backend, plan, query: torch.Tensor) -> str:
    """The plan that the op is given: '' for the best one.

    `backend` is a name of the original or one of ours; one that cannot run on the device of `query` raises ValueError.
    `plan` is a plan or a prefix of one, see `natten.list_plans`; without it, TF32 is preferred where torch allows it.
    """
    if plan is not None and not isinstance(plan, str):
        raise WrongType(f"plan must be a string or None, got {type(plan).__name__}")
    engine = "" if backend is None else _engine_of(backend, query.device)
    if not plan:
        prefers_tf32 = query.is_cuda and query.dtype == torch.float32 and tf32_is_allowed()
        return engine + "+tf32" if prefers_tf32 else engine
    if engine and plan.split("/")[0] != engine:
        raise ValueError(f"backend {backend!r} and plan {plan!r} name different engines: give one of them")
    return plan


def _engine_of(backend, device: torch.device) -> str:
    check_backend_name(backend)
    if backend == "reference" and device.type == "cuda":
        backend = "cuda-reference"
    engine = backend.split("-")[0]
    needed = "cpu" if engine == "cpu" else None if engine in ("flex", "reference") else "cuda"
    if needed is not None and device.type != needed:
        tensors = "CPU" if needed == "cpu" else "CUDA"
        raise ValueError(
            f"backend {backend!r} cannot run this call: it needs {tensors} tensors, but query is on {device}"
        )
    if engine in _CAPABILITY:
        _check_capability(backend, _CAPABILITY[engine], device)
    return "portable" if engine == "cutlass" else backend if backend in _OWN else ""


def _check_capability(backend: str, needed: int, device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if major != needed:
        raise ValueError(
            f"backend {backend!r} cannot run this call: it needs compute capability {needed}.x, "
            f"but {device} has {major}.{minor}"
        )
