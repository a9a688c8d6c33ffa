"""What makes a run that run: settings that a checkpoint remembers, so that no other run goes on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.files import digest


#: Settings that may change when a run is resumed: how long, where, how often something is written, what is shown.
_FREE = (
    "output_dir",
    "overwrite_output_dir",
    "rounds",
    "min_clients",
    "finetune_epochs",
    "per_device_eval_batch_size",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "disable_tqdm",
    "use_cpu",
    "ddp_timeout",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
#: Fields of the models' configs that say where a model is from or what was last done with it.
_PROVENANCE = (
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "auto_mapping",
    "base_model_name_or_path",
    "client_names",
    "inference_mode",
    "num_clients",
    "peft_version",
    "revision",
)

#: Name of a setting → its value, as JSON holds it.
Identity = dict[str, Any]


def identity(args: FederatedArguments, method: str, dataset: FederatedDataset, model: nn.Module) -> Identity:
    """What defines a run, by the names that an error tells. Clients' ids are in it as a digest only."""
    settings = {name: value for name, value in args.to_dict().items() if name not in _FREE}
    clients = dataset.digest(with_clusters=args.optimal_routing)
    found: Identity = {"method": method, **settings, "the clients' ids": clients}
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, Mapping):
        for adapter in getattr(model, "active_adapters", adapters):
            kind = type(adapters[adapter]).__name__
            found |= {f"{kind}.{name}": value for name, value in _fields(adapters[adapter]).items()}
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        found["the model's config"] = _digest(_fields(config))
    plain: Identity = json.loads(_json(found))
    return plain


def differing(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The name of the first setting that two runs have both, but not alike."""
    return next((name for name, value in ours.items() if name in saved and saved[name] != value), None)


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _PROVENANCE}


def _digest(value: Any) -> str:
    return digest(_json(value).encode("utf-8", "surrogatepass"))[:12]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)
