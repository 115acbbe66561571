# SPDX-License-Identifier: MIT
"""Scenes for the demo: Voronoi mosaics of textures, cut from photographs that the scikit-image wheel ships.

A scene has five of the eight textures. Training scenes come from the left halves of the photographs and test scenes
from the right halves, so no test pixel was ever trained on. Eight half photographs are little to learn from: a
training cut is therefore mirrored, scaled and lit anew each time. Test cuts are taken as they are. An image has three
channels, but not red, green and blue: see COLOR.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "immunohistochemistry": "ihc.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "page": "page.png",
    "coins": "coins.png",
    "chelsea": "chelsea.png",
}
CLASSES = tuple(PHOTOGRAPHS)
SIZE = 224
# Red, green and blue to brightness and two colour differences, each with a deviation of about 1. As they are, the three
# are nearly equal, and a network is late to notice the little that tells a tissue from a page.
COLOR = np.array([[1 / 180, 1 / 20, 0], [1 / 180, -1 / 20, -1 / 20], [1 / 180, 0, 1 / 20]], dtype=np.float32)
MIDDLE = np.array([2, 0, 0], dtype=np.float32)
ZOOM = 0.25  # a training cut is up to this much larger or smaller, as a power of two
CONTRAST, BRIGHTNESS, RAMP = 0.4, 0.5, 0.5  # of a training cut's light


def load_photographs() -> list[np.ndarray]:
    """The photographs in the order of CLASSES, uint8 [height, width, 3]."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's photographs come with scikit-image: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"  # read as files: skimage.data would ask for pooch and might download
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS.values()]


def to_rgb(image: np.ndarray) -> np.ndarray:
    """An image of a batch, [3, size, size], as one to show: [size, size, 3], 0 to 1."""
    return np.clip((image.transpose(1, 2, 0) + MIDDLE) @ np.linalg.inv(COLOR) / 255, 0, 1)


class Mosaics:
    """An endless, seeded stream of scenes from one half ("left" or "right") of the photographs."""

    def __init__(self, half: str, seed: int, size: int = SIZE, varied: bool = False, textures: int = 5, cells: int = 8):
        self.size, self.varied, self.textures, self.cells = size, varied, textures, cells
        self.rng = np.random.default_rng(seed)
        halves = []
        for photograph in load_photographs():
            middle = photograph.shape[1] // 2
            halves.append(photograph[:, :middle] if half == "left" else photograph[:, middle:])
        self.shapes = np.array([part.shape[:2] for part in halves])
        self.first = np.cumsum([0, *self.shapes.prod(1)[:-1]])  # of each half's pixels in `pixels`
        self.pixels = np.concatenate([part.reshape(-1, 3) for part in halves])

    def _regions(self) -> np.ndarray:
        """Which texture of the scene each pixel shows: the cell of its nearest site; int64 [size, size]."""
        sites = self.rng.uniform(0, self.size, (2, self.cells, 1)).astype(np.float32)
        squared_y, squared_x = (sites - np.arange(self.size, dtype=np.float32)) ** 2
        nearest = (squared_y[:, :, None] + squared_x[:, None, :]).argmin(0)
        return (np.arange(self.cells) % self.textures)[nearest]

    def _positions(self, lengths: np.ndarray, mirror: bool) -> np.ndarray:
        """Where the pixels of one scene axis lie on that axis of each half; int64 [textures, size]."""
        zoom = 2.0 ** self.rng.uniform(-ZOOM, ZOOM, (self.textures, 1)) if self.varied else 1.0
        reach = zoom * self.size
        begin = self.rng.random((self.textures, 1)) * np.maximum(lengths[:, None] - reach, 32)
        at = (begin + zoom * np.arange(self.size)).astype(np.int64)
        if mirror:
            flipped = self.rng.random((self.textures, 1)) < 0.5
            at = np.where(flipped, at[:, ::-1], at)
        period = 2 * lengths[:, None]
        at %= period  # a half that is too small goes on as its mirror image
        return np.minimum(at, period - 1 - at)

    def _light(self, image: np.ndarray, regions: np.ndarray) -> np.ndarray:
        """Gives every texture a contrast, a brightness and a ramp of light of its own."""
        light = self.rng.uniform(-1, 1, (self.textures, 4)) * (CONTRAST, BRIGHTNESS, RAMP, RAMP)
        contrast, brightness, down, across = light.astype(np.float32).T
        ticks = np.linspace(-1, 1, self.size, dtype=np.float32)
        image *= (1 + contrast)[regions][..., None]
        image[..., 0] += brightness[regions] + down[regions] * ticks[:, None] + across[regions] * ticks
        return image

    def scene(self) -> tuple[np.ndarray, np.ndarray]:
        """One scene: image float32 [size, size, 3] and the class of each pixel, int64 [size, size]."""
        chosen = self.rng.choice(len(CLASSES), self.textures, replace=False)
        regions = self._regions()
        rows = self._positions(self.shapes[chosen, 0], mirror=False)
        columns = self._positions(self.shapes[chosen, 1], mirror=self.varied)
        rows = rows * self.shapes[chosen, 1:] + self.first[chosen, None]
        ticks = np.arange(self.size)
        image = self.pixels[rows[regions, ticks[:, None]] + columns[regions, ticks[None, :]]]
        image = image.astype(np.float32) @ COLOR - MIDDLE
        if self.varied:
            image = self._light(image, regions)
        return image, chosen[regions]

    def batch(self, scenes: int) -> tuple[np.ndarray, np.ndarray]:
        """`scenes` scenes: images [scenes, 3, size, size], channels last in memory, and labels [scenes, size, size]."""
        images, labels = zip(*(self.scene() for _ in range(scenes)), strict=True)
        return np.stack(images).transpose(0, 3, 1, 2), np.stack(labels)
