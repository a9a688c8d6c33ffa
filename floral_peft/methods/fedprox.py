"""Federated averaging with a proximal term that holds clients back from drifting apart."""

from __future__ import annotations

from floral_peft.federated import register_method
from floral_peft.methods.fedavg import FedAvg


@register_method
class FedProx(FedAvg):
    """FedProx (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2): local steps minimise F_k(w) + μ/2 ‖w − wᵗ‖².

    wᵗ is what the server sent, and μ `proximal_weight`; with μ = 0 it is FedAvg.
    """

    name = "fedprox"

    def anchor(self, name: str) -> str:
        """Every parameter is pulled to the server's."""
        return name
