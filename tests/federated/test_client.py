"""One client's local training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from floral_peft.federated import ServerState
from floral_peft.federated.aggregation import ClientUpdate, UpdateError
from floral_peft.federated.client import LocalTraining
from floral_peft.federated.plain_sgd import PlainSGD

from .clients import examples, floral_net, net, population, tensors, trainer


VISITS = ExitStack()


@pytest.fixture(autouse=True)
def _visits_end() -> Iterator[None]:
    yield
    VISITS.close()


def local(folder: Path, method: str = "floral", model: Any = None, **settings: Any) -> Any:
    """Trains a client of given examples from round 1, as the trainer does."""
    made = trainer(folder, method, model, **settings)
    VISITS.enter_context(made._visit())
    training = LocalTraining(made._place)
    state = ServerState.of(made.model, made._groups)

    def train(client_id: str = "client 0", data: Dataset | None = None, private: Any = None) -> Any:
        return training(
            client_id, examples(12) if data is None else data, private or made._clients.private(client_id), state
        )

    train.trainer, train.state = made, state  # type: ignore[attr-defined]
    return train


def same(one: ClientUpdate, other: ClientUpdate) -> bool:
    return all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)


@pytest.mark.parametrize("method", ["floral", "fedavg"])
def test_a_clients_result_does_not_depend_on_who_was_there_before(tmp_path: Path, method: str) -> None:
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
    start = tensors(base)

    def fresh() -> Any:
        base.load_state_dict(start)
        return floral_net(base, router_noise=1.0) if method == "floral" else base

    model = fresh()
    train = local(tmp_path, method, model, optimizer="adam", learning_rate=0.01)
    alone, own = train("b", examples(7, seed=5))
    train("a", examples(20, seed=6))
    after, own_after = train("b", examples(7, seed=5))
    assert same(alone, after)
    assert all(torch.equal(own[name], own_after[name]) for name in own)
    assert any(delta.abs().max() > 0 for delta in alone.deltas.values())


def test_statistics_that_nobody_shares_are_reset_between_clients(tmp_path: Path) -> None:
    model = floral_net(net(norm=True), train_base=False)
    before = {name: value.clone() for name, value in model.named_buffers()}
    train = local(tmp_path, model=model)
    first, _ = train("a")
    train("b", examples(9, seed=3))
    again, _ = train("a")
    assert same(first, again)
    train.trainer._rest(train.state)
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_the_payload_holds_the_allow_list_and_nothing_of_the_router(tmp_path: Path) -> None:
    train = local(tmp_path, router_learning_rate=1.0)
    update, private = train()
    groups = train.trainer._groups
    assert set(update.deltas) == set(groups.public)
    assert set(private) == set(groups.private)
    assert vars(update).keys() == {"client_id", "round", "num_examples", "usage", "deltas", "train_loss", "sums"}
    assert not update.sums
    assert (private[groups.private[0]] != 0).any()


def test_usage_is_the_mixture_after_training_times_the_examples(tmp_path: Path) -> None:
    train = local(tmp_path, router_learning_rate=1.0)
    update, private = train()
    (logits,) = private.values()
    assert torch.allclose(update.usage, torch.softmax(logits[0].double(), dim=-1) * 12, atol=1e-6)
    assert update.num_examples == 12


def test_one_step_of_sgd_is_the_gradient_by_each_parameters_own_rate(tmp_path: Path) -> None:
    rates: dict[str, Any] = {"learning_rate": 0.5, "adaptor_learning_rate": 0.25, "router_learning_rate": 2.0}
    train = local(
        tmp_path,
        model=floral_net(init_std=0.1),
        local_steps=1,
        per_device_train_batch_size=12,
        precondition=False,
        **rates,
    )
    made = train.trainer
    update, private = train()
    made._rest(train.state)
    batch = examples(12)
    loss = nn.functional.cross_entropy(made.model(torch.tensor(batch["points"][:])), torch.tensor(batch["labels"][:]))
    loss.backward()
    by_kind = {"base": 0.5, "adaptor": 0.25, "router": 2.0}
    for name, parameter in made.model.named_parameters():
        kind = made._groups.roles[name].kind
        step = private[name] if kind == "router" else update.deltas[name]
        assert torch.allclose(step, -by_kind[kind] * parameter.grad, atol=1e-6), name
        assert parameter.grad.abs().max() > 0


def test_the_adaptors_gradient_is_preconditioned_unless_told_otherwise(tmp_path: Path) -> None:
    plain, _ = local(tmp_path, model=floral_net(init_std=0.1), local_steps=1, precondition=False)()
    scaled, _ = local(tmp_path, model=floral_net(init_std=0.1), local_steps=1)()
    factors = [name for name in plain.deltas if "floral_A" in name or "floral_B" in name]
    assert not any(torch.equal(plain.deltas[name], scaled.deltas[name]) for name in factors)
    assert all(torch.equal(plain.deltas[name], scaled.deltas[name]) for name in plain.deltas if "base_layer" in name)


def test_a_rate_of_zero_holds_its_group_still(tmp_path: Path) -> None:
    update, private = local(tmp_path, adaptor_learning_rate=0.0, router_learning_rate=0.0)()
    assert all(bool(delta.any()) == ("floral_" not in name) for name, delta in update.deltas.items())
    assert not any(value.any() for value in private.values())


def test_weight_decay_spares_the_router(tmp_path: Path) -> None:
    train = local(tmp_path, weight_decay=1.0, learning_rate=1e-3, router_learning_rate=1e-6)
    start = {name: torch.full_like(value, 5.0) for name, value in train.trainer._adaptors.untrained.items()}
    update, private = train(private=start)
    assert all(torch.allclose(private[name], start[name], atol=1e-4) for name in start)
    weights = [name for name in update.deltas if name.endswith("base_layer.weight")]
    assert all((update.deltas[name] * train.state.tensors[name]).sum() < 0 for name in weights)


def test_alternating_trains_the_router_first_with_the_rest_held_still(tmp_path: Path) -> None:
    rates: dict[str, Any] = {"learning_rate": 0.0, "router_learning_rate": 0.5}
    router_only, own = local(tmp_path, model=floral_net(init_std=0.5), **rates)()
    rates["learning_rate"] = 0.1
    alternating, own_alternating = local(tmp_path, model=floral_net(init_std=0.5), alternating=True, **rates)()
    assert not any(delta.any() for delta in router_only.deltas.values())
    # (A frozen layer computes its gradients in another way.)
    assert all(torch.allclose(own[name], own_alternating[name], atol=1e-6) for name in own)
    assert all(delta.any() for name, delta in alternating.deltas.items() if "bias" not in name)


@pytest.mark.parametrize(("settings", "steps"), [({"local_epochs": 2}, 6), ({"local_steps": 4}, 4), ({}, 3)])
def test_local_epochs_and_steps_are_counted(tmp_path: Path, settings: dict[str, int], steps: int) -> None:
    counted: list[int] = []

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        counted.append(len(labels))
        return outputs.sum()

    local(tmp_path, "fedavg", loss_fn=loss_fn, **settings)()
    assert len(counted) == steps


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_of_one_example_does_not_upset_batch_norm(tmp_path: Path, count: int) -> None:
    model = net(norm=True)
    update, _ = local(tmp_path, "fedavg", model)(data=examples(count))
    assert all(bool(delta.isfinite().all()) for delta in update.deltas.values())
    assert all(module.training for module in model.modules())


def test_a_client_of_one_class_trains_without_nan(tmp_path: Path) -> None:
    data = examples(30).filter(lambda example: example["labels"] == 1)
    update, _ = local(tmp_path)(data=data)
    assert all(bool(delta.isfinite().all()) for delta in update.deltas.values())


def test_a_client_without_examples_is_named(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="client 'client 0' has no training examples"):
        local(tmp_path)(data=examples(3).select([]))


def test_a_failing_client_leaves_no_gradient_and_no_frozen_parameter(tmp_path: Path) -> None:
    def fail(outputs: Any, labels: Any) -> Any:
        outputs.sum().backward()
        raise RuntimeError("broken")

    model = floral_net()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    train = local(tmp_path, model=model, loss_fn=fail, alternating=True)
    with pytest.raises(RuntimeError, match="broken"):
        train()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_a_half_precision_model_is_averaged_in_single_precision(tmp_path: Path) -> None:
    train = local(
        tmp_path,
        "fedavg",
        net().to(torch.bfloat16),
        loss_fn=lambda out, labels: out.float().square().mean(),
        data_collator=_bfloat16,
    )
    update, _ = train()
    assert {value.dtype for value in (*train.state.tensors.values(), *update.deltas.values())} == {torch.float32}
    assert any(delta.any() for delta in update.deltas.values())


def _bfloat16(rows: list[Any]) -> dict[str, Any]:
    return {"points": torch.tensor([row["points"] for row in rows]).bfloat16(), "labels": torch.zeros(len(rows))}


def test_bf16_trains_single_precision_weights(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, labels)

    train = local(tmp_path, model=floral_net(), loss_fn=loss_fn, bf16=True)
    update, _ = train()
    assert set(seen) == {torch.bfloat16}
    assert {delta.dtype for delta in update.deltas.values()} == {torch.float32}


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(tmp_path: Path) -> None:
    update, _ = local(tmp_path, "fedavg", local_steps=1, learning_rate=1.0, max_grad_norm=1e-3)()
    norm = torch.cat([delta.flatten() for delta in update.deltas.values()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_optimal_routing_is_one_hot_and_holds_still(tmp_path: Path) -> None:
    train = local(tmp_path, dataset=population(4), optimal_routing=True, router_learning_rate=10.0)
    update, private = train("client 3")
    assert update.usage.tolist() == [[0.0, 12.0]]
    assert all(torch.equal(private[name], train.trainer._clients.private("client 3")[name]) for name in private)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_plain_sgd_takes_the_steps_of_torch(decay: float) -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5), torch.randn(2)]
    ends = []
    for kind in (PlainSGD, torch.optim.SGD):
        parameters = [nn.Parameter(value.clone()) for value in start]
        optimizer: Any = kind(
            [
                {"params": parameters[:2], "lr": 0.3, "weight_decay": decay},
                {"params": parameters[2:], "lr": 0.7, "weight_decay": 0.0},
            ]
        )
        for _ in range(3):
            for index, parameter in enumerate(parameters):  # the last has no gradient
                parameter.grad = None if index == 2 else parameter.detach().sin()
            optimizer.step()
        ends.append(parameters)
    for own, other in zip(*ends, strict=True):
        assert torch.equal(own, other)
