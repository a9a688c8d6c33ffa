"""FedAvg by Flower's simulation: ServerApp, ClientApp and Messages, as in its PyTorch quickstart.

    cd benchmarks && python -m others.flower_fedavg --setting mnist --rounds 10 --out flower.json

One Ray worker trains the clients, on one thread; it makes the data once and keeps them. The server and Ray's own
processes run beside it, so only wall-clock time is reported.
"""

from __future__ import annotations

import os
from importlib.metadata import version


os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from others.plain import train
from others.settings import SETTINGS, Run, initial_net, population
from torch import nn


client_app = ClientApp()


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """One client's training, in Ray's worker."""
    torch.set_num_threads(1)
    setting = SETTINGS[message.content["config"]["setting"]]
    images, labels = population(setting)
    client = context.node_config["partition-id"]
    model = setting.net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(model, images[client], labels[client], setting)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": setting.examples}),
        }
    )
    return Message(content=content, reply_to=message)


def server_app(run: Run, model: nn.Module) -> ServerApp:
    """The server: trains, marks the rounds' ends, and leaves the last round's weights in `model`."""
    setting = run.setting
    app = ServerApp()

    def tick(server_round: int, arrays: ArrayRecord) -> None:
        if server_round > 0:
            run.tick()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=setting.cohort / setting.clients,
            fraction_evaluate=0.0,
            min_train_nodes=setting.cohort,  # the first round counts its fraction before all have connected
            min_available_nodes=setting.clients,
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=run.rounds + 1,
            train_config=ConfigRecord({"setting": setting.name}),
            evaluate_fn=tick,
        )
        model.load_state_dict(result.arrays.to_torch_state_dict())

    return app


def main() -> None:
    run = Run.from_arguments(__doc__)
    model = initial_net(run.setting)
    run_simulation(
        server_app=server_app(run, model),
        client_app=client_app,
        num_supernodes=run.setting.clients,
        backend_config={"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    run.finish("flower", version("flwr"), model, one_process=False)


if __name__ == "__main__":
    main()
