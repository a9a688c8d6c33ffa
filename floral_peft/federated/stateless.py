"""Routers of clients that keep nothing: relearned at each visit from the losses of the pure models (METHOD: 3.4)."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import set_seed

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.batches import Collator, Examples, ordered_batches
from floral_peft.federated.forward import Forward
from floral_peft.federated.routers import Routers
from floral_peft.federated.seeding import ClientId, derive_seed
from floral_peft.federated.server import PrivateState, ServerState
from floral_peft.federated.visitor import Visitor


class Relearning:
    """Finds a client's router from its examples: π̂_c ∝ π_c exp(−η f_c), one step of exponentiated gradient.

    f_c is the loss of the pure model in which every layer uses adaptor c alone, π the mixture with which the client
    starts, and η the router's learning rate.

    Args:
        model: The model, on the accelerator's device.
        visitor: Sets the model's tensors.
        forward: Calls the model on a batch.
        routers: The model's routers.
        args: The run's settings.
        accelerator: Device and autocast.
        collator: Makes a batch from examples.
    """

    def __init__(
        self,
        model: nn.Module,
        visitor: Visitor,
        forward: Forward,
        routers: Routers,
        args: FederatedArguments,
        accelerator: Accelerator,
        collator: Collator,
    ) -> None:
        self._model = model
        self._visitor = visitor
        self._forward = forward
        self._routers = routers
        self._args = args
        self._accelerator = accelerator
        self._collator = collator

    def __call__(
        self,
        client_id: ClientId,
        dataset: Dataset,
        private: PrivateState,
        round: int,
        state: ServerState | None = None,
    ) -> PrivateState:
        """A client's private tensors with its router relearned. Without examples it stays the one to start with.

        Args:
            client_id: The client.
            dataset: Its training examples.
            private: The private tensors with which it starts.
            round: The round.
            state: The server's state; None where the model holds it already.
        """
        if len(dataset) == 0:
            return private
        # A dataset's transform may draw from the global generators.
        set_seed(derive_seed(self._args.seed, "relearn", round, client_id))
        self._visitor.load(private, state)
        losses = self._losses(Examples(dataset, self._collator, self._accelerator.device))
        args, name = self._args, self._routers.name
        rate = args.learning_rate if args.router_learning_rate is None else args.router_learning_rate
        return {**private, name: self._routers.less(private[name], rate * losses)}

    @torch.no_grad()
    def _losses(self, examples: Examples) -> Tensor:
        """f_c, the mean loss of an example, float32, shape (C,)."""
        self._model.eval()
        pure = self._routers.pure()
        losses = torch.zeros(len(pure))
        for rows in ordered_batches(len(examples), self._args.per_device_eval_batch_size):
            batch = examples.batch(rows)
            for adaptor, router in enumerate(pure):
                self._visitor.load({self._routers.name: router})
                with self._accelerator.autocast():
                    losses[adaptor] += float(self._forward(batch).loss) * len(rows)
        return losses / len(examples)
