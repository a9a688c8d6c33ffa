"""Clients that keep nothing: their routers are relearned from the losses of the pure models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floral_peft.federated import FederatedArguments

from .clients import floral_net, population, tensors, trainer


STATELESS: dict[str, Any] = {"stateless": True, "router_learning_rate": 3.0}


def started(**config: Any) -> Any:
    """A model whose adaptors differ from the start."""
    return floral_net(init_std=0.7, **config)


def pure_losses(run: Any, client_id: str) -> Tensor:
    data = run.dataset[client_id]["train"]
    points, labels = torch.tensor(data["points"][:]), torch.tensor(data["labels"][:])
    losses = []
    for adaptor in range(2):
        one_hot = torch.full((1, *run._routers.shape), -1e4)
        one_hot[..., adaptor] = 0.0
        run.model.set_routers(one_hot, [client_id])
        with run.model.client(client_id), torch.no_grad():
            losses.append(nn.functional.cross_entropy(run.model(points), labels))
    return torch.stack(losses)


@pytest.mark.parametrize("config", [{}, {"router_per_layer": True}, {"router_temperature": 2.5}])
def test_a_router_is_relearned_by_one_step_of_exponentiated_gradient(tmp_path: Path, config: dict[str, Any]) -> None:
    run = trainer(tmp_path, model=started(**config), **STATELESS)
    ids, mixtures = run.mixtures()
    for client_id, mixture in zip(ids, mixtures, strict=True):
        expected = torch.softmax(-3.0 * pure_losses(run, client_id), dim=0)
        assert torch.allclose(mixture, expected, atol=1e-5)
    assert len({tuple(row.tolist()) for row in mixtures}) == 4


def test_nothing_private_is_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), save_steps=1, eval_steps=1, **STATELESS)
    run.train()
    assert not (tmp_path / "private").exists()
    assert not run.model.router.logits["default"].any()  # the model holds no client's router either


def test_what_a_round_finds_does_not_depend_on_rounds_before(tmp_path: Path) -> None:
    long = trainer(tmp_path / "a", model=started(), rounds=4, save_steps=2, **STATELESS)
    long.train()
    again = trainer(tmp_path / "b", model=started(), rounds=2, **STATELESS)
    again.train()
    resumed = trainer(tmp_path / "a", model=started(), rounds=4, save_steps=2, **STATELESS)
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert all(torch.equal(value, tensors(resumed.model)[name]) for name, value in tensors(long.model).items())
    assert torch.equal(long.mixtures()[1], resumed.mixtures()[1])
    assert not torch.equal(long.mixtures()[1], again.mixtures()[1])


def test_clusters_are_found_without_keeping_anything(tmp_path: Path) -> None:
    data = population(num_clients=4, num_examples=60)
    run = trainer(tmp_path, model=started(), dataset=data, rounds=12, learning_rate=0.3, **STATELESS)
    run.train()
    chosen = run.mixtures()[1].argmax(dim=1).tolist()
    assert chosen[0] == chosen[2] != chosen[1] == chosen[3]
    assert run.records[-1]["mismatch"] < run.records[0]["mismatch"]


def test_local_steps_leave_a_relearned_router_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=started(), alternating=True, **STATELESS)
    run.train()
    assert run.records[0]["usage"] is not None


def test_stateless_needs_routers_that_can_be_learned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stateless=True needs a model with FLORAL adaptors"):
        trainer(tmp_path, "fedavg", stateless=True)
    with pytest.raises(ValueError, match="stateless=True and optimal_routing=True exclude each other"):
        FederatedArguments(stateless=True, optimal_routing=True)
