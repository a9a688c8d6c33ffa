"""A small pretrained ViT for pretrained.py, where no large one is at hand.

    python benchmarks/small_vit.py --assets FOLDER [--epochs 8]

Trains it on the photographs of CIFAR-10, upright and under their own names, but for those from which pretrained.py
draws its clients, and writes it to FOLDER/vit as transformers does. Prints its accuracy on the test images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from pretrained_clients import VIT_CLIENTS_IMAGES
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, get_cosine_schedule_with_warmup

from floral_peft.tasks.data import read_splits
from floral_peft.tasks.images import Images


SIDE, CLASSES, BATCH, RATE = 32, 10, 128, 1e-3


def pixels_of(images: Images) -> Tensor:
    """(examples, 3, 32, 32) in [−1, 1]: what the image processor makes of them."""
    return torch.tensor(images.pixels).movedim(-1, 1) / 127.5 - 1


def moved(pixels: Tensor) -> Tensor:
    """Each image at random mirrored, and moved by up to four pixels."""
    mirrored = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
    down, right = torch.randint(-4, 5, (2,)).tolist()
    return mirrored.roll((down, right), dims=(-2, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    torch.manual_seed(0)
    splits = read_splits(str(given.assets / "cifar10"), "cifar10")
    train, test = Images.of(splits["train"]), Images.of(splits["test"])
    pixels, labels = pixels_of(train)[VIT_CLIENTS_IMAGES:], torch.tensor(train.labels)[VIT_CLIENTS_IMAGES:]
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=3,
            intermediate_size=192, num_labels=CLASSES,
        )
    )  # fmt: skip
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(given.assets / "vit")
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    steps = given.epochs * (len(labels) // BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for epoch in range(given.epochs):
        began = time.perf_counter()
        model.train()
        for rows in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            outputs = model(pixel_values=moved(pixels[rows])).logits
            nn.functional.cross_entropy(outputs, labels[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found = torch.cat([model(pixel_values=some).logits for some in pixels_of(test).split(500)]).argmax(-1)
        right = float((found == torch.tensor(test.labels)).float().mean())
        print(f"epoch {epoch + 1}: {right:.1%} of the test images, {time.perf_counter() - began:.0f} s", flush=True)
        model.save_pretrained(given.assets / "vit")


if __name__ == "__main__":
    main()
