from __future__ import annotations

import pytest
import torch
from torch import Tensor

from floral_peft.tasks import get_task
from floral_peft.tasks.synthetic import SyntheticClients


LINEAR = SyntheticClients(clients=6, clusters=2, outputs=3, examples=40)


def examples(clients: SyntheticClients, client: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All of a client's inputs and labels."""
    splits = [clients(seed)[client][name][:] for name in ("train", "test")]
    return torch.cat([part["inputs"] for part in splits]), torch.cat([part["labels"] for part in splits])


def fitted(clients: SyntheticClients, client: int) -> Tensor:
    """The linear model that explains a client's data exactly, weights and bias, (11, outputs)."""
    inputs, labels = examples(clients, client)
    extended = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    found: Tensor = torch.linalg.lstsq(extended, labels).solution
    torch.testing.assert_close(extended @ found, labels, rtol=1e-3, atol=1e-4)
    return found


def test_clients_of_a_cluster_have_one_linear_model_and_clusters_differ_by_rank_one_and_no_bias() -> None:
    torch.testing.assert_close(fitted(LINEAR, 0), fitted(LINEAR, 4), rtol=1e-3, atol=1e-3)
    difference = fitted(LINEAR, 0) - fitted(LINEAR, 1)
    sizes = torch.linalg.svdvals(difference[:-1])
    # U_0 V_0 − U_1 V_1
    assert sizes[1] > 1e-2
    assert sizes[2] < 1e-3 * sizes[0]
    assert difference[-1].abs().max() < 1e-3


def test_normalised_hidden_units_have_a_mean_that_all_clients_share() -> None:
    plain, normalized = (
        SyntheticClients(8, 4, outputs=1, examples=200, hidden=True, normalized=flag) for flag in (False, True)
    )
    assert examples(normalized, 3)[1].mean().abs() < 1e-5  # the mean of units of mean 0
    assert examples(plain, 3)[1].mean().abs() > 1e-3


def test_the_same_seed_gives_the_same_clients_and_another_seed_others() -> None:
    first, again, other = (examples(LINEAR, 2, seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "share", "clients", "clusters"),
    [
        ("synthetic-linear", 0.25, 10, 2),
        ("synthetic-mlp", 0.5, 20, 4),
        ("synthetic-mlp-batch-norm", 0.5, 20, 4),
    ],
)
def test_a_client_has_a_share_of_the_model_s_parameters_in_examples_and_trains_on_four_fifths(
    name: str, share: float, clients: int, clusters: int
) -> None:
    task = get_task(name)
    made = task.clients(0)
    parameters = sum(parameter.numel() for parameter in task.model().parameters())
    train, test = (len(made[0][split]) for split in ("train", "test"))
    assert train + test == round(share * parameters)
    assert train == -(-4 * (train + test) // 5)
    assert made.clusters == {client: client % clusters for client in range(clients)}
    assert task.settings["num_adaptors"] == clusters
