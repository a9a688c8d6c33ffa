"""New clients get their routers from a few examples, and nothing else happens to anybody."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from torch import Tensor, nn

from floral_peft.federated import get_method
from floral_peft.tuner import prediction_doubt

from .clients import examples, floral_net, model_for, net, tensors, trainer


def expected(run: Any, dataset: Any, loss: Any = nn.functional.cross_entropy) -> Tensor:
    """The posterior over pure models, by hand."""
    rows = dataset.with_format("torch")[:]
    sums = []
    for c in range(2):
        logits = torch.full((1, 1, 2), -1e4)
        logits[..., c] = 0.0
        run.model.set_routers(logits)
        run.model.eval()
        with torch.no_grad():
            sums.append(loss(run.model(rows["points"]), rows["labels"]) * len(dataset))
    run.model.set_routers(torch.zeros(1, 1, 2))
    return torch.softmax(-torch.stack(sums), dim=0)


@pytest.mark.parametrize("settings", [{}, {"router_update": "mirror"}, {"optimal_routing": True}])
def test_a_new_client_gets_the_posterior_over_the_adaptors(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = trainer(tmp_path, model=floral_net(init_weights=False), **settings)
    dataset = examples(5, seed=50)
    wanted = expected(run, dataset)
    found = run.personalize(dataset)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(run.model.mixture("new client"), found)


def test_the_posterior_router_discounts_labels_here_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=floral_net(init_weights=False), router_update="posterior")
    dataset = examples(5, seed=50)
    counts = torch.bincount(torch.tensor(dataset["labels"][:]), minlength=3) + 0.3
    prior = (counts / counts.sum()).log()
    wanted = expected(run, dataset, lambda logits, labels: nn.functional.cross_entropy(logits + prior, labels))
    torch.testing.assert_close(run.personalize(dataset), wanted, rtol=1e-4, atol=1e-6)


def test_nothing_else_changes(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    before, written = tensors(run.model), sorted(tmp_path.rglob("*"))
    ids, mixtures = run.mixtures()
    run.personalize({"hamlet": examples(3), 7: DatasetDict(train=examples(2, seed=9))})
    after = tensors(run.model)
    assert all(torch.equal(value, before[name]) for name, value in after.items() if "logits" not in name)
    assert sorted(tmp_path.rglob("*")) == written and len(run.records) == 2
    assert run.mixtures()[0] == ids and torch.equal(run.mixtures()[1], mixtures)
    for client_id, mixture in zip(ids, mixtures, strict=True):
        torch.testing.assert_close(run.model.mixture(client_id), mixture)
    assert run.model.active_peft_config.client_names[-2:] == ["hamlet", 7]


def test_several_clients_and_lists_of_examples(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=floral_net(init_weights=False))
    dataset = examples(4, seed=3)
    rows = list(dataset.with_format("torch"))
    told = run.personalize({"a": rows, "b": examples(6, seed=4)})
    assert list(told) == ["a", "b"] and not torch.equal(told["a"], told["b"])
    assert torch.equal(run.personalize(dataset, client="c"), told["a"])
    assert torch.equal(run.personalize(list(dataset), client="d"), told["a"])


def test_without_labels_the_surest_adaptors_are_chosen(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=floral_net(init_weights=False))

    dataset = examples(8, seed=50)
    wanted = expected(run, dataset, lambda logits, labels: prediction_doubt(logits))
    torch.testing.assert_close(run.personalize(dataset.remove_columns("labels")), wanted, rtol=1e-4, atol=1e-6)


def test_methods_of_several_models_find_routers_too(tmp_path: Path) -> None:
    for method in ("ensemble", "ifca"):
        run = trainer(tmp_path / method, method=method, model=model_for(method))
        found = run.personalize(examples(6))
        assert found.sum() == pytest.approx(1.0) and (method != "ifca" or found.max() == 1.0)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "no examples"),
        ({"client 1": [{"points": [0.0] * 4, "labels": 0}]}, ValueError, "one of the trainer's"),
        ({"x": DatasetDict(test=examples(2))}, ValueError, 'no "train"'),
        ({1.5: examples(2)}, TypeError, "a string or an int"),
        ({"x": 3}, TypeError, "a Dataset, a DatasetDict or a list of dictionaries, got int"),
        ({"x": [{"points": [0.0] * 3, "labels": 0}]}, ValueError, "client 'x': the model cannot be run"),
        ({"x": [{"points": [math.nan] * 4, "labels": 0}]}, ValueError, "client 'x': its losses .* are not finite"),
        ({"x": [{"points": [math.nan] * 4}]}, ValueError, "client 'x': its losses .* are not finite"),
    ],
)
def test_what_cannot_be_personalized_is_refused(
    tmp_path: Path, data: Any, error: type[Exception], message: str
) -> None:
    run = trainer(tmp_path)
    with pytest.raises(error, match=message):
        run.personalize(data)


def test_a_model_without_routers_has_nothing_to_personalize(tmp_path: Path) -> None:
    run = trainer(tmp_path, method="fedavg", model=get_method("fedavg").prepare(net(), None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no router to find"):
        run.personalize(examples(3))
