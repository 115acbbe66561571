# SPDX-License-Identifier: MIT
"""Settings of the whole suite. Tests skip only where there is no GPU: an engine that this CPU lacks is not listed, so
no test asks for it.

The problems of the files in ON_EVERY_DEVICE run on the CPU and, where there is one, on the GPU: torch's default device
says on which. NATTEN_TEST_DEVICES=cuda chooses one; with it, files about the CPU alone are left out.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # lets cuBLAS run in torch's deterministic mode

import hypothesis
import pytest
import torch  # noqa: E402

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


ON_EVERY_DEVICE = {
    "test_attention",
    "test_autocast",
    "test_configs",
    "test_determinism",
    "test_gradients",
    "test_layout",
    "test_merge",
    "test_modules",
    "test_numerics",
    "test_oversize",
    "test_random",
    "test_symmetry",
    "test_tiles",
    "test_torch_compile",
    "test_torch_training",
    "test_torch_transforms",
    "test_unfused",
    "test_varlen",
    "test_varlen_grids",
    "test_windows",
}
DEVICES = os.environ.get("NATTEN_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(",")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames and metafunc.module.__name__ in ON_EVERY_DEVICE and DEVICES != ["cpu"]:
        metafunc.parametrize("device", DEVICES, indirect=True)


def pytest_ignore_collect(collection_path, config):
    about_the_cpu = collection_path.stem not in {*ON_EVERY_DEVICE, "test_cuda"}
    return True if "cpu" not in DEVICES and collection_path.stem.startswith("test_") and about_the_cpu else None


@pytest.fixture(autouse=True)
def device(request):
    """The device of a test's tensors: torch's default one while it runs."""
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield torch.device(name)
        return
    torch.set_default_device(name)
    yield torch.device(name)
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def initial_switches():
    from natten import context

    context.NattenContext.reset()
    context.AutotunerContext.reset()
    yield
    context.NattenContext.reset()
    context.AutotunerContext.reset()


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
