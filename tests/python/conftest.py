# SPDX-License-Identifier: MIT
"""Settings of the whole suite. No test skips: an engine that this CPU lacks is not listed, so no test asks for it."""

import hypothesis
import pytest

hypothesis.settings.register_profile("natten", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("natten")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with `-m slow`, or everything with `-m ''`")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr or "-m" in config.invocation_params.args:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def _fixed_seed():
    import torch

    torch.manual_seed(0)
