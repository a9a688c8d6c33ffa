"""Federated averaging, and then each client trains the common model a little further for itself."""

from __future__ import annotations

from contextlib import AbstractContextManager

from floral_peft.federated import Turn, register_method
from floral_peft.methods.fedavg import FedAvg


@register_method
class FedAvgFinetune(FedAvg):
    """FedAvg, then local fine-tuning (Wang et al., 2019, arXiv 1910.10252; Cheng et al., 2021, arXiv 2108.07313).

    Training is FedAvg's. Before a client is evaluated, the common model takes `finetune_epochs` epochs of local
    steps on the client's training examples, at the rate of the training; nothing of that is kept or sent. A single
    epoch is too few where that rate is high: the model has left the common one and not yet settled in its own.
    """

    name = "fedavg_finetune"

    def evaluated(self, turn: Turn) -> AbstractContextManager[None]:
        """The model after the client's local training."""
        return turn.trained(turn.args.finetune_epochs)
