"""Evaluating clients: each on its own examples with its own mixture, then summed up over clients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, SupportsFloat, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from floral_peft.federated.batches import Collator, Examples, ordered_batches
from floral_peft.federated.forward import Forward, is_classification
from floral_peft.federated.processes import Processes
from floral_peft.federated.seeding import ClientId


logger = logging.getLogger(__name__)


ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
Metrics = dict[str, float]
Visit = TypeVar("Visit")


@torch.no_grad()
def evaluate_client(
    model: nn.Module,
    forward: Forward,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    accelerator: Accelerator,
    compute_metrics: ComputeMetrics | None = None,
) -> Metrics:
    """Evaluate the model, as it is, on one client's examples.

    Args:
        model: The model with the client's mixture in it.
        forward: Calls it on a batch.
        dataset: At least one example.
        collator: Makes a batch from examples.
        batch_size: Examples in a batch.
        accelerator: Device and autocast.
        compute_metrics: As in transformers: `EvalPrediction` → metrics. By default the accuracy, where the outputs are
            logits (examples, classes) and the labels ints. As there, batches of different lengths are padded with
            −100 where they are put together.

    Returns:
        "eval_loss" (mean over examples), one "eval_..." per metric, and "num_examples".

    Raises:
        TypeError: `compute_metrics` returns anything but numbers by name.
    """
    model.eval()
    examples = Examples(dataset, collator, accelerator.device)
    loss, correct, classified = 0.0, 0, True
    logits: list[Any] = []
    labels: list[Any] = []
    for rows in ordered_batches(len(dataset), batch_size):
        with accelerator.autocast():
            prediction = forward(examples.batch(rows))
        loss += float(prediction.loss) * len(rows)
        if compute_metrics is not None:
            logits.append(_to_numpy(prediction.logits))
            labels.append(_to_numpy(prediction.labels))
        elif classified := classified and is_classification(prediction.logits, prediction.labels):
            correct += int((prediction.logits.argmax(dim=-1) == prediction.labels).sum())
    metrics: Mapping[str, float] = {"accuracy": correct / len(dataset)} if classified else {}
    if compute_metrics is not None:
        metrics = _checked(
            compute_metrics(EvalPrediction(predictions=_concatenate(logits), label_ids=_concatenate(labels)))
        )
    named = {name if name.startswith("eval_") else f"eval_{name}": float(value) for name, value in metrics.items()}
    return {"eval_loss": loss / len(dataset), **named, "num_examples": len(dataset)}


class Failure(NamedTuple):
    """Why a client could not be evaluated: the exception's type, for the records, and its text, for the log."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def evaluate_clients(
    visits: Iterable[tuple[ClientId, Callable[[], Visit]]],
    evaluate: Callable[[Visit], Metrics | None],
    processes: Processes,
    order: Iterable[ClientId],
) -> tuple[dict[ClientId, Metrics], dict[ClientId, Failure]]:
    """Evaluate clients, each process those that it visits. A client that raises is left out, and logged.

    Args:
        visits: This process's clients, each with a function that gives what `evaluate` takes.
        evaluate: Evaluates one of them; None for a client without examples.
        processes: Those that share the clients.
        order: All clients, in the order of the results.

    Returns:
        The clients' metrics and failures, the same in all processes.
    """
    found: list[tuple[ClientId, Metrics]] = []
    failed: list[tuple[ClientId, Failure]] = []
    for client_id, visit in visits:
        try:
            metrics = evaluate(visit())
        except Exception as error:  # as in training: a client's failure is its own loss
            failure = Failure(type(error).__name__, f"client {client_id!r}: {type(error).__name__}: {error}")
            logger.warning("evaluation: %s; left out", failure, exc_info=not failed)
            failed.append((client_id, failure))
            continue
        if metrics is not None:
            if math.isnan(metrics.get("eval_loss", 0.0)):
                logger.warning(
                    "evaluation: client %r: its loss is not a number, and is left out of the means of eval_loss: look "
                    "for examples that are not finite",
                    client_id,
                )
            found.append((client_id, metrics))
    if processes.count == 1:
        return dict(found), dict(failed)
    told = processes.collect((found, failed))
    everything = {client_id: metrics for part, _ in told for client_id, metrics in part}
    failures = {client_id: Failure(*failure) for _, part in told for client_id, failure in part}
    return {k: everything[k] for k in order if k in everything}, {k: failures[k] for k in order if k in failures}


def summarize(client_metrics: Mapping[ClientId, Metrics]) -> Metrics:
    """Sum the clients' metrics up.

    For each metric m: m is the mean over examples, `m_client_mean` the mean over clients, `m_worst_decile` the mean
    over the worst tenth of the clients (rounded up), which is the highest tenth for a loss and the lowest for anything
    else. Clients for whom a metric is not a number are left out of it.

    Args:
        client_metrics: What `evaluate_client` returned, by client.
    """
    names = dict.fromkeys(name for metrics in client_metrics.values() for name in metrics if name != "num_examples")
    summary: Metrics = {}
    for name in names:
        held = [metrics for metrics in client_metrics.values() if not math.isnan(metrics.get(name, math.nan))]
        if not held:
            summary |= dict.fromkeys((name, f"{name}_client_mean", f"{name}_worst_decile"), math.nan)
            continue
        values = np.array([metrics[name] for metrics in held])
        ascending = np.sort(values)
        tenth = math.ceil(len(values) / 10)
        worst = ascending[-tenth:] if name.endswith("loss") else ascending[:tenth]
        summary[name] = float(np.average(values, weights=[metrics["num_examples"] for metrics in held]))
        summary[f"{name}_client_mean"] = float(values.mean())
        summary[f"{name}_worst_decile"] = float(worst.mean())
    return summary


def _checked(metrics: Any) -> Mapping[str, float]:
    expected = "compute_metrics must return a dictionary of names and numbers"
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{expected}, got {type(metrics).__name__}.")
    for name, value in metrics.items():
        if not isinstance(name, str) or np.ndim(value) or not isinstance(value, SupportsFloat):
            raise TypeError(f"{expected}, got {name!r}: {value!r}. Return one number a metric, such as its mean.")
    return metrics


def _to_numpy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    if isinstance(value, (tuple, list)):
        return tuple(_to_numpy(item) for item in value)
    return value


def _concatenate(batches: list[Any]) -> Any:
    if isinstance(batches[0], tuple):
        return tuple(_concatenate(list(parts)) for parts in zip(*batches, strict=True))
    arrays = [np.atleast_1d(batch) for batch in batches]
    longest = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True))
    return np.concatenate([_pad(array, longest) for array in arrays])


def _pad(array: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Fill an array (examples, ...) with −100, which losses and metrics leave out, up to (examples, *sizes)."""
    missing = [(0, size - given) for size, given in zip(sizes, array.shape[1:], strict=True)]
    return np.pad(array, [(0, 0), *missing], constant_values=-100) if array.shape[1:] != sizes else array
