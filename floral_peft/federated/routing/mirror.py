"""Routers that local steps train by mirror descent."""

from __future__ import annotations

from dataclasses import replace

from floral_peft.federated.routing.update import RouterUpdate, register_router_update
from floral_peft.tuner.router import RouterSettings


@register_router_update
class Mirror(RouterUpdate):
    """θ ← θ − η ∂L/∂π in every local step: exponentiated gradient, the geometry in which a mixture lives.

    η is the routers' learning rate, the steps are the clients' optimiser's. The config's noise is left out. Unlike the
    gradient through the softmax, ∂L/∂π does not fade with an adaptor's weight.
    """

    name = "mirror"

    def settings(self, settings: RouterSettings) -> RouterSettings:
        """No noise, and a softmax whose gradient is taken as if it were linear."""
        return replace(settings, noise=0.0, straight_through=True)
