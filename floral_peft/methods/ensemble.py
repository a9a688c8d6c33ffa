"""C full models by cluster, mixed by a router that stays with its client."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from floral_peft.federated import Clustered, Group, Method, register_method
from floral_peft.tuner import Ensemble, FloralConfig, Role, reinitialized


#: What the methods with several models want, in an error.
ENSEMBLE = (
    "an Ensemble of models of one kind: `from floral_peft.tuner import Ensemble`, then model = "
    "Ensemble([model_1, ..., model_C]), each with initial weights of its own."
)


@register_method
class EnsembleMethod(Method):
    """Ensemble, a baseline of FLoRAL (Almansoori, Horváth, Takáč, CPAL 2025, arXiv 2410.03497, table 1).

    C full models take the place of the adaptors. A client's output is Σ_c πᵏ_c f_c(x), in training and afterwards, and
    all of it trains together; model c is averaged with p(k|c). With `optimal_routing` it is FedAvg in each cluster.
    """

    name = "ensemble"

    def prepare(self, model: nn.Module, adaptors: FloralConfig) -> nn.Module:
        """The base model, and C − 1 more of its kind that start anew: equal ones would stay equal."""
        return Ensemble([model, *(reinitialized(model) for _ in range(adaptors.num_adaptors - 1))], adaptors)

    def check(self, roles: Mapping[str, Role]) -> None:
        """Refuse a model that is no ensemble."""
        kinds = {role.kind for name, role in roles.items() if _member(name) is None}
        if kinds != {"router"} or not any(_member(name) is not None for name in roles):
            raise ValueError(f'method "{self.name}" needs {ENSEMBLE}')

    def group(self, name: str, role: Role) -> Group:
        """Model c belongs to cluster c; the router is private."""
        member = _member(name)
        return "private" if member is None else Clustered(adaptor=member)


def _member(name: str) -> int | None:
    """The number of the model to which a parameter of an `Ensemble` belongs; None for the router."""
    found = re.match(r"members\.(\d+)\.", name)
    return None if found is None else int(found[1])
