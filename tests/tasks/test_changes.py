from __future__ import annotations

import pytest
import torch

from floral_peft.tasks.augment import FlipAndCrop
from floral_peft.tasks.changes import interpolated, rotate, shift_labels, turned, unchanged


LETTER = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 0.0], [0.0, 5.0, 0.0]])  # a T
LABEL = torch.tensor([7])


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_interpolation_agrees_with_quarter_turns(quarters: int) -> None:
    images = torch.rand(4, 3, 8, 8)
    exact = turned(images, 90 * quarters)
    assert torch.equal(exact, torch.rot90(images, quarters, dims=(-2, -1)))
    torch.testing.assert_close(interpolated(images, 90 * quarters), exact, rtol=0, atol=1e-5)


def test_an_eighth_of_a_turn_twice_is_nearly_a_quarter_of_a_smooth_image() -> None:
    down, across = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    image = torch.exp(-8 * ((across - 0.4) ** 2 + down**2))[None]  # a spot to the right of the centre
    twice = turned(turned(image, 45), 45)
    assert (twice - turned(image, 90)).abs().max() < 0.03
    assert int(twice.flatten().argmax()) // 32 < 16  # it has come up


def test_what_comes_from_outside_the_image_is_black() -> None:
    assert turned(torch.ones(1, 8, 8), 45)[0, 0, 0] == 0


def test_a_cluster_of_six_turns_by_sixty_degrees() -> None:
    images = torch.rand(2, 8, 8)
    turned_images, labels = rotate(images, LABEL, 2, clusters=6)
    assert torch.equal(turned_images, turned(images, 120))
    assert torch.equal(labels, LABEL)


def test_labels_wrap_round_at_the_number_of_classes() -> None:
    assert shift_labels(LETTER, LABEL, 2, classes=8)[1].tolist() == [1]


def test_nothing_changes_where_clusters_differ_in_their_examples() -> None:
    assert unchanged(LETTER, LABEL, 3) == (LETTER, LABEL)


def windows(image: torch.Tensor, margin: int) -> list[list[list[float]]]:
    """All images that cropping can make of one."""
    padded = torch.nn.functional.pad(image, [margin] * 4)
    steps = range(2 * margin + 1)
    return [padded[top : top + 3, left : left + 3].tolist() for top in steps for left in steps]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_an_image_is_mirrored_as_it_was_before_it_was_turned(turns: int) -> None:
    seen = FlipAndCrop(turns, margin=1).tensors(
        {"inputs": torch.rot90(LETTER, turns).expand(400, 1, 3, 3), "labels": LABEL.expand(400)}
    )
    made = {str(image.tolist()) for image in seen["inputs"][:, 0]}
    upright = [LETTER, LETTER.flip(1)]
    expected = {str(window) for image in upright for window in windows(torch.rot90(image, turns), margin=1)}
    assert made == expected
    assert torch.equal(seen["labels"], LABEL.expand(400))


def test_channels_move_together_and_the_batch_stays_as_it_is() -> None:
    images = LETTER.expand(50, 2, 3, 3).clone()
    seen = FlipAndCrop(margin=2).tensors({"inputs": images})["inputs"]
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert torch.equal(images, LETTER.expand(50, 2, 3, 3))
