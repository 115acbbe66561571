# SPDX-License-Identifier: MIT
"""Eras 0.17 to 0.21: which device this is."""

import torch


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def is_rocm(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is not None


def is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def get_device_cc(device=None) -> int:
    """10 * major + minor of a GPU's compute capability; 0 without a GPU."""
    if not torch.cuda.is_available() or (isinstance(device, torch.device) and device.type != "cuda"):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
