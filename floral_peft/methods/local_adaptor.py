"""A shared base, and a low-rank adaptor that stays with its client."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from floral_peft.federated import FederatedArguments, Group, RouterUpdate, register_method
from floral_peft.federated.routing import Gradient
from floral_peft.methods.floral import Floral
from floral_peft.tuner import FloralConfig, Role


@register_method
class LocalAdaptor(Floral):
    """Local Adaptor, a baseline of FLoRAL (Almansoori, Horváth, Takáč, CPAL 2025, arXiv 2410.03497, table 1).

    The base, where it trains, is averaged with p(k); each client has one adaptor, C = 1, which it keeps. It is partial
    personalisation (Pillutla et al., ICML 2022, arXiv 2204.03809): with `alternating`, which trains the adaptor first,
    it is their FedAlt, otherwise their FedSim.
    """

    name = "local_adaptor"

    def prepare(self, model: nn.Module, adaptors: FloralConfig) -> nn.Module:
        """Put a single adaptor into the base model."""
        return super().prepare(model, replace(adaptors, num_adaptors=1, router_top_k=None))

    def router_update(self, args: FederatedArguments, sampled: float) -> RouterUpdate:
        """One adaptor leaves nothing to find."""
        return Gradient(args, sampled)

    def group(self, name: str, role: Role) -> Group:
        """The adaptor is private, as is the router, which has nothing to choose; all else is shared."""
        return "private" if role.kind in ("adaptor", "router") else "shared"
