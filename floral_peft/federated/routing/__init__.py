"""How clients find their routers: one object, in a file of its own, for each way."""

from floral_peft.federated.routing.gradient import Gradient
from floral_peft.federated.routing.labels import discounts_labels
from floral_peft.federated.routing.mirror import Mirror
from floral_peft.federated.routing.posterior import Posterior
from floral_peft.federated.routing.update import RouterUpdate, get_router_update, register_router_update


__all__ = [
    "Gradient",
    "Mirror",
    "Posterior",
    "RouterUpdate",
    "discounts_labels",
    "get_router_update",
    "register_router_update",
]
