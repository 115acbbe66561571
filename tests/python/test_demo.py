# SPDX-License-Identifier: MIT
"""The demo in examples/segmentation: its scenes, a short run of everything, and (slow) that it learns."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).parents[2] / "examples" / "segmentation"
SHORT = ["--steps", "3", "--batch", "1", "--size", "64", "--dilations", "1", "2", "--test-scenes", "2"]


@pytest.fixture
def demo(monkeypatch):
    """The demo's modules by name; they are scripts beside each other, so they are found through sys.path."""
    names = ("data", "model", "picture", "train")
    monkeypatch.syspath_prepend(str(DEMO))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: __import__(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_photographs_ship_with_the_wheel(demo):
    photographs = demo["data"].load_photographs()
    assert len(photographs) == len(demo["data"].CLASSES) == 8
    for photograph in photographs:
        assert photograph.dtype == np.uint8
        assert photograph.ndim == 3
        assert photograph.std() > 10


@pytest.mark.parametrize("varied", [False, True])
def test_scenes_are_valid_and_repeatable(demo, varied):
    mosaics = demo["data"].Mosaics
    images, labels = mosaics("left", seed=3, size=96, varied=varied).batch(4)
    assert images.shape == (4, 3, 96, 96)
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    assert labels.shape == (4, 96, 96)
    assert labels.dtype == np.int64
    assert labels.min() >= 0
    assert labels.max() < 8
    assert all(2 <= len(np.unique(scene)) <= 5 for scene in labels)
    again = mosaics("left", seed=3, size=96, varied=varied).batch(4)
    assert np.array_equal(images, again[0])
    assert np.array_equal(labels, again[1])
    assert not np.array_equal(labels, mosaics("left", seed=4, size=96, varied=varied).batch(4)[1])


@pytest.mark.parametrize("half", ["left", "right"])
def test_a_scene_shows_its_own_half_only(demo, half):
    """Painting the other half of every photograph changes nothing."""
    data = demo["data"]
    expected = data.Mosaics(half, seed=0).batch(8)[0]

    def painted():
        photographs = [photograph.copy() for photograph in load()]
        for photograph in photographs:
            middle = photograph.shape[1] // 2
            other = slice(middle, None) if half == "left" else slice(0, middle)
            photograph[:, other] = 255
        return photographs

    load, data.load_photographs = data.load_photographs, painted
    assert np.array_equal(data.Mosaics(half, seed=0).batch(8)[0], expected)


def test_short_run(demo, tmp_path, capsys):
    figures = demo["train"].main([*SHORT, "--device", "cpu", "--out", str(tmp_path / "demo")])
    assert f"accuracy {figures['accuracy']:.4f} mIoU {figures['miou']:.4f}" in capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "demo.json").read_text())
    assert {"accuracy", "miou", "train_seconds", "device"} <= written.keys()
    assert 0 <= written["miou"] <= 1
    assert 0 <= written["accuracy"] <= 1
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_runs_repeat(demo, tmp_path):
    runs = [demo["train"].main([*SHORT, "--device", "cpu", "--out", str(tmp_path / f"demo{i}")]) for i in range(2)]
    assert runs[0]["iou"] == runs[1]["iou"]


@pytest.mark.slow
def test_learns_and_needs_its_windows(demo, tmp_path):
    """The thresholds of the first real job. Time is no part of it: tests share the machine with others."""
    trained = demo["train"].main(["--out", str(tmp_path / "demo")])
    control = demo["train"].main(["--control", "--out", str(tmp_path / "control")])
    assert trained["accuracy"] >= 0.84
    assert trained["miou"] >= 0.72
    assert trained["miou"] >= control["miou"] + 0.12
