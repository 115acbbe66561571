# SPDX-License-Identifier: MIT
"""Settings of the whole suite. No test skips: an engine that this CPU lacks is not listed, so no test asks for it."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("natten", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("natten")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with `-m slow`, or everything with `-m ''`")
    # The problems are tiny: waiting for a second thread takes longer than they do. Tests of threads ask for more.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr or "-m" in config.invocation_params.args:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
