"""Finding one client's router from a handful of its examples: C numbers, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model gives for a batch, or what stands in for it where the batch has no labels.

    For a classifier that is `prediction_doubt`.

    Args:
        model: takes the batch by keyword where that is a mapping.
        batch: tensors are moved to the model's device.

    Raises:
        ValueError: the model returns no loss, and its outputs are not those of a classifier.
        TypeError: the model does not take the batch's columns.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        try:
            outputs = model(**{name: _on(device, value) for name, value in batch.items()})
        except TypeError as error:
            if "keyword argument" not in str(error) and "required positional argument" not in str(error):
                raise  # of what happens inside, not of the columns
            raise TypeError(
                f"the model does not take the batch's columns {sorted(batch)} by keyword ({error}): give "
                "loss=..., which runs the model on a batch and returns the loss."
            ) from error
    else:
        outputs = model(_on(device, batch))
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is not None:
        return torch.as_tensor(loss)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    return prediction_doubt(logits)


#: How much it counts that predictions differ. All of it would fail clients that have few of the labels.
_VARIETY = 0.5


def prediction_doubt(logits: Any) -> Tensor:
    """How little a classifier seems to fit inputs whose labels are not known, in nats, a scalar.

        H(p(y|x)) averaged over the n examples, less half of (1 − 1/n) H(the mean of p(y|x))

    A model that fits the inputs is sure of each prediction, and does not say the same of all. (With the whole of the
    second term this is, with its sign turned, the mutual information of inputs and predictions: Bridle, Heading and
    MacKay, NeurIPS 1991. Half of it holds up where a client has few of the labels, too.)

    Args:
        logits: (examples, classes).

    Raises:
        ValueError: they are anything else.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[-1] < 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"Without labels a router is found by how sure a classifier is, which needs logits (examples, classes); "
            f"got {found}. Give examples with labels, or a loss=... that needs none."
        )
    predictions = logits.float().softmax(dim=-1)
    entropy = torch.special.entr(predictions).sum(dim=-1).mean()
    variety = torch.special.entr(predictions.mean(dim=0)).sum()
    return entropy - _VARIETY * (1 - 1 / len(logits)) * variety


def evidence(losses: Tensor, batch: Any) -> Tensor:
    """Σ_i f_c(x_i) over a batch's examples, (C,).

    Args:
        losses: of the pure models, (C,) where they are the batch's mean, else (C, examples, ...).
        batch: says how many examples it has, where the losses are means.
    """
    return losses * _count(batch) if losses.dim() == 1 else losses.flatten(1).sum(dim=1)


def posterior(evidence: Tensor, prior: Tensor | None, temperature: float) -> Tensor:
    """Log of π_c ∝ prior_c exp(−Σ_i f_c(x_i) / temperature), up to a constant: the largest is 0. (C,), float32.

    Args:
        evidence: Σ_i f_c(x_i), (C,).
        prior: (C,), at least 0 with a sum above 0; None: uniform.
        temperature: above 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0.")
    if not bool(evidence.isfinite().all()):
        raise ValueError(f"The losses of the pure models are not finite: {evidence.tolist()}. Look at the examples.")
    logs = -evidence.double() / temperature
    if prior is not None:
        prior = torch.as_tensor(prior, dtype=torch.float64, device=logs.device)
        if prior.shape != logs.shape or not bool((prior >= 0).all()) or not 0 < float(prior.sum()) < torch.inf:
            raise ValueError(
                f"prior must be {len(logs)} numbers of at least 0 with a sum above 0, got {prior.tolist()}."
            )
        logs = logs + prior.log()
    return (logs - logs.max()).clamp(min=_NEVER).float()


#: Log of a weight that is 0 in float32, and yet a number that may be saved.
_NEVER = -1e4


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _count(batch: Any) -> int:
    """How many examples a batch holds: the length of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError(
        f"How many examples are in a batch of type {type(batch).__name__}? Give a loss=... that returns one number "
        "per example."
    )
