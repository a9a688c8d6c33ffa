"""Trying the first clients before training: a mistake that all share is one error, not one per client and round."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from floral_peft.federated.batches import Collator, Examples
from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.forward import Forward
from floral_peft.federated.seeding import ClientId


CLIENTS = 3
EXAMPLES = 2


@torch.no_grad()
def probe(
    model: nn.Module, forward: Forward, dataset: FederatedDataset, collator: Collator, device: torch.device
) -> None:
    """Run the model on a few examples of each of the first clients. One client's own mistake passes.

    Args:
        model: The model, which is left in evaluation mode.
        forward: Calls it on a batch.
        dataset: The clients.
        collator: Makes a batch from examples.
        device: Where the batches go.

    Raises:
        ValueError: All of these clients fail; the message names the first, its exception and where to look.
    """
    model.eval()
    some = dataset.ids[:CLIENTS]
    failures: dict[ClientId, Exception] = {}
    for client_id in some:
        try:
            split = dataset[client_id]["train"]
            if len(split):
                examples = Examples(split, collator, device)
                forward(examples.batch(_telling(examples)))
        except Exception as error:  # a client's data and the user's functions may raise anything
            failures[client_id] = error
    if len(failures) == len(some):
        first, failure = next(iter(failures.items()))
        others = f", nor on those of the next {len(some) - 1}" if len(some) > 1 else ""
        reason = f"{type(failure).__name__}: {failure}".rstrip(".")
        raise ValueError(
            f"client {first!r}: the model cannot be run on its training examples{others}: {reason}. Nothing was "
            "trained. Check that the columns, the data_collator, the loss_fn and the labels' range fit the model."
        ) from failure


def _telling(examples: Examples) -> Tensor:
    """The rows of the first examples, and of those with the lowest and the highest label, which a loss may refuse."""
    rows = set(range(min(len(examples), EXAMPLES)))
    labels = examples.classes()
    if labels is not None and len(labels) == len(examples) and labels.size:
        lowest, highest = (int(place) // (labels.size // len(labels)) for place in (labels.argmin(), labels.argmax()))
        rows |= {lowest, highest}
    return torch.tensor(sorted(rows))
