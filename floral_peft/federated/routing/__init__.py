"""How clients find their routers: one object, in a file of its own, for each way."""

from floral_peft.federated.routing.gradient import Gradient
from floral_peft.federated.routing.mirror import Mirror
from floral_peft.federated.routing.posterior import Posterior
from floral_peft.federated.routing.prune import Drop, prune, regrets, told
from floral_peft.federated.routing.update import RouterUpdate, get_router_update, register_router_update


__all__ = [
    "Drop",
    "Gradient",
    "Mirror",
    "Posterior",
    "RouterUpdate",
    "get_router_update",
    "prune",
    "register_router_update",
    "regrets",
    "told",
]
