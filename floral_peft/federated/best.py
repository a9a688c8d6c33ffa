"""The best evaluation so far, and what callbacks remember, under transformers' rules."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import ExportableState, TrainerCallback

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.nearest import did_you_mean


logger = logging.getLogger(__name__)

_BEST = ("best_metric", "best_global_step", "best_model_checkpoint")


def note_evaluation(args: FederatedArguments, state: TrainerState, metrics: Mapping[str, float]) -> bool:
    """Remember an evaluation that is better than all before it, by `args.metric_for_best_model`.

    Returns:
        Whether it is.

    Raises:
        ValueError: The evaluation has no such metric; the message names the nearest.
    """
    if args.metric_for_best_model is None:
        return False
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r}: the evaluation has no {name}"
            f"{did_you_mean(name, metrics)} It has {', '.join(metrics)}."
        )
    value, best = metrics[name], state.best_metric
    better = best is None or (value > best if args.greater_is_better else value < best)
    if not better or math.isnan(value):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True


def exported(state: TrainerState, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    """What a checkpoint must hold of the best evaluation and of callbacks, as JSON can hold it."""
    remembering = {
        type(one).__name__: one.state()["attributes"] for one in callbacks if isinstance(one, ExportableState)
    }
    return {"callbacks": remembering, **{name: getattr(state, name) for name in _BEST}}


def restore(saved: Mapping[str, Any], state: TrainerState, callbacks: Sequence[TrainerCallback]) -> None:
    """Set what `exported` told, or where nothing was saved what holds before the first evaluation."""
    for name in _BEST:
        setattr(state, name, saved.get(name))
    for one in callbacks:
        if isinstance(one, ExportableState):
            remembered = saved.get("callbacks", {}).get(type(one).__name__, {})
            for attribute in one.state()["attributes"].keys() & remembered.keys():  # no others, whatever a file says
                setattr(one, attribute, remembered[attribute])
