"""No federation: every client trains a model of its own on its own examples."""

from __future__ import annotations

from floral_peft.federated import Group, register_method
from floral_peft.methods.fedavg import FedAvg
from floral_peft.tuner import Role


@register_method
class LocalOnly(FedAvg):
    """Local training: the lower reference of personalised federated learning. Nothing is sent.

    A client trains in the rounds in which it is sampled, from where it stopped; all start from the same weights.
    """

    name = "local_only"

    def group(self, name: str, role: Role) -> Group:
        """Everything is private."""
        return "private"
