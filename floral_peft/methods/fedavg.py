"""Federated averaging: one model for everybody."""

from __future__ import annotations

from collections.abc import Mapping

from floral_peft.federated import Group, Method, register_method
from floral_peft.tuner import Role


@register_method
class FedAvg(Method):
    """FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1): whatever trains is averaged with p(k).

    Takes any `nn.Module`, PEFT's models included (federated LoRA).
    """

    name = "fedavg"

    def check(self, roles: Mapping[str, Role]) -> None:
        """Refuse a model with a router: whoever has one model has nothing to route."""
        if any(role.kind == "router" for role in roles.values()):
            raise ValueError(
                f'method "{self.name}" trains one model for all clients, or for each, but this model has a FLORAL '
                f'router: use method="floral", or give {self.name} the base model.'
            )

    def group(self, name: str, role: Role) -> Group:
        """Everything is shared."""
        return "shared"
