"""The tuner: what goes into a model. It knows nothing of rounds."""

from floral_peft.tuner.card import adapter_data, base_name, write_card
from floral_peft.tuner.centering import center_adaptors
from floral_peft.tuner.clip import base_weights, clip_steps
from floral_peft.tuner.config import FloralConfig
from floral_peft.tuner.ensemble import Ensemble, mixed, reinitialized
from floral_peft.tuner.export import Exported, ExportKind, check_free, export_client
from floral_peft.tuner.factors import factor_pairs
from floral_peft.tuner.fitting import prediction_doubt
from floral_peft.tuner.layers import FloralLayer
from floral_peft.tuner.low_rank import as_columns, as_factors, as_matrices, refactor
from floral_peft.tuner.model import FloralModel
from floral_peft.tuner.plain import save_plain
from floral_peft.tuner.precondition import precondition_gradients
from floral_peft.tuner.pure import PureModels, pure_losses
from floral_peft.tuner.registration import register
from floral_peft.tuner.roles import Role, buffer_roles, parameter_roles, private_buffers
from floral_peft.tuner.router import Router
from floral_peft.tuner.shrinking import Ranks
from floral_peft.tuner.substitute import Substitute


__all__ = [
    "Ensemble",
    "ExportKind",
    "Exported",
    "FloralConfig",
    "FloralLayer",
    "FloralModel",
    "PureModels",
    "Ranks",
    "Role",
    "Router",
    "Substitute",
    "adapter_data",
    "as_columns",
    "as_factors",
    "as_matrices",
    "base_name",
    "base_weights",
    "buffer_roles",
    "center_adaptors",
    "check_free",
    "clip_steps",
    "export_client",
    "factor_pairs",
    "mixed",
    "parameter_roles",
    "precondition_gradients",
    "prediction_doubt",
    "private_buffers",
    "pure_losses",
    "refactor",
    "register",
    "reinitialized",
    "save_plain",
    "write_card",
]
