"""What a client's local training consists of: its phases, its batches, and each parameter's learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.batches import shuffled_batches
from floral_peft.federated.groups import ParameterGroups


def training_phases(trainable: Iterable[str], groups: ParameterGroups, alternating: bool) -> list[list[str]]:
    """Names of the parameters that train together; alternating: first what is private, then what is not.

    Alternating is FedAlt of Pillutla et al. (ICML 2022, arXiv 2204.03809), simultaneous is their FedSim.
    """
    chosen = set(trainable)
    private = [name for name in groups.private if name in chosen]
    public = [name for name in (*groups.shared, *groups.clustered) if name in chosen]
    if alternating:
        return [phase for phase in (private, public) if phase]
    return [private + public]


def optimizer_groups(
    parameters: Mapping[str, Tensor], groups: ParameterGroups, args: FederatedArguments
) -> list[dict[str, Any]]:
    """Base, adaptors and router, each with its own learning rate; the router has no weight decay."""
    rates = {
        "base": args.learning_rate,
        "adaptor": args.learning_rate if args.adaptor_learning_rate is None else args.adaptor_learning_rate,
        "router": args.learning_rate if args.router_learning_rate is None else args.router_learning_rate,
    }
    rates["shared_adaptor"] = rates["adaptor"]
    found = []
    for kind, rate in rates.items():
        held = [parameter for name, parameter in parameters.items() if groups.roles[name].kind == kind]
        if held:
            # Always said: an optimiser may have a decay of its own, as AdamW has.
            found.append({"params": held, "lr": rate, "weight_decay": 0.0 if kind == "router" else args.weight_decay})
    return found


class Pull:
    """Adds the gradient of λ/2 ‖w − anchor‖² to parameters that have an anchor.

    Args:
        parameters: Those that train. Stacked over clients, they have one dimension more than the anchors.
        anchors: Parameter → the name of its anchor.
        tensors: The server's tensors.
        weight: λ.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        anchors: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        weight: float,
    ) -> None:
        pulled = [name for name in parameters if name in anchors]
        self.names = pulled if weight else []
        self._anchors = [tensors[anchors[name]].to(parameters[name]) for name in self.names]
        self._weight = weight

    @torch.no_grad()
    def __call__(self, gradients: list[Tensor], values: Sequence[Tensor]) -> None:
        """Change gradients in place.

        Args:
            gradients: Of the parameters `names`, in their order.
            values: These parameters.
        """
        if self.names:
            torch._foreach_add_(gradients, torch._foreach_sub(list(values), self._anchors), alpha=self._weight)


def local_batches(num_examples: int, args: FederatedArguments, order: torch.Generator) -> Iterator[Tensor]:
    """The rows of each batch of a phase: so many epochs or steps, each epoch in a new order."""
    epochs = repeat(None) if args.local_steps else repeat(None, args.local_epochs)
    size = args.per_device_train_batch_size
    batches = chain.from_iterable(shuffled_batches(num_examples, size, order) for _ in epochs)
    return islice(batches, args.local_steps)


@contextmanager
def norms_frozen(norms: Iterable[nn.Module], frozen: bool) -> Iterator[None]:
    """Batch norm cannot train on one example, which has no variance: it takes its running statistics then."""
    changed = [module for module in norms if module.training] if frozen else []
    for module in changed:
        module.eval()
    try:
        yield
    finally:
        for module in changed:
            module.train()
