"""What each process of tests/federated/test_processes.py runs: a small training, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from floral_peft.federated import side_by_side
from tests.federated.clients import examples, population, tensors, trainer


SETTINGS: dict[str, Any] = {
    "rounds": 4,
    "save_steps": 2,
    "eval_steps": 2,
    "clients_per_round": 4,
    "router_learning_rate": 1.0,
    "server_optimizer": "adam",
    "server_learning_rate": 0.02,
    "ddp_timeout": 20,
}


class Misfortune(TrainerCallback):
    """Befalls one process after some round."""

    def __init__(self, kind: str, rank: int, round: int) -> None:
        self.kind, self.rank, self.round = kind, rank, round

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if int(os.environ.get("RANK", 0)) == self.rank and state.global_step == self.round:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.kind == "raise":
                raise RuntimeError("the callback is broken")
            if self.kind == "stop":
                control.should_training_stop = True
        return control


def start(rank: int, count: int, port: int, folder: str, options: str) -> None:
    """As torchrun starts a process."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in {**where, "RANK": rank, "LOCAL_RANK": rank}.items()})
    torch.set_num_threads(1)
    main(folder, options)


def main(folder: str, options: str) -> None:
    """Train in `folder` and write what this process ended with beside it."""
    chosen = json.loads(options)
    resume = chosen.pop("resume", False)
    callbacks = [Misfortune(*chosen.pop("misfortune"))] if "misfortune" in chosen else []
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # all but main's initial weights must not matter
    side_by_side.CPU_CHUNK_CLIENTS = chosen.pop("chunk_clients", side_by_side.CPU_CHUNK_CLIENTS)
    data = population(7)
    if chosen.pop("broken", False):
        bad = examples(9).with_transform(lambda rows: {"points": rows["points"], "labels": [7] * len(rows["labels"])})
        data = type(data)({**data, "broken": bad})
    away = chosen.pop("elsewhere", False) and os.environ["RANK"] != "0"
    run = trainer(
        Path(f"{folder}-elsewhere" if away else folder), dataset=data, callbacks=callbacks, **(SETTINGS | chosen)
    )
    output = run.train(resume_from_checkpoint=resume)
    ids, mixtures = run.mixtures()
    result = Path(f"{folder}-{run.processes.rank}-of-{run.processes.count}")
    save_file({**tensors(run.model), "mixtures": mixtures}, f"{result}.safetensors")
    records = [{name: value for name, value in record.items() if name != "seconds"} for record in run.records]
    told = {"records": records, "metrics": list(run.client_metrics.items()), "ids": ids, "round": output.global_step}
    Path(f"{result}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(*sys.argv[1:])
