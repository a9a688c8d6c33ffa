"""Local steps are made with the adaptors that a client uses, and come out as if all had taken part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floral_peft.federated import ServerState, get_method
from floral_peft.federated import used_adaptors as used_module
from floral_peft.federated.client import LocalTraining
from floral_peft.federated.cohort import InTurn
from floral_peft.federated.forward import Forward
from floral_peft.federated.routers import Routers
from floral_peft.federated.routing import schedule
from floral_peft.federated.side_by_side import SideBySide
from floral_peft.federated.used_adaptors import GROUP_COST, AdaptorAxes, grouped_by_use, narrowed, used_adaptors
from floral_peft.tuner import FloralLayer

from .clients import floral_net, net, population, tensors, trainer


ADAPTORS = 4
NEVER = -1e4
#: The adaptors of client 0, 1, ...: none uses all, one uses several.
USED = ([0], [2], [1, 3], [2])


@pytest.fixture
def visits() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


def model_of(**config: Any) -> Any:
    return floral_net(net(norm=True), num_adaptors=ADAPTORS, init_std=0.5, adapt_norms=True, **config)


def routers(layers: int = 1) -> dict[str, Tensor]:
    found = {}
    for k, used in enumerate(USED):
        logits = torch.full((1, layers, ADAPTORS), NEVER)
        logits[..., used] = torch.linspace(0.0, 0.4, len(used))
        found[f"client {k}"] = logits
    return found


def note(counts: set[int]) -> Any:
    """A hook that notes how many adaptors a layer has when it is called to learn."""

    def hook(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            counts.add(len(module.floral_A["default"]))

    return hook


class Round:
    """A round of clients whose routers hold some adaptors only, and the shapes of A in the model meanwhile."""

    def __init__(self, folder: Path, visits: ExitStack, model: Any, **settings: Any) -> None:
        # "posterior": something else than local steps finds the routers
        self.trainer = made = trainer(folder, model=model, **{"router_update": "posterior", **settings})
        visits.enter_context(made._visit())
        self.state = ServerState.of(made.model, made._groups)
        self.place = made._place
        self.router = next(name for name, role in made._groups.roles.items() if role.kind == "router")
        layers = made.model.router.logits["default"].shape[1]
        self.routers = routers(layers)
        self.seen: set[int] = set()
        layer = next(layer for layer in made.model.modules() if isinstance(layer, FloralLayer))
        layer.register_forward_pre_hook(note(self.seen))

    def load(self, client_id: Any) -> Any:
        return self.trainer.dataset[client_id]["train"], {self.router: self.routers[client_id]}

    def __call__(self, kind: Any) -> dict[Any, Any]:
        training = kind(self.place) if kind is SideBySide else InTurn(LocalTraining(self.place))
        ids = list(self.routers)
        return dict(zip(ids, training(ids, self.load, self.state), strict=True))


KINDS = [LocalTraining, SideBySide]


@pytest.mark.parametrize(
    ("kind", "group_cost"), [(LocalTraining, GROUP_COST), (SideBySide, GROUP_COST), (SideBySide, 0)]
)
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {}),
        ({"router_per_layer": True}, {"alternating": True}),
        ({"train_base": False, "shared_r": 1}, {"optimizer": "adam", "local_epochs": 2}),
        ({"router_top_k": 2, "router_temperature": 2.0}, {"max_step_norm": 0.01, "max_grad_norm": 0.5}),
    ],
    ids=["", "by layer", "frozen base", "clipped"],
)
def test_the_others_change_nothing(
    tmp_path: Path,
    visits: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    group_cost: int,
    config: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    monkeypatch.setattr(used_module, "GROUP_COST", group_cost)
    part = Round(tmp_path / "part", visits, model_of(**config), **settings)
    found = part(kind)
    # one after the other each has its own; side by side as many as one of its group needs
    assert part.seen == ({1, 2} if kind is LocalTraining or not group_cost else {2})
    monkeypatch.setattr(AdaptorAxes, "among", lambda self, trainable: {})
    whole = Round(tmp_path / "whole", visits, model_of(**config), **settings)
    expected = whole(kind)
    assert whole.seen == {ADAPTORS}
    for k, client_id in enumerate(expected):
        (update, private), (other, kept) = found[client_id], expected[client_id]
        assert update.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert torch.equal(update.usage, other.usage)
        assert private.keys() == kept.keys() and all(torch.equal(private[name], kept[name]) for name in kept)
        for name, delta in other.deltas.items():
            torch.testing.assert_close(update.deltas[name], delta, rtol=1e-4, atol=1e-5)
        unused = [c for c in range(ADAPTORS) if c not in USED[k]]
        for name, cluster in part.place.groups.clustered.items():
            moved = update.deltas[name].movedim(cluster.axis, 0)
            assert not moved[unused].any()
        assert any(update.deltas[name].any() for name in part.place.groups.clustered)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_has_all_of_them_afterwards_whatever_happens(tmp_path: Path, visits: ExitStack, kind: Any) -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("this loss fails")

    broken = Round(tmp_path, visits, model_of(), loss_fn=loss)
    before = {name: value.clone() for name, value in broken.trainer.model.state_dict().items()}
    parameters = dict(broken.trainer.model.named_parameters())
    assert all(isinstance(outcome, RuntimeError) for outcome in broken(kind).values())
    after = dict(broken.trainer.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    shared = {name: value for name, value in broken.trainer.model.state_dict().items() if name != broken.router}
    assert all(torch.equal(value, before[name]) for name, value in shared.items())


def test_a_group_that_fails_costs_the_others_nothing(
    tmp_path: Path, visits: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used_module, "GROUP_COST", 0)
    expected = Round(tmp_path / "whole", visits, model_of())(SideBySide)
    part = Round(tmp_path / "part", visits, model_of())
    alone: list[str] = []
    train, stack = LocalTraining.__call__, SideBySide._stack

    def noted(self: Any, client_id: Any, *args: Any) -> Any:
        alone.append(client_id)
        return train(self, client_id, *args)

    def fails(self: Any, privates: Any, held: Any, used: Any) -> Any:
        if len(privates) == 1:  # the one that uses two
            raise torch.OutOfMemoryError("no memory for two adaptors")
        return stack(self, privates, held, used)

    monkeypatch.setattr(LocalTraining, "__call__", noted)
    monkeypatch.setattr(SideBySide, "_stack", fails)
    found = part(SideBySide)
    assert alone == ["client 2"] and found.keys() == expected.keys()
    for client_id, (update, _) in found.items():
        for name, delta in update.deltas.items():
            torch.testing.assert_close(delta, expected[client_id][0].deltas[name], rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    """Its gradient for the shift is one number for all entries."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return outputs * (1 + self.shift.sum())


def test_gradients_that_are_one_number_are_clipped_side_by_side(
    tmp_path: Path, visits: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = floral_net(Shifted(), target_modules=["layer"], num_adaptors=ADAPTORS, init_std=0.5)
    monkeypatch.setattr(LocalTraining, "__call__", lambda *args: pytest.fail("a client is trained alone"))
    whole = Round(tmp_path, visits, model, max_step_norm=100.0, max_grad_norm=0.5)
    outcomes = whole(SideBySide)
    assert all(
        any("shift" in name and delta.any() for name, delta in update.deltas.items())
        for update, _ in outcomes.values()
    )


class Penalised(Forward):
    """A loss that looks at the adaptors themselves."""


class Orthogonal(type(get_method("floral"))):  # type: ignore[misc]
    def forward(self, model: Any, loss_fn: Any = None) -> Forward:
        return Penalised(model, loss_fn)


def freeze(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "floral_A" in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {"router_update": "gradient"}),
        ({"adapt_norms": "reparametrized"}, {}),
        ({}, {"optimizer": "adafactor"}),
        ({}, {"method": Orthogonal()}),
        ({}, {"frozen": True}),
    ],
    ids=["router trains", "statistics", "whole tensors", "own forward", "frozen factors"],
)
def test_where_the_others_may_count_they_take_part(
    tmp_path: Path, visits: ExitStack, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    model = floral_net(net(norm=True), num_adaptors=ADAPTORS, **config)
    if settings.pop("frozen", False):
        freeze(model)
    made = trainer(tmp_path, model=model, **{"router_update": "posterior", **settings})
    visits.enter_context(made._visit())
    trains = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
    assert not AdaptorAxes(made._place).among(trains)


def test_frozen_factors_train_on(tmp_path: Path) -> None:
    model = floral_net(num_adaptors=ADAPTORS, init_std=0.3)
    freeze(model)
    before = tensors(model)
    run = trainer(tmp_path, model=model, optimal_routing=True)
    run.train()
    moved = {
        name for name, value in tensors(run.model).items() if name in before and not torch.equal(value, before[name])
    }
    assert any("floral_B" in name for name in moved) and not any("floral_A" in name for name in moved)


def test_a_routers_noise_that_changes_nothing_moves_no_other_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: str) -> dict[str, Tensor]:
        torch.manual_seed(3)
        base = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
        model = floral_net(base, num_adaptors=ADAPTORS, init_std=0.3, router_noise=1.0)
        run = trainer(tmp_path / folder, model=model, optimal_routing=True, max_grad_norm=1.0)
        run.train()
        return tensors(run.model)

    part = trained("part")
    monkeypatch.setattr(AdaptorAxes, "among", lambda self, trainable: {})
    whole = trained("whole")
    assert all(torch.allclose(part[name], value, atol=1e-5) for name, value in whole.items())


def test_what_fails_leaves_the_model_whole() -> None:
    parameters = nn.ParameterDict({name: torch.arange(8.0).view(4, 2).requires_grad_() for name in "ab"})
    held = {name: parameter.data for name, parameter in parameters.items()}
    with pytest.raises(RuntimeError, match="within"), narrowed(parameters, {"a": 0, "b": 0}, torch.eye(4)[2]):
        parameters["a"].data.add_(1)
        raise RuntimeError("within")
    assert parameters["a"].data_ptr() == held["a"].data_ptr()
    assert parameters["a"][2].tolist() == [5.0, 6.0] and parameters["a"][3].tolist() == [6.0, 7.0]
    with pytest.raises(IndexError), narrowed(parameters, {"a": 0, "b": 5}, torch.eye(4)[2]):
        pass
    assert {len(parameter) for parameter in parameters.values()} == {4}


def test_clients_with_a_known_cluster_train_its_adaptor_only(tmp_path: Path, visits: ExitStack) -> None:
    run = trainer(tmp_path, model=model_of(), dataset=population(num_clusters=3), optimal_routing=True)
    seen: set[int] = set()
    layer = next(layer for layer in run.model.modules() if isinstance(layer, FloralLayer))
    layer.register_forward_pre_hook(note(seen))
    run.train()
    assert seen == {1} and len(layer.floral_A["default"]) == ADAPTORS  # type: ignore[index]


def test_which_they_use() -> None:
    mixtures = torch.tensor([[[0.0, 0.5, 0.5, 0.0]], [[1.0, 0.0, 0.0, 0.0]]])
    found = used_adaptors(mixtures)
    assert found is not None and found.tolist() == [[1, 2], [0, 1]]
    assert used_adaptors(torch.tensor([[0.1, 0.9], [1.0, 0.0]])) is None  # one uses all
    by_layer = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    assert used_adaptors(by_layer).tolist() == [[0, 2]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        pytest.param([3, 3, 3], [[0, 1, 2]], id="all use as many"),
        pytest.param([1, 2, 1, 2], [[0, 1, 2, 3]], id="another step would cost more than it saves"),
        pytest.param([8] + [2] * 12, [list(range(1, 13)), [0]], id="one uses many"),
        pytest.param([1, 8, 1, 4] * 24, None, id="three groups"),
        pytest.param([7], [[0]], id="one client"),
    ],
)
def test_clients_that_use_as_many_train_side_by_side(counts: list[int], groups: list[list[int]] | None) -> None:
    used = torch.arange(8) < torch.tensor(counts).unsqueeze(1)
    found = grouped_by_use((used / used.sum(dim=1, keepdim=True)).unsqueeze(1))
    if groups is None:
        groups = [[k for k, count in enumerate(counts) if count == width] for width in (1, 4, 8)]
    assert found == groups


@pytest.mark.parametrize("group_cost", [1, 3, 6])
def test_groups_are_the_cheapest(monkeypatch: pytest.MonkeyPatch, group_cost: int) -> None:
    monkeypatch.setattr(used_module, "GROUP_COST", group_cost)
    sizes = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = torch.randint(1, 5, (9,), generator=generator).tolist()
        used = torch.arange(4) < torch.tensor(counts).unsqueeze(1)
        groups = grouped_by_use(used.float())
        sizes.add(len(groups))
        cost = sum(len(group) * max(counts[k] for k in group) + group_cost for group in groups)
        for cuts in product((False, True), repeat=3):  # after one, two, three adaptors
            number = [sum(cuts[: count - 1]) for count in counts]
            widest = {group: max(c for c, n in zip(counts, number, strict=True) if n == group) for group in number}
            assert cost <= sum(widest[group] for group in number) + group_cost * len(widest)
    assert len(sizes) > 1


def test_a_mixture_without_its_traces(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=floral_net(num_adaptors=3, router_temperature=2.0))
    logits = torch.log(torch.tensor([[[0.6, 0.395, 0.005]]])) * 2
    without = made._routers.without_traces(logits, 0.01)
    torch.testing.assert_close(made._routers.mixture_of(without), torch.tensor([0.6 / 0.995, 0.395 / 0.995, 0.0]))
    assert made._routers.mixture_of(without)[2] == 0
    assert torch.equal(made._routers.without_traces(logits, 0.005), logits)
    low = made._routers.without_traces(torch.tensor([[[-3e4, -4e4, -3e4]]]), 0.01)
    assert made._routers.mixture_of(low).tolist() == [0.5, 0.0, 0.5]
    assert made._routers.mixture_of(made._routers.without_traces(logits, 1.0)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_sgd_leaves_traces_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    asked: list[float] = []
    without = Routers.without_traces

    def noted(self: Routers, logits: Tensor, least: float) -> Tensor:
        asked.append(least)
        return without(self, logits, least)

    monkeypatch.setattr(Routers, "without_traces", noted)
    settings: dict[str, Any] = {"router_update": "posterior", "optimizer": optimizer, "rounds": 1}
    trainer(tmp_path, model=floral_net(num_adaptors=3), **settings).train()
    assert asked == ([schedule.LEAST_SHARE] * 4 if optimizer == "sgd" else [])
