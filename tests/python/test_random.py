# SPDX-License-Identifier: MIT
"""Random problems against the dense reference, forward and backward, on every plan: whatever the other files forgot."""

import math

import cases
import pytest
from cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Few tokens and many heads are what a tensor with heads first looks like.
pytestmark = pytest.mark.filterwarnings("ignore:.*heads first")
MOST_PAIRS = 1_000_000  # tokens squared times heads and samples, so that the dense reference stays quick


@st.composite
def axes(draw, rank):
    """Extent, window, stride, dilation, causal per axis; windows may be larger than the axis."""
    extents, windows, strides, dilations, causal = [], [], [], [], []
    for _ in range(rank):
        extent = draw(st.integers(1, {1: 90, 2: 24, 3: 9}[rank]))
        window = draw(st.one_of(st.integers(1, extent), st.integers(1, 12)))
        extents.append(extent)
        windows.append(window)
        strides.append(draw(st.one_of(st.just(1), st.integers(1, window))))
        dilations.append(draw(st.one_of(st.just(1), st.integers(1, max(1, extent // window)), st.integers(1, 5))))
        causal.append(draw(st.booleans()))
    return [tuple(values) for values in (extents, windows, strides, dilations, causal)]


@st.composite
def problems(draw):
    grid, window, stride, dilation, causal = draw(axes(draw(st.integers(1, 3))))
    heads_kv, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return Case(
        grid,
        window,
        stride if draw(st.booleans()) else 1,
        dilation,
        causal if draw(st.booleans()) else False,
        batch=draw(st.integers(1, 3)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.one_of(st.just(0), st.integers(1, 40))),
        extra=draw(st.one_of(st.just(0), st.integers(1, 20))),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 0.5 * head_dim**-0.5, -(head_dim**-0.5)])),
    )


def within_reach(case):
    tokens = math.prod(case.grid)
    return tokens * (tokens + case.extra) * case.heads * case.batch <= MOST_PAIRS


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=problems().filter(within_reach), seed=st.integers(0, 1000), lse_gradient=st.booleans())
def test_random_problems(dtype, case, seed, lse_gradient):
    cases.check(case, dtypes=(dtype,), seed=seed, lse_gradient=lse_gradient)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=problems().filter(within_reach), seed=st.integers(0, 1000), lse_gradient=st.booleans())
def test_many_random_problems(dtype, case, seed, lse_gradient):
    cases.check(case, dtypes=(dtype,), seed=seed, lse_gradient=lse_gradient)
