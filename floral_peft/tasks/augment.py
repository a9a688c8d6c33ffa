"""Random flips and crops, the usual augmentation of small photographs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from floral_peft.federated.transforms import BatchTransform


@dataclass(frozen=True)
class FlipAndCrop(BatchTransform):
    """Mirrors every other image and moves each by up to `margin` pixels, each batch anew.

    Args:
        turns: The quarter turns by which the images were turned. They are mirrored as they were before, left to right:
            else the cluster that sees them turned to the left would get some of those turned to the right.
        margin: Zeros to put around an image before a window of its size is cut out.
        column: The images' column, (examples, channels, height, width).
    """

    turns: int = 0
    margin: int = 4
    column: str = "inputs"

    def tensors(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its images mirrored and moved."""
        images: Tensor = batch[self.column]
        count, _, height, width = images.shape
        mirrored = torch.rand(count) < 0.5
        top, left = torch.randint(2 * self.margin + 1, (2, count))
        padded = F.pad(images, [self.margin] * 4)
        rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
        if self.turns % 2:
            rows = torch.where(mirrored[:, None], rows.flip(1), rows)
        else:
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        places = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1).to(images.device)
        chosen = padded.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1))
        return {**batch, self.column: chosen.view_as(images)}
