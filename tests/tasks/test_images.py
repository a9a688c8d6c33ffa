from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.fx
from torch import Tensor

from floral_peft import FederatedArguments, FederatedDataset, FederatedTrainer, FloralConfig
from floral_peft.federated import get_method
from floral_peft.tasks import get_task
from floral_peft.tasks.augment import FlipAndCrop
from floral_peft.tasks.changes import rotate, shift_labels
from floral_peft.tasks.cifar10 import Normalize, cifar10_model
from floral_peft.tasks.images import ImageClients, deal
from tests.tasks.folders import save_images


def rows(clients: FederatedDataset, client: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """A client's images and labels."""
    found = clients[client][split].with_format("torch")[:]
    return found["inputs"], found["labels"]


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """A folder of 120 training images of 5 × 5 and 40 for testing, and the former."""
    folder = tmp_path_factory.mktemp("grey")
    return str(folder), save_images(folder, (5, 5), train=120, test=40)


def test_every_training_image_goes_to_one_client_turned_as_its_cluster_says(grey: tuple[str, np.ndarray]) -> None:
    clients = ImageClients("grey", clients=8, clusters=4, change=rotate)(1, grey[0])
    assert clients.clusters == {client: client % 4 for client in range(8)}
    upright = torch.cat([torch.rot90(rows(clients, k)[0], -(k % 4), dims=(2, 3)) for k in range(8)])
    dealt = sorted((upright * 255).round().flatten(1).int().tolist())
    assert dealt == sorted(grey[1].reshape(120, 25).tolist())
    assert {tuple(rows(clients, k, "test")[0].shape) for k in range(8)} == {(5, 1, 5, 5)}


def test_labels_follow_their_images_and_shift_by_cluster(grey: tuple[str, np.ndarray]) -> None:
    clients = ImageClients("grey", clients=6, clusters=3, change=shift_labels, flat=True)(1, grey[0])
    known = {tuple(image): row % 10 for row, image in enumerate(grey[1].reshape(120, 25).tolist())}
    for client in range(6):
        images, labels = rows(clients, client)
        true = [known[tuple(image)] for image in (images * 255).round().int().tolist()]
        assert labels.tolist() == [(label + client % 3) % 10 for label in true]


def test_clusters_by_label_have_every_so_manieth_label(grey: tuple[str, np.ndarray]) -> None:
    clients = ImageClients("grey", clients=10, clusters=5, by_label=True)(1, grey[0])
    for client in range(10):
        for split in ("train", "test"):
            assert set((rows(clients, client, split)[1] % 5).tolist()) == {client % 5}


def test_a_reduced_client_keeps_a_share_of_its_training_examples_but_ten_at_least(
    grey: tuple[str, np.ndarray],
) -> None:
    whole, half, few = (ImageClients("grey", 4, 2, kept=kept)(1, grey[0]) for kept in (1.0, 0.5, 0.05))
    assert [len(clients[0]["train"]) for clients in (whole, half, few)] == [30, 15, 10]
    assert torch.equal(rows(half, 3)[0], rows(whole, 3)[0][:15])
    assert torch.equal(rows(half, 3, "test")[0], rows(whole, 3, "test")[0])


def test_the_same_seed_gives_the_same_clients_and_another_seed_others(grey: tuple[str, np.ndarray]) -> None:
    first, again, other = (rows(ImageClients("grey", 4, 2)(seed, grey[0]), 1)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_are_decoded_once(
    grey: tuple[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, _own_cache: Path
) -> None:
    make = ImageClients("grey", 4, 2)
    first = rows(make(1, grey[0]), 2)[0]
    assert len(list((_own_cache / "floral_peft").iterdir())) == 2
    monkeypatch.setattr("floral_peft.tasks.data._decoded", None)
    assert torch.equal(rows(make(1, grey[0]), 2)[0], first)


def test_a_damaged_cache_is_made_again(grey: tuple[str, np.ndarray], _own_cache: Path) -> None:
    make = ImageClients("grey", 4, 2)
    first = rows(make(1, grey[0]), 2)[0]
    for file in (_own_cache / "floral_peft").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    assert torch.equal(rows(make(1, grey[0]), 2)[0], first)


def test_shares_differ_by_one_at_most_and_lack_nothing() -> None:
    pools = [np.arange(10), np.arange(10, 25)]
    shares = deal(pools, 5, np.random.default_rng(0))
    assert [len(share) for share in shares] == [4, 8, 3, 7, 3]
    assert sorted(np.concatenate(shares).tolist()) == list(range(25))
    assert all((share < 10).all() == (client % 2 == 0) for client, share in enumerate(shares))


def test_too_few_examples_are_an_error_and_not_clients_without_any() -> None:
    with pytest.raises(ValueError, match="3 examples are too few for 4 clients"):
        deal([np.arange(3)], 4, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("task", "shape", "column", "inputs"),
    [("mnist-rotate", (28, 28), "image", (784,)), ("cifar10-rotate", (32, 32, 3), "img", (3, 32, 32))],
)
def test_the_paper_s_tasks_take_a_folder_of_datasets(
    task: str, shape: tuple[int, ...], column: str, inputs: tuple[int, ...], tmp_path: Path
) -> None:
    chosen = get_task(task)
    name = task.split("-")[0]
    many = 300 if name == "mnist" else 40
    save_images(tmp_path / name, shape, many, many, column)
    for folder in (tmp_path, tmp_path / name):
        clients = chosen.with_data(str(folder)).clients(1)
        example = clients[0]["train"][0]
        assert example["inputs"].shape == inputs
        assert 0 <= example["inputs"].min() < example["inputs"].max() <= 1
    logits = chosen.model()(example["inputs"][None])
    assert logits.shape == (1, 10)


def test_the_clients_of_cifar100_have_the_ten_fine_labels_of_their_cluster(tmp_path: Path) -> None:
    save_images(tmp_path, (32, 32, 3), 400, 200, "img", "fine_label", classes=100)
    clients = get_task("cifar100").with_data(str(tmp_path)).clients(1)
    for client in (0, 9, 10, 99):
        assert set((rows(clients, client, "test")[1] % 10).tolist()) == {client % 10}
    few = get_task("cifar100-reduced").with_data(str(tmp_path)).clients(1)
    assert len(few) == 100


@pytest.mark.parametrize(
    ("task", "rounds", "batch", "rates", "sampled"),
    [
        ("synthetic-linear", 2000, 4, (0.1, 0.1), None),
        ("synthetic-mlp", 2000, 8, (0.03, 0.1), None),
        ("mnist-rotate", 500, 32, (0.1, 0.1), 0.1),
        ("mnist-label-shift-reduced", 1500, 32, (0.1, 0.3), 0.1),
        ("cifar10-label-shift", 500, 64, (0.03, 0.1), None),
        ("cifar10-rotate-reduced", 1500, 64, (0.03, 0.3), None),
        ("cifar100", 500, 64, (0.001, 0.1), 0.5),
        ("cifar100-reduced", 1500, 64, (0.001, 0.3), 0.5),
    ],
)
def test_the_settings_are_the_paper_s(
    task: str, rounds: int, batch: int, rates: tuple[float, float], sampled: float | None
) -> None:
    settings = get_task(task).settings
    assert (settings["rounds"], settings["per_device_train_batch_size"]) == (rounds, batch)
    assert (settings["learning_rate"], settings["router_learning_rate"]) == rates
    assert settings.get("clients_per_round") == sampled
    assert (settings["budget"], settings["router_noise"], settings["train_base"]) == (0.01, 1.0, True)
    assert settings.get("server_optimizer", "sgd") == ("adam" if "cifar100" in task else "sgd")


def test_augmented_clients_train_as_they_do_side_by_side(tmp_path: Path) -> None:
    save_images(tmp_path / "data", (12, 12, 3), 24, 8)
    clients = ImageClients("data", 4, 4, change=rotate, augment=FlipAndCrop)(0, str(tmp_path))

    def trained(cohort: str) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, 10))
        args = FederatedArguments(str(tmp_path / cohort), rounds=1, cohort=cohort, disable_tqdm=True)
        FederatedTrainer(model, args, clients, "fedavg").train()
        return torch.nn.utils.parameters_to_vector(model.parameters())

    torch.testing.assert_close(trained("vectorized"), trained("loop"))


@pytest.mark.parametrize(
    ("task", "parameters", "more"),
    [("mnist-rotate", 159_010, 0.035), ("cifar10-rotate", 87_178, 0.082), ("cifar100", 1_264_388, 0.106)],
)
def test_models_and_adaptors_are_as_large_as_the_paper_s(task: str, parameters: int, more: float) -> None:
    chosen = get_task(task)
    names = ("num_adaptors", "budget", "target_modules", "train_base")
    config = FloralConfig(**{name: chosen.settings[name] for name in names})
    model = chosen.model_for(get_method("floral"), config, seed=0)
    sizes = {name: value.numel() for name, value in model.named_parameters() if "router" not in name}
    assert sum(size for name, size in sizes.items() if "floral" not in name) == parameters
    assert sum(sizes.values()) / parameters - 1 == pytest.approx(more, abs=0.001)


@pytest.mark.slow
def test_the_clients_of_mnist_are_ready_in_seconds(tmp_path: Path) -> None:
    save_images(tmp_path, (28, 28), 60_000, 10_000)
    make = get_task("mnist-rotate").with_data(str(tmp_path)).clients
    make(1)  # decodes
    began = time.process_time()
    make(2)
    assert time.process_time() - began < 5


def test_cifars_images_have_their_channels_last_on_a_cpu_and_nothing_else_changes() -> None:
    normalize, images = Normalize(), torch.rand(2, 3, 8, 8)
    found = normalize(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.stack([normalize(image) for image in images]), found)
    assert torch.equal(torch.vmap(normalize)(images.unsqueeze(1)).squeeze(1), found)
    model = cifar10_model()
    traced = torch.fx.symbolic_trace(model)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(traced(images), model(images))
