"""Clients trained side by side, as one batched computation, against the same clients in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from floral_peft.federated import FederatedDataset, ServerState
from floral_peft.federated.client import LocalTraining
from floral_peft.federated.cohort import InTurn
from floral_peft.federated.side_by_side import SideBySide
from floral_peft.methods import Twin
from floral_peft.tuner import Ensemble

from .clients import examples, floral_net, net, population, trainer


SIZES = (9, 4, 13, 1, 8, 13)  # in batches of 4: whole ones, rests of 1, and clients of one batch


def clients_of(sizes: tuple[int, ...] = SIZES, **how: Any) -> FederatedDataset:
    return FederatedDataset({f"client {k}": examples(size, seed=k, **how) for k, size in enumerate(sizes)})


VISITS = ExitStack()


@pytest.fixture(autouse=True)
def _visits_end() -> Iterator[None]:
    yield
    VISITS.close()


class Pair:
    """The two kinds of training over one trainer's clients, and what they made of them."""

    def __init__(self, folder: Path, method: str = "floral", model: Any = None, dataset: Any = None, **settings: Any):
        made = trainer(folder, method, model, dataset or clients_of(), **settings)
        VISITS.enter_context(made._visit())
        self.trainer = made
        self.in_turn, self.side_by_side = InTurn(LocalTraining(made._place)), SideBySide(made._place)
        self.state = ServerState.of(made.model, made._groups)

    def load(self, client_id: Any) -> Any:
        return self.trainer.dataset[client_id]["train"], self.trainer._clients.private(client_id)

    def run(self, training: Any, client_ids: Any = None) -> dict[Any, Any]:
        ids = list(self.trainer.dataset) if client_ids is None else client_ids
        return dict(zip(ids, training(ids, self.load, self.state), strict=True))


def assert_same(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    (update, private), (expected, expected_private) = one, other
    assert (update.client_id, update.round, update.num_examples) == (
        expected.client_id,
        expected.round,
        expected.num_examples,
    )
    assert update.train_loss == pytest.approx(expected.train_loss, rel=tolerance, abs=tolerance)
    assert update.deltas.keys() == expected.deltas.keys()
    assert private.keys() == expected_private.keys()
    pairs = [(update.deltas[n], value) for n, value in expected.deltas.items()]
    pairs += [(private[n], value) for n, value in expected_private.items()]
    if expected.usage is not None:
        pairs.append((update.usage, expected.usage))
    for found, value in pairs:
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.allclose(found, value, rtol=tolerance, atol=tolerance)


def agree(pair: Pair, tolerance: float = 2e-5) -> dict[Any, Any]:
    """Both kinds make the same of every client, and no client was trained alone. Returns what was made."""
    expected = pair.run(pair.in_turn)
    pair.side_by_side._alone = None  # type: ignore[assignment]
    found = pair.run(pair.side_by_side)
    for client_id, one in found.items():
        assert not isinstance(one, Exception), repr(one)
        assert_same(one, expected[client_id], tolerance)
    return found


def conv_net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), *norms, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(16, 3)
    )


def images(size: int, seed: int) -> Dataset:
    draw = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            "image": draw.normal(size=(size, 1, 8, 8)).astype(np.float32).tolist(),
            "label": draw.integers(0, 3, size).tolist(),
        }
    )


MODELS: dict[str, Any] = {
    "floral": lambda: ("floral", floral_net(init_std=0.3), None),
    "frozen base": lambda: ("floral", floral_net(train_base=False, shared_r=1), None),
    "batch norm": lambda: ("floral", floral_net(net(norm=True), adapt_norms=True), None),
    "batch norm with statistics of the adaptors": lambda: (
        "floral",
        floral_net(net(norm=True), adapt_norms="reparametrized"),
        None,
    ),
    "router of each layer": lambda: ("floral", floral_net(router_per_layer=True, router_top_k=1), None),
    "fedavg": lambda: ("fedavg", net(norm=True), None),
    "fedprox": lambda: ("fedprox", net(), None),
    "local models": lambda: ("local_only", net(norm=True), None),
    "local adaptors": lambda: ("local_adaptor", floral_net(num_adaptors=1, init_std=0.3), None),
    "a common and a personal model": lambda: ("ditto", Twin(net(norm=True)), None),
    "full models": lambda: ("ensemble", Ensemble([net(norm=True), net(norm=True, seed=1)]), None),
    "mixture of full models": lambda: ("fedem", Ensemble([net(norm=True), net(norm=True, seed=1)]), None),
    "convolutions": lambda: (
        "floral",
        floral_net(conv_net(norm=True), target_modules=["0", "4", "6"]),
        FederatedDataset({k: images(size, k) for k, size in enumerate(SIZES)}),
    ),
    "convolutions on a frozen base": lambda: (
        "floral",
        floral_net(conv_net(), target_modules=["0", "3", "5"], train_base=False),
        FederatedDataset({k: images(size, k) for k, size in enumerate(SIZES)}),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_side_by_side_is_in_turn_up_to_rounding(tmp_path: Path, kind: str) -> None:
    method, model, dataset = MODELS[kind]()
    agree(Pair(tmp_path, method, model, dataset, local_epochs=2))


SETTINGS: list[dict[str, Any]] = [
    {"optimizer_kwargs": {"momentum": 0.9, "nesterov": True}, "weight_decay": 0.1, "local_epochs": 2},
    {"optimizer_kwargs": {"momentum": 0.5}, "max_grad_norm": 0.1},
    {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.1, "local_epochs": 2},
    {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "local_steps": 5},
    {"alternating": True, "adaptor_learning_rate": 0.2, "router_learning_rate": 1.0},
    {"precondition": False, "local_steps": 3},
    {"precondition_epsilon": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("train_base", [True, False], ids=["trained", "frozen"])
def test_every_setting_means_the_same(tmp_path: Path, settings: dict[str, Any], train_base: bool) -> None:
    agree(Pair(tmp_path, model=floral_net(init_std=0.3, train_base=train_base), **settings), 1e-4)


class WithToken(nn.Module):
    """A token before the points and positions on all: of one example, the gradient of one is a part of the other's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 2, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, points: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(points), -1, -1), points.unsqueeze(1)], dim=1)
        out: Tensor = self.head((tokens + self.positions).flatten(1))
        return out


@pytest.mark.parametrize("limit", ["max_step_norm", "max_grad_norm"])
@pytest.mark.parametrize("batch", [1, 4])
def test_gradients_that_are_one_piece_of_memory_are_clipped_each_by_itself(
    tmp_path: Path, limit: str, batch: int
) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": batch, "learning_rate": 0.5, limit: 0.05}
    agree(Pair(tmp_path, model=floral_net(WithToken(), init_std=0.3), **settings))


@pytest.mark.parametrize("method", ["floral", "fedavg"])
@pytest.mark.parametrize(
    "optimizer", [{}, {"optimizer": "adam", "optimizer_kwargs": {"eps": 1e-3}}], ids=["sgd", "adam"]
)
def test_in_double_precision_they_agree_to_the_last_digits(
    tmp_path: Path, method: str, optimizer: dict[str, Any]
) -> None:
    # (Without a large eps Adam would divide what is left of a gradient that is zero by its own size.)
    base = net(norm=True).double()
    model = floral_net(base, adapt_norms=True).double() if method == "floral" else base
    settings: dict[str, Any] = {"data_collator": _double, "local_epochs": 2, "learning_rate": 0.03}
    agree(Pair(tmp_path, method, model, max_grad_norm=1.0, **settings, **optimizer), 1e-9)


def _double(rows: list[Any]) -> dict[str, Tensor]:
    points = torch.tensor([row["points"] for row in rows], dtype=torch.float64)
    return {"points": points, "labels": torch.tensor([row["labels"] for row in rows])}


def test_dropout_and_noise_are_drawn_as_if_the_client_were_alone(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))
    agree(Pair(tmp_path, model=floral_net(base, router_noise=1.0, init_std=0.3), local_epochs=2))


def test_what_the_collator_draws_is_the_clients_own(tmp_path: Path) -> None:
    def noisy(rows: list[Any]) -> dict[str, Tensor]:
        points = torch.tensor([row["points"] for row in rows])
        points = points + torch.rand_like(points) + float(np.random.rand())
        return {"points": points, "labels": torch.tensor([row["labels"] for row in rows])}

    base = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))
    agree(Pair(tmp_path, "fedavg", base, data_collator=noisy, local_epochs=2))


def test_a_client_gets_the_same_in_any_company(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))
    pair = Pair(tmp_path, model=floral_net(base), local_epochs=2)
    together = pair.run(pair.side_by_side)
    for client_ids in (["client 2"], ["client 4", "client 2"], ["client 2", "client 5", "client 3"]):
        assert_same(pair.run(pair.side_by_side, client_ids)["client 2"], together["client 2"])


def test_sequences_of_unequal_length_step_together_where_they_fit(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            found: Tensor = self.head(self.embed(tokens).mean(dim=1))
            return found

    def padded(rows: list[Any]) -> dict[str, Tensor]:
        longest = max(len(row["tokens"]) for row in rows)
        tokens = torch.tensor([row["tokens"] + [0] * (longest - len(row["tokens"])) for row in rows])
        return {"tokens": tokens, "labels": torch.tensor([row["labels"] for row in rows])}

    draw = np.random.default_rng(0)
    clients = {
        k: Dataset.from_dict(
            {
                "tokens": [draw.integers(0, 10, draw.integers(1, 5)).tolist() for _ in range(size)],
                "labels": draw.integers(0, 3, size).tolist(),
            }
        )
        for k, size in enumerate(SIZES)
    }
    torch.manual_seed(0)
    model = floral_net(Mean(), target_modules=["embed", "head"])
    agree(Pair(tmp_path, model=model, dataset=FederatedDataset(clients), data_collator=padded))


def test_bfloat16_is_served(tmp_path: Path) -> None:
    agree(Pair(tmp_path, bf16=True), 2e-2)


def test_optimal_routing_holds_each_router_still(tmp_path: Path) -> None:
    agree(Pair(tmp_path, dataset=population(4), optimal_routing=True))


def test_a_client_that_fails_costs_only_itself(tmp_path: Path) -> None:
    broken = Dataset.from_dict({"points": [[0.0] * 4] * 6, "labels": [0, 1, 2, 0, 1, 99]})
    narrow = Dataset.from_dict({"points": [[0.0] * 3] * 6, "labels": [0, 1, 2, 0, 1, 2]})
    good = {f"client {k}": examples(8, seed=k) for k in range(3)}
    pair = Pair(tmp_path, dataset=FederatedDataset(good | {"broken": broken, "narrow": narrow, "gone": examples(8)}))
    load = pair.load

    def missing(client_id: Any) -> Any:
        if client_id == "gone":
            raise OSError("cannot be read")
        return load(client_id)

    pair.load = missing  # type: ignore[method-assign]
    found, expected = pair.run(pair.side_by_side), pair.run(pair.in_turn)
    assert {name: type(one) for name, one in found.items() if isinstance(one, Exception)} == {
        "broken": IndexError,
        "narrow": RuntimeError,
        "gone": OSError,
    }
    for name in good:
        assert_same(found[name], expected[name])


def test_the_model_is_left_as_local_training_leaves_it(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    frozen = {name: value.clone() for name, value in pair.trainer.model.named_parameters()}
    pair.run(pair.side_by_side)
    pair.trainer._rest(pair.state)
    for name, parameter in pair.trainer.model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.grad is None
        assert torch.equal(parameter, frozen[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "rmsprop"}, "optimizer='rmsprop' is none of adam, adamw, sgd"),
        ({"optimizer_kwargs": {"momentum": 0.9, "dampening": 0.1}}, "optimizer='sgd' is given dampening=0.1"),
        ({"optimizer": "adam", "optimizer_kwargs": {"amsgrad": True}}, "optimizer='adam' is given amsgrad=True"),
    ],
)
def test_what_cannot_be_batched_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pair(tmp_path, **settings)


def rounds(folder: Path, **settings: Any) -> Any:
    made = trainer(folder, dataset=clients_of(), save_steps=1, router_learning_rate=0.5, **settings)
    made.train(resume_from_checkpoint=settings.get("rounds", 2) > 2)
    return made


@pytest.mark.parametrize("stateless", [False, True])
def test_a_run_side_by_side_is_a_run_in_turn_up_to_rounding(tmp_path: Path, stateless: bool) -> None:
    loop, vectorized = (rounds(tmp_path / kind, cohort=kind, stateless=stateless) for kind in ("loop", "vectorized"))
    for name, value in loop.model.state_dict().items():
        assert torch.allclose(vectorized.model.state_dict()[name], value, atol=2e-5), name
    assert torch.allclose(vectorized.mixtures()[1], loop.mixtures()[1], atol=2e-5)
    for one, other in zip(vectorized.records, loop.records, strict=True):
        assert one["clients_trained"] == other["clients_trained"] == len(SIZES)
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_a_resumed_run_side_by_side_has_the_bits_of_one_that_went_on(tmp_path: Path) -> None:
    rounds(tmp_path / "resumed", cohort="vectorized", rounds=2)
    resumed = rounds(tmp_path / "resumed", cohort="vectorized", rounds=4)
    whole = trainer(tmp_path / "whole", dataset=clients_of(), router_learning_rate=0.5, cohort="vectorized", rounds=4)
    whole.train()
    assert all(
        torch.equal(value, resumed.model.state_dict()[name]) for name, value in whole.model.state_dict().items()
    )
    assert [record["train_loss"] for record in whole.records] == [record["train_loss"] for record in resumed.records]
