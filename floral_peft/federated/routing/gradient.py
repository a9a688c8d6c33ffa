"""Routers that local steps train, as in the paper."""

from __future__ import annotations

from floral_peft.federated.routing.update import RouterUpdate, register_router_update


@register_router_update
class Gradient(RouterUpdate):
    """θ ← θ − η ∂L/∂θ in every local step, with the config's noise (arXiv:2410.03497).

    Through the softmax the gradient is π_c (∂L/∂π_c − Σ_j π_j ∂L/∂π_j): an adaptor that has lost its weight does not
    come back, and where all adaptors are equal nothing moves.
    """

    name = "gradient"
