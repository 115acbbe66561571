# SPDX-License-Identifier: MIT
"""The form of arguments: types, lengths, defaults. What values mean together (windows against extents, strides against
windows, heads against key heads) is checked once, in the core.

WrongType: a wrong type. ValueError: a wrong length or value. NotImplementedError: a tensor that no engine takes.
"""

import torch

from ._errors import WrongType

AXES = {1: ("x",), 2: ("y", "x"), 3: ("z", "y", "x")}  # as the core calls them, slowest first
_INT64 = 2**63
_NUMBERS = (int, bool)
_BOOLEANS = ("bool", "bool_")  # Python's and numpy's
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _is_sequence(value) -> bool:
    if isinstance(value, int | torch.SymInt):  # first, and not by an attribute: Dynamo can say only this of a SymInt
        return False
    if isinstance(value, list | tuple):  # torch.Size is a tuple
        return True
    if isinstance(value, str | bytes | torch.Tensor) or getattr(value, "ndim", 1) == 0:  # numpy's numbers have ndim 0
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _per_axis(name: str, value, rank: int, convert) -> list:
    """One entry per axis of `value`, which is an entry for all axes or a sequence of them."""
    if type(value) in _NUMBERS or not _is_sequence(value):
        return [convert(name, value)] * rank
    if len(value) != rank:
        axes = ", ".join(AXES[rank])
        raise ValueError(
            f"{name} has length {len(value)} but the grid has {rank} axes ({axes}): give one entry per axis"
        )
    return [convert(name, x) for x in value]


def integer(name: str, value):
    if type(value) is int and -_INT64 <= value < _INT64:  # nearly always, and the sooner the better
        return value
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        if -_INT64 <= value < _INT64:
            return value
        raise ValueError(f"{name} {value} is out of range")
    # What else has an __index__ is an integer of numpy. A tensor has one too, but would synchronise with its device.
    if isinstance(value, bool | torch.Tensor) or type(value).__name__ in _BOOLEANS or not hasattr(value, "__index__"):
        raise WrongType(f"{name} must be an integer or a sequence of integers, got {_shown(value)}")
    return int(value)  # and not operator.index, which Dynamo cannot follow


def _boolean(name: str, value) -> bool:
    if value is True or value is False:
        return value
    if not isinstance(value, bool) and type(value).__name__ not in _BOOLEANS:
        raise WrongType(f"{name} must be a bool or a sequence of bools, got {_shown(value)}")
    return bool(value)


def _shown(value) -> str:
    plain = value is None or isinstance(value, bool | int | float | str | bytes)
    return f"{value!r:.60}" if plain else type(value).__name__


def integers(name: str, value, rank: int, default: int | None = 1) -> list:
    """One per axis; None is the default, or where there is none a wrong type."""
    return [default] * rank if value is None and default is not None else _per_axis(name, value, rank, integer)


def booleans(name: str, value, rank: int) -> list[bool]:
    """Causal flags; None is False."""
    return [False] * rank if value is None else _per_axis(name, value, rank, _boolean)


def scale_or_default(scale, head_dim):
    """The factor of the logits; zero means zero."""
    if scale is None:
        return head_dim**-0.5 if head_dim > 0 else 1.0
    if isinstance(scale, float | torch.SymFloat):
        return scale
    if not isinstance(scale, bool | torch.Tensor | str) and hasattr(scale, "__float__"):
        return float(scale)
    raise WrongType(f"scale must be a number or None, got {_shown(scale)}")


def probability(name: str, value) -> float:
    if isinstance(value, bool | torch.Tensor | str) or not hasattr(value, "__float__"):
        raise WrongType(f"{name} must be a number, got {_shown(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} must be at least 0 and at most 1")
    return float(value)


def flag(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise WrongType(f"{name} must be a bool, got {_shown(value)}")
    return value


def dense_tensor(name: str, x, function: str, axes: tuple[str, ...]) -> None:
    """Demands a dense tensor of the element types that engines know, with the axes named."""
    if not isinstance(x, torch.Tensor):
        raise WrongType(f"{function} expects {name} to be a torch.Tensor, got {_shown(x)}")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else "sparse"
        raise NotImplementedError(f"{function} takes dense tensors, but {name} is {kind}: convert it first")
    if x.dim() != len(axes):
        raise ValueError(
            f"{function} expects {name} to have {len(axes)} dimensions [{', '.join(axes)}], got {x.dim()}: {_shape(x)}"
        )


def are_plain(dims: int, query, key, value) -> bool:
    """Whether every check below would pass, as nearly always: dense tensors of `dims` dimensions that agree in an
    engine's dtype and in device, with unit last strides. False means only that they have to be looked at one by one."""
    if not type(query) is type(key) is type(value) is torch.Tensor:
        return False
    return (
        query.dtype is key.dtype is value.dtype
        and query.dtype in DTYPES
        and query.device == key.device == value.device
        and query.layout is key.layout is value.layout is torch.strided
        and not (query.is_nested or key.is_nested or value.is_nested)
        and query.dim() == key.dim() == value.dim() == dims
        and (query.is_contiguous() or query.stride(-1) == 1)  # NOTE: no loop, no generator: 0.3 us
        and (key.is_contiguous() or key.stride(-1) == 1)
        and (value.is_contiguous() or value.stride(-1) == 1)
    )


def tensors_agree(function: str, first: tuple[str, torch.Tensor], *others: tuple[str, torch.Tensor | None]) -> None:
    """Demands one dtype and one device."""
    name, x = first
    if x.dtype not in DTYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in DTYPES)
        raise NotImplementedError(f"{function} has no engine for {x.dtype} ({name}): use one of {names}")
    for other, y in others:
        if y is None:
            continue
        if y.dtype != x.dtype:
            raise ValueError(
                f"{function} needs one dtype, but {name} is {x.dtype} and {other} is {y.dtype}: "
                "cast them, or call under torch.autocast"
            )
        if y.device != x.device:
            raise ValueError(
                f"{function} needs one device, but {name} is on {x.device} and {other} on {y.device}: move one of them"
            )


def same_sizes(function: str, names: tuple[str, str], x, y, axes: tuple[tuple[str, int], ...]) -> None:
    """Demands that `x` and `y` have the same size along every one of `axes`, each a name and a dimension."""
    for axis, dim in axes:
        if x.shape[dim] != y.shape[dim]:
            raise ValueError(
                f"{function} needs one size of {axis}, but {names[0]} has {x.shape[dim]} {_shape(x)} "
                f"and {names[1]} has {y.shape[dim]} {_shape(y)}"
            )


def _shape(x: torch.Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"


def autocast(query, *others):
    """Under torch.autocast all but float64 tensors in its dtype."""
    # NOTE: here and not at an Autocast dispatch key: three public calls, and Dynamo traces them.
    if not is_autocast(query):
        return query, *others
    dtype = torch.get_autocast_dtype(query.device.type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (query, *others))


def is_autocast(query) -> bool:
    kind = "cpu" if query.is_cpu else query.device.type  # the latter makes a string, 0.3 us
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which it refuses to answer for meta


def with_unit_last_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x`, copied if its last axis is not dense in memory: all that an engine asks of a tensor's strides."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
