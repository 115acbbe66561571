# SPDX-License-Identifier: MIT
"""The four lists of configurations of a backend, in the form that the backend gave them."""

from ..._tuning import plan_of

TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
SIZE = 64


def runs(backend, tensor) -> bool:
    """Whether `backend` can run on the device of `tensor`."""
    try:
        plan_of(backend, None, tensor)
    except ValueError:
        return False
    return True


def finder(backend, form):
    """A function of a tensor: [form(rank)] or []."""

    def get_all_configs(input_tensor):
        return [form(input_tensor.dim() - 3)] if runs(backend, input_tensor) else []

    return get_all_configs


def tiles(rank):
    return TILES[rank], TILES[rank]


def sizes(rank):
    return SIZE, SIZE
