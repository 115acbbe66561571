# SPDX-License-Identifier: MIT
"""demo.png: a test scene, its truth, the network's answer, and where one query of the dilated layer looked for it."""

from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
from data import CLASSES, to_rgb
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from model import PATCH, Segmenter

from natten.viz import Window, layer_window

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  after the choice of a backend that needs no display

PANEL_POINTS = 250  # width of a panel, about
COLORS = ListedColormap(
    ["#c44e52", "#55a868", "#8c8c8c", "#8172b2", "#1b2a49", "#e8dcb5", "#4c9fd4", "#e8953a"], name="classes"
)


def draw(model: Segmenter, images: np.ndarray, labels: np.ndarray, iou: list[float], path: Path) -> None:
    """Draws one of a batch of test scenes, that of the most telling query; `iou` is over all test scenes."""
    device = next(model.parameters()).device
    layer = max(range(len(model.blocks)), key=lambda i: model.blocks[i].attention.dilation[0])
    attention = model.blocks[layer].attention
    predictions, entering = _run(model, torch.from_numpy(images).to(device), layer)
    tokens = labels[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    which, index, window = _telling_query(attention, entering, tokens)
    image, labels, predicted, tokens = images[which], labels[which], predictions[which], tokens[which]
    spacing = attention.dilation[0] / len(tokens)  # of the keys, as a fraction of the scene

    figure, axes = plt.subplots(2, 3, figsize=(14, 10), layout="constrained")
    scene = to_rgb(image)
    right = (predicted == labels).mean()
    axes[0, 0].imshow(scene)
    axes[0, 0].set_title("a test scene")
    for ax, classes, title in [
        (axes[0, 1], labels, "truth"),
        (axes[0, 2], predicted, f"prediction: {right:.1%} right"),
    ]:
        ax.imshow(classes, cmap=COLORS, vmin=-0.5, vmax=len(CLASSES) - 0.5, interpolation="nearest")
        ax.set_title(title)
    for head in range(min(2, attention.num_heads)):
        ax = axes[1, head]
        ax.imshow(0.55 * scene + 0.45)
        _draw_window(ax, index, window.keys.cpu().numpy(), window.weights[0, head].cpu().numpy(), tokens, spacing)
        ax.set_title(_window_title(head, attention, index, window, tokens))
    _draw_scores(axes[1, 2], iou)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


@torch.no_grad()
def _run(model: Segmenter, images: torch.Tensor, layer: int) -> tuple[np.ndarray, torch.Tensor]:
    """The predicted classes of every scene and what entered the attention of block `layer`."""
    caught = []
    hook = model.blocks[layer].attention.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    predicted = model.eval()(images).argmax(1)
    hook.remove()
    return predicted.cpu().numpy(), caught[0]


def _own_share(index, window: Window, tokens: np.ndarray) -> tuple[float, np.ndarray]:
    """Of the keys, and of each head's weight, the share on the query's own texture."""
    y, x = window.keys.cpu().numpy().T
    own = tokens[y, x] == tokens[tuple(index)]
    return own.mean(), window.weights[0].cpu().numpy()[:, own].sum(1)


def _telling_query(attention, entering: torch.Tensor, tokens: np.ndarray) -> tuple[int, tuple[int, int], Window]:
    """Of a lattice of queries in every scene the one of which some head prefers its own texture most: the scene, the
    place and the window."""
    best, found = -np.inf, None
    for which, y, x in product(range(len(tokens)), range(4, tokens.shape[1] - 1, 8), range(4, tokens.shape[2] - 1, 8)):
        window = layer_window(attention, entering[which : which + 1], (y, x))
        keys, weights = _own_share((y, x), window, tokens[which])
        if weights.max() - keys > best:
            best, found = weights.max() - keys, (which, (y, x), window)
    return found


def _draw_window(ax: Axes, index, keys: np.ndarray, weights: np.ndarray, tokens: np.ndarray, spacing: float) -> None:
    """Every key a disc whose area is its weight, in the colour of its class; a star where the query is."""
    largest = (PANEL_POINTS * spacing) ** 2
    y, x = (keys.T + 0.5) * PATCH
    ax.scatter(x, y, s=9, c="white", edgecolors="black", linewidths=0.5)
    colors = COLORS(tokens[tuple(keys.T)] / (len(CLASSES) - 1))
    ax.scatter(x, y, s=largest * weights / weights.max(), c=colors, edgecolors="black", linewidths=0.8, alpha=0.9)
    ax.plot((index[1] + 0.5) * PATCH, (index[0] + 0.5) * PATCH, marker="*", ms=16, c="#ffe100", mec="black")


def _window_title(head: int, attention, index, window: Window, tokens: np.ndarray) -> str:
    size, dilation = attention.kernel_size[0], attention.dilation[0]
    keys, weights = _own_share(index, window, tokens)
    return (
        f"one query: window {size}x{size}, dilation {dilation}, head {head + 1}\n"
        f"{weights[head]:.0%} of the weight on its texture, {keys:.0%} of the keys"
    )


def _draw_scores(ax: Axes, iou: list[float]) -> None:
    """The legend of the classes, as bars of their intersection over union."""
    ax.barh(range(len(CLASSES)), iou, color=COLORS.colors, edgecolor="black", linewidth=0.6)
    for i, (name, value) in enumerate(zip(CLASSES, iou, strict=True)):
        ax.text(-0.02, i, name.replace("_", " "), va="center", ha="right")  # no ticks: they would narrow the panel
        ax.text(value + 0.02, i, f"{value:.2f}", va="center")
    ax.invert_yaxis()
    ax.set_xlim(-0.7, 1.15)
    ax.set_title(f"intersection over union on all test scenes\nmean {np.mean(iou):.3f}")
