# SPDX-License-Identifier: MIT
"""The first real job: a neighborhood-attention transformer learns to segment a mosaic of photographs.

python examples/segmentation/train.py              # trains, then writes demo.png and demo.json
python examples/segmentation/train.py --control    # the same network with window 1: it cannot look around
"""

import argparse
import json
import time
from pathlib import Path

import torch
from data import CLASSES, Mosaics
from model import PATCH, Segmenter
from picture import draw
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import natten

TEST_SEED = 1_000_003  # the test scenes are the same for every --seed
WARMUP = 0.1  # share of the steps in which the learning rate rises


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4, help="scenes per step")
    parser.add_argument("--dim", type=int, default=64, help="channels, a multiple of 32")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--dilations", type=int, nargs="+", default=[1, 2, 1, 8], help="one block for each")
    parser.add_argument("--size", type=int, default=224, help="height and width of a scene")
    parser.add_argument("--test-scenes", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 means autocast")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="writes OUT.png and OUT.json")
    parser.add_argument("--control", action="store_true", help="window 1 and no dilation in every block")
    args = parser.parse_args(argv)
    if args.size % PATCH or args.size < 32:
        parser.error(f"--size {args.size} must be a multiple of {PATCH}, at least 32")
    return args


def choose_device(name: str) -> torch.device:
    """`auto` takes the GPU when there is one on which this build of natten can run."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    probe = torch.ones(1, 8, 8, 1, 32, device="cuda")
    try:
        natten.na2d(probe, probe, probe, 7)
    except (NotImplementedError, RuntimeError) as error:
        print(f"the GPU is left alone: {error}")
        return torch.device("cpu")
    return torch.device("cuda")


def tensors(batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = batch
    return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)


def train(model: nn.Module, scenes: Mosaics, args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Trains the model in place; returns the seconds it took, the making of the scenes included, and its last loss, a
    running mean."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=WARMUP)
    model.train()
    begin = time.perf_counter()
    mean_loss = None
    with tqdm(total=args.steps * args.batch, unit="image", desc="training") as progress:
        for _ in range(args.steps):
            images, labels = tensors(scenes.batch(args.batch), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                logits = model(images)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
            progress.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
            progress.update(args.batch)
    return time.perf_counter() - begin, mean_loss


@torch.no_grad()
def confusion(model: nn.Module, scenes: Mosaics, args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Pixels of the test scenes by true class (row) and predicted class (column)."""
    model.eval()
    counts = torch.zeros(len(CLASSES) ** 2, dtype=torch.int64)
    for _ in range(0, args.test_scenes, args.batch):
        images, labels = tensors(scenes.batch(args.batch), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            predicted = model(images).argmax(1)
        counts += torch.bincount((labels * len(CLASSES) + predicted).flatten().cpu(), minlength=counts.numel())
    return counts.view(len(CLASSES), len(CLASSES))


def scores(counts: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Pixel accuracy and the intersection over union of each class."""
    hits = counts.diag()
    union = counts.sum(0) + counts.sum(1) - hits
    return (hits.sum() / counts.sum()).item(), hits / union.clamp(min=1)


def report(accuracy: float, iou: torch.Tensor, seconds: float, args: argparse.Namespace, model: nn.Module) -> None:
    """The table, and the line that scripts read."""
    table = Table(title="Test scenes, from the halves of the photographs that training never saw")
    table.add_column("texture")
    table.add_column("intersection over union", justify="right")
    for name, value in zip(CLASSES, iou.tolist(), strict=True):
        table.add_row(name, f"{value:.3f}")
    table.add_section()
    table.add_row("mean", f"{iou.mean():.3f}")
    table.add_row("pixel accuracy", f"{accuracy:.3f}")
    table.add_section()
    table.add_row("parameters", f"{sum(p.numel() for p in model.parameters()):,}")
    table.add_row("training", f"{seconds:.1f} s, {args.steps * args.batch / seconds:.1f} images/s")
    Console().print(table)
    print(f"accuracy {accuracy:.4f} mIoU {iou.mean():.4f}", flush=True)


def main(argv: list[str] | None = None) -> dict:
    """Trains, tests, draws; returns what demo.json holds."""
    args = parse_arguments(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = choose_device(args.device)
    kernel_size, dilations = (1, [1] * len(args.dilations)) if args.control else (args.kernel_size, args.dilations)
    model = Segmenter(len(CLASSES), args.dim, kernel_size, dilations).to(device, memory_format=torch.channels_last)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"natten {natten.__version__}, torch {torch.__version__}, {where}: window {kernel_size}, dilations {dilations}"
    )

    seconds, loss = train(model, Mosaics("left", args.seed, args.size, varied=True), args, device)
    test_scenes = Mosaics("right", TEST_SEED, args.size)
    accuracy, iou = scores(confusion(model, test_scenes, args, device))
    report(accuracy, iou, seconds, args, model)

    figures = {
        "loss": loss,
        "accuracy": accuracy,
        "miou": iou.mean().item(),
        "iou": dict(zip(CLASSES, iou.tolist(), strict=True)),
        "train_seconds": seconds,
        "images_per_second": args.steps * args.batch / seconds,
        "device": where,
        "arguments": {name: str(value) if name == "out" else value for name, value in vars(args).items()},
    }
    args.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(model, *Mosaics("right", TEST_SEED, args.size).batch(4), iou.tolist(), args.out.with_suffix(".png"))
    print(f"wrote {args.out.with_suffix('.png')} and {args.out.with_suffix('.json')}")
    return figures


if __name__ == "__main__":
    main()
