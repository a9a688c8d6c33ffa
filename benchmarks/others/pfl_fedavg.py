"""FedAvg by pfl-research, put together as its own CIFAR-10 benchmark is.

    cd benchmarks && python -m others.pfl_fedavg --setting mnist --rounds 10 --out pfl.json

pfl evaluates every client in its first round, whatever the evaluation frequency: that is the round that warms up.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from others.settings import Run, Setting, initial_net, population
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class Net(nn.Module):
    """A net with the two methods that pfl asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.train()
        return nn.functional.cross_entropy(self.net(images), labels)

    @torch.no_grad()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Weighted]:
        self.eval()
        loss = nn.functional.cross_entropy(self.net(images), labels, reduction="sum")
        return {"loss": Weighted(loss.item(), len(labels))}


class Ticks(TrainingProcessCallback):
    """Times the rounds."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.run.tick()
        return False, Metrics()


def federated_dataset(setting: Setting) -> FederatedDataset:
    """The clients, each with its examples in a new random order whenever it is drawn."""
    images, labels = population(setting)

    def dataset_of(client: int) -> PyTorchTensorDataset:
        order = torch.randperm(setting.examples)
        return PyTorchTensorDataset((images[client][order], labels[client][order]), user_id=str(client))

    return FederatedDataset(dataset_of, get_user_sampler("minimize_reuse", list(range(setting.clients))))


def main() -> None:
    run = Run.from_arguments(__doc__)
    setting = run.setting
    np.random.seed(0)  # pfl's own generator
    net = Net(initial_net(setting))
    clients = federated_dataset(setting)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=run.rounds + 1,
            evaluation_frequency=run.rounds + 1,
            train_cohort_size=setting.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=clients, val_data=clients, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(
            model=net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=setting.learning_rate,
            local_batch_size=setting.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Ticks(run)],
    )
    run.finish("pfl", version("pfl"), net.net)


if __name__ == "__main__":
    main()
