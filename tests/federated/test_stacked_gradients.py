"""What is done to stacked gradients is what is done to each client's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from floral_peft.federated.stacked_gradients import change_stacked, clip_weights_stacked
from floral_peft.tuner import clip_steps


@pytest.mark.parametrize("limit", [0.5, 5.0, 1e9])
def test_each_clients_steps_are_clipped_as_its_own(limit: float) -> None:
    torch.manual_seed(0)
    shapes = {
        "w": (4, 6),
        "a": (3, 2, 6),
        "b": (4, 3, 2),
        "k": (4, 3, 3, 3),
        "ka": (3, 2, 3, 1, 3),
        "kb": (4, 3, 2, 3, 1),
    }
    values = {name: torch.randn(5, *shape).double() for name, shape in shapes.items()}
    gradients = {name: torch.randn(5, *shape).double() for name, shape in shapes.items()}
    del gradients["ka"]
    stacked = {name: value.clone() for name, value in gradients.items()}
    change_stacked([partial(clip_steps, max_norm=limit)], [("a", "b"), ("ka", "kb")], values, stacked)
    clip_weights_stacked(["w", "k"], stacked, limit)
    for client in range(5):
        own: dict[str, Tensor] = {name: value[client].clone() for name, value in values.items()}
        for name, value in gradients.items():
            own[name].grad = value[client].clone()
        clip_steps([(own["a"], own["b"]), (own["ka"], own["kb"])], limit, [own["w"], own["k"]])
        for name, value in stacked.items():
            torch.testing.assert_close(value[client], own[name].grad)
