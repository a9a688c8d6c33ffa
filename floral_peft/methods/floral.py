"""FLoRAL: a shared base, low-rank adaptors by cluster, a router that stays with its client."""

from __future__ import annotations

from collections.abc import Mapping

from peft import get_peft_model
from torch import nn

from floral_peft.federated import Clustered, FederatedArguments, Group, Method, RouterUpdate, register_method
from floral_peft.federated.routing import get_router_update
from floral_peft.tuner import FloralConfig, Role


@register_method
class Floral(Method):
    """Mixtures of low-rank adaptors (Almansoori, Horváth, Takáč, CPAL 2025, arXiv 2410.03497).

    The base, where it trains, and the shared adaptor are averaged with p(k); adaptor c with p(k|c), which the server
    learns as the scalars π̂ᵏ_c Nᵏ; the router never leaves its client.
    """

    name = "floral"

    def prepare(self, model: nn.Module, adaptors: FloralConfig) -> nn.Module:
        """Put the adaptors and a router into the base model."""
        prepared: nn.Module = get_peft_model(model, adaptors)
        return prepared

    def check(self, roles: Mapping[str, Role]) -> None:
        """Refuse a model without a router."""
        if not any(role.kind == "router" for role in roles.values()):
            raise ValueError(
                f'method "{self.name}" needs a model with FLORAL adaptors: get_peft_model(model, FloralConfig(...)).'
            )

    def router_update(self, args: FederatedArguments, sampled: float) -> RouterUpdate:
        """The one that `router_update` names."""
        return get_router_update(args, sampled)

    def group(self, name: str, role: Role) -> Group:
        """Adaptors are clustered, the router is private, all else is shared."""
        if role.kind == "adaptor":
            if role.axis is None:
                raise ValueError(f"{name}: an adaptor's role must name the axis of length C.")
            return Clustered(role.axis, role.slot)
        return "private" if role.kind == "router" else "shared"
