"""The types of what a user gives a FederatedTrainer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.dataset import FederatedDataset


def check_types(model: object, args: object, dataset: object, **functions: object) -> None:
    """Check the arguments that must be given, and functions that may be None, by name.

    Raises:
        TypeError: One of them has another type.
    """
    for name, value, kind in (
        ("model", model, nn.Module),
        ("args", args, FederatedArguments),
        ("dataset", dataset, FederatedDataset),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}.")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}.")


def check_callbacks(
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None, args: FederatedArguments
) -> None:
    """Check what a user gives as callbacks.

    Raises:
        TypeError: Something is not a `TrainerCallback`, nor a class of them.
        ValueError: A callback needs settings that are missing.
    """
    if callbacks is not None and not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks must be a list of TrainerCallbacks, got {type(callbacks).__name__}.")
    for callback in callbacks or ():
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"callbacks must be TrainerCallbacks or classes of them, got {callback!r}.")
        if issubclass(kind, EarlyStoppingCallback) and None in (args.metric_for_best_model, args.eval_steps):
            raise ValueError(f"callbacks: {kind.__name__} needs eval_steps and metric_for_best_model.")
