"""C full models, of which each client takes the one with the smallest loss."""

from __future__ import annotations

from floral_peft.federated import Arrival, Arrived, FederatedArguments, Turn, register_method
from floral_peft.methods.ensemble import EnsembleMethod


@register_method
class Ifca(EnsembleMethod):
    """IFCA (Ghosh et al., NeurIPS 2020, arXiv 2006.04088, algorithm 1 with model averaging).

    Whenever a client is visited, it estimates its cluster as ĉ = argmin_c F_k(w_c) on its training examples, and
    trains, or is evaluated with, model ĉ alone. The server averages model c over the clients that chose it, weighed by
    their examples. With `optimal_routing` nothing is estimated: it is FedAvg in each cluster.
    """

    name = "ifca"

    def arrival(self, args: FederatedArguments) -> Arrival | None:
        """Choose a cluster, unless it is known."""
        return None if args.optimal_routing else choose


def choose(turn: Turn) -> Arrived:
    """The client's private tensors with a router that is one-hot at the smallest loss, of equal ones at the first."""
    if not turn.num_examples:
        return Arrived(turn.private)
    return Arrived(turn.with_logits(turn.routers.pure()[int(turn.pure_losses().argmin())]))
