"""What makes clusters differ: images turned, labels shifted."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


#: (images, labels, cluster) → the images and labels as that cluster has them.
Change = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def rotate(images: Tensor, labels: Tensor, cluster: int, clusters: int = 4) -> tuple[Tensor, Tensor]:
    """Cluster c of C sees every image turned to the left by 360/C·c degrees."""
    return turned(images, 360 * cluster / clusters), labels


def shift_labels(images: Tensor, labels: Tensor, cluster: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Cluster c calls the class y by another name, (y + c) mod the number of classes."""
    return images, (labels + cluster) % classes


def unchanged(images: Tensor, labels: Tensor, cluster: int) -> tuple[Tensor, Tensor]:
    """Clusters differ in the examples that they have, not in how they see them."""
    return images, labels


def turned(images: Tensor, degrees: float) -> Tensor:
    """Images turned to the left about their centre: by quarter turns exactly, by other angles interpolated.

    Args:
        images: Shape (examples, ..., height, width), float32.
        degrees: The angle.
    """
    quarters, rest = divmod(degrees % 360, 90)
    return interpolated(images, degrees) if rest else torch.rot90(images, int(quarters), dims=(-2, -1))


def interpolated(images: Tensor, degrees: float) -> Tensor:
    """Images turned to the left by any angle, bilinearly. What comes from outside the image is 0.

    Args:
        images: Shape (examples, ..., height, width), float32.
        degrees: The angle.
    """
    height, width = images.shape[-2:]
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    # From a place in the turned image to where it comes from, both with sides that run from −1 to 1.
    back = torch.tensor([[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]])
    planes = images.reshape(1, -1, height, width)
    grid = F.affine_grid(back[None], list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, align_corners=False).reshape(images.shape)
