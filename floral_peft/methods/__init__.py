"""The federated methods. Importing this package makes them available by name."""

from floral_peft.methods.ditto import Ditto, Twin
from floral_peft.methods.ensemble import EnsembleMethod
from floral_peft.methods.fedavg import FedAvg
from floral_peft.methods.fedavg_finetune import FedAvgFinetune
from floral_peft.methods.fedem import FedEM
from floral_peft.methods.fedprox import FedProx
from floral_peft.methods.floral import Floral
from floral_peft.methods.ifca import Ifca
from floral_peft.methods.local_adaptor import LocalAdaptor
from floral_peft.methods.local_only import LocalOnly


__all__ = [
    "Ditto",
    "EnsembleMethod",
    "FedAvg",
    "FedAvgFinetune",
    "FedEM",
    "FedProx",
    "Floral",
    "Ifca",
    "LocalAdaptor",
    "LocalOnly",
    "Twin",
]
