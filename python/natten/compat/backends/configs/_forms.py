# SPDX-License-Identifier: MIT
"""Our plans in the forms in which backends of the original gave their configurations: a plan is the tile of queries
that it works on, once for the queries and once in the place of the keys."""

from ..._tuning import plan_of
from ...plans import list_plans

_WINDOW = 7  # of the problem that is planned; the finders are not told one


def _tile_of(plan: str, rank: int) -> tuple:
    """(3, 56) of "cpu/sliding-avx512/q1x3x56" in two dimensions; ones for a plan that goes query by query."""
    last = plan.rsplit("/", 1)[-1]
    sizes = last.removeprefix("q").split("x") if last[1:2].isdigit() else []
    return tuple(int(n) for n in sizes[3 - rank :]) or (1,) * rank


def _tiles(backend, x, backward) -> list[tuple]:
    """Tiles of the plans that stand behind `backend` for tensors such as `x`, best first; none where it cannot run."""
    rank = x.dim() - 3
    window = -1 if backend.endswith("fmha") else [max(1, min(_WINDOW, n)) for n in x.shape[1:-2]]
    try:
        engine = plan_of(backend, None, x)
        plans = list_plans(x, x, x, window, backward=backward)
    except (ValueError, NotImplementedError):
        return []
    return list(dict.fromkeys(_tile_of(plan, rank) for plan in plans if plan.startswith(engine)))


def finder(backend, form, backward=False):
    """A function of a tensor: `form(tile)` for every plan."""

    def get_all_configs(input_tensor):
        return [form(tile) for tile in _tiles(backend, input_tensor, backward)]

    return get_all_configs


def tiles(tile):
    return tile, tile


def sizes(tile):
    return tile[0], tile[0]
