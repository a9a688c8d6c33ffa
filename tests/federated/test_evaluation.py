"""Metrics of a client and over clients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, default_data_collator

from floral_peft.federated import FederatedDataset
from floral_peft.federated.evaluation import evaluate_client, summarize
from floral_peft.federated.forward import Forward

from .clients import population, trainer


class Shown(nn.Module):
    """Its logits are its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


DATA = Dataset.from_dict({"x": [[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]], "labels": [0, 1, 1]})


def evaluate(data: Dataset = DATA, loss_fn: Any = None, compute_metrics: Any = None) -> dict[str, float]:
    accelerator = Accelerator(cpu=True)
    forward = Forward(Shown(), loss_fn)
    return evaluate_client(Shown(), forward, data, default_data_collator, 2, accelerator, compute_metrics)


def test_loss_and_accuracy_are_means_over_examples() -> None:
    expected = np.mean([math.log1p(math.exp(-gap)) for gap in (2.0, 3.0, -1.0)])
    assert evaluate() == pytest.approx({"eval_loss": expected, "eval_accuracy": 2 / 3, "num_examples": 3})


def test_compute_metrics_sees_all_of_a_clients_predictions_at_once() -> None:
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"count": len(prediction.label_ids), "eval_named": 1}

    assert evaluate(compute_metrics=compute_metrics).keys() == {
        "eval_loss",
        "eval_count",
        "eval_named",
        "num_examples",
    }
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0].predictions, DATA["x"][:])
    np.testing.assert_array_equal(seen[0].label_ids, [0, 1, 1])


def pad(rows: list[Any]) -> dict[str, torch.Tensor]:
    """A collator that pads to the longest of the batch."""
    inputs = nn.utils.rnn.pad_sequence([torch.tensor(row["x"]) for row in rows], batch_first=True)
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {"x": inputs, "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}


def test_batches_of_different_lengths_are_padded_as_in_transformers() -> None:
    data = Dataset.from_dict({"x": [[[1.0]] * 2, [[2.0]], [[3.0]] * 3], "labels": [[1, 1], [2], [3, 3, 3]]})
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    accelerator, forward = Accelerator(cpu=True), Forward(Shown(), lambda outputs, labels: outputs.mean())
    evaluate_client(Shown(), forward, data, pad, 2, accelerator, compute_metrics)
    np.testing.assert_array_equal(seen[0].label_ids, [[1, 1, -100], [2, -100, -100], [3, 3, 3]])
    np.testing.assert_array_equal(np.squeeze(seen[0].predictions), [[1, 1, -100], [2, 0, -100], [3, 3, 3]])


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (None, "got NoneType"),
        (0.5, "got float"),
        ({"f1": np.ones(2)}, "'f1'"),
        ({"f1": None}, "'f1'"),
        ({1: 0.5}, "1"),
    ],
)
def test_metrics_that_are_not_numbers_by_name_are_refused(returned: Any, named: str) -> None:
    with pytest.raises(TypeError, match=f"compute_metrics must return a dictionary of names and numbers.*{named}"):
        evaluate(compute_metrics=lambda prediction: returned)


def test_any_scalar_is_a_metric() -> None:
    found = evaluate(compute_metrics=lambda prediction: {"a": np.float32(0.5), "b": torch.tensor(2), "c": True})
    assert (found["eval_a"], found["eval_b"], found["eval_c"]) == (0.5, 2.0, 1.0)


def test_a_task_without_classes_has_a_loss_only() -> None:
    data = Dataset.from_dict({"x": [[2.0], [0.0]], "labels": [[1.0], [1.0]]})
    assert evaluate(data, nn.functional.mse_loss) == {"eval_loss": 1.0, "num_examples": 2}


def metrics(loss: float, accuracy: float, examples: int = 1) -> dict[str, float]:
    return {"eval_loss": loss, "eval_accuracy": accuracy, "num_examples": examples}


def test_the_summary_weights_by_examples_and_by_clients() -> None:
    found = summarize({"a": metrics(1.0, 0.5, 10), "b": metrics(2.0, 1.0, 30)})
    assert (found["eval_loss"], found["eval_loss_client_mean"]) == (1.75, 1.5)
    assert (found["eval_accuracy"], found["eval_accuracy_client_mean"]) == (0.875, 0.75)


def test_the_worst_decile_is_the_worst_tenth_of_the_clients_rounded_up() -> None:
    found = summarize({k: metrics(k / 100, k / 100) for k in range(11)})
    assert found["eval_accuracy_worst_decile"] == pytest.approx(0.005)
    assert found["eval_loss_worst_decile"] == pytest.approx(0.095)


def test_a_client_without_a_number_is_left_out_of_that_metric() -> None:
    found = summarize({"a": metrics(1.0, math.nan, 5), "b": metrics(3.0, 0.5, 5)})
    assert (found["eval_loss"], found["eval_accuracy"]) == (2.0, 0.5)
    assert math.isnan(summarize({"a": metrics(1.0, math.nan)})["eval_accuracy_client_mean"])


def test_a_test_example_that_is_not_finite_is_told_with_its_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = population(num_clients=3)
    splits = {client_id: data[client_id] for client_id in data}
    points = splits["client 1"]["test"][:]
    points["points"][0][0] = math.nan
    splits["client 1"]["test"] = Dataset.from_dict(points)
    made = trainer(tmp_path, dataset=FederatedDataset(splits))
    assert math.isfinite(made.evaluate()["eval_loss"])
    assert math.isnan(made.client_metrics["client 1"]["eval_loss"])
    assert [r.getMessage() for r in caplog.records if "client 'client 1': its loss is not a number" in r.getMessage()]
    assert "client 'client 0'" not in caplog.text
