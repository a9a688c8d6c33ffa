"""Whether a run discounts its clients' labels."""

from __future__ import annotations

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.forward import Forward
from floral_peft.federated.routing.update import RouterUpdate


def discounts_labels(args: FederatedArguments, update: RouterUpdate, forward: Forward) -> bool:
    """What `label_prior` says; by default, what the router's update asks for.

    Raises:
        ValueError: It is asked for, but the method has a loss of its own that cannot.
    """
    if args.label_prior and not forward.discounts_labels:
        raise ValueError(f"label_prior=True: {type(forward).__name__} has a loss that cannot discount labels.")
    return update.discounts_labels if args.label_prior is None else args.label_prior
