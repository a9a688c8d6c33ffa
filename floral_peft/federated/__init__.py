"""What happens to a model over rounds. It knows the tuner only by its parameters' roles."""

from floral_peft.federated.aggregation import ClientUpdate, UpdateError
from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.checkpoint import CheckpointError
from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.groups import Clustered, Group, ParameterGroups
from floral_peft.federated.lock import OutputDirInUseError
from floral_peft.federated.method import Method, get_method, method_names, register_method
from floral_peft.federated.processes import ProcessError
from floral_peft.federated.rounds import RoundReport, TooFewClientsError
from floral_peft.federated.routing import RouterUpdate, register_router_update
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.segments import StoreError
from floral_peft.federated.server import ServerState
from floral_peft.federated.trainer import FederatedTrainer
from floral_peft.federated.turn import Arrival, Arrived, Turn


__all__ = [
    "Arrival",
    "Arrived",
    "CheckpointError",
    "ClientId",
    "ClientUpdate",
    "Clustered",
    "FederatedArguments",
    "FederatedDataset",
    "FederatedTrainer",
    "Group",
    "Method",
    "OutputDirInUseError",
    "ParameterGroups",
    "ProcessError",
    "RoundReport",
    "RouterUpdate",
    "ServerState",
    "StoreError",
    "TooFewClientsError",
    "Turn",
    "UpdateError",
    "get_method",
    "method_names",
    "register_method",
    "register_router_update",
]
