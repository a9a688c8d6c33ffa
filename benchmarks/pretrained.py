"""Personalising pretrained models: FLoRAL beside one LoRA for all, a LoRA each, and probes.

    python benchmarks/pretrained.py --assets FOLDER [vision-rotate vision-label-shift ...] [--seeds 1,2,3]
    python benchmarks/pretrained.py --device cuda --clients 40 --examples 500 --side 224 --layers 3

The parts are

- `vision-rotate`, `vision-label-shift`: ResNet-50 on CIFAR-10, 4 clusters; its last convolution and a new head are
  adapted;
- `vit-rotate`, `vit-label-shift`: a ViT on the same, queries, values and perceptrons of all layers and a new head;
- `language`: SmolLM2-135M on the roles of Shakespeare's plays that speak most; perplexity by role;
- `text`: MiniLM tells which of four plays a passage is from, in 4 clusters that name the plays differently.

The base is frozen throughout. `floral` finds its clusters itself, `floral-true` is told them; `lora` is PEFT's LoRA
for all by FedAvg, with as many parameters as FLoRAL starts with; `local-lora` is one of an adaptor's rank for each
client, which shares nothing; `probe` and `local-probe` train the new head alone, for all or each; `pretrained` trains
nothing. All methods of a part have one learning rate; `--rates` tries others.

`--assets` has models and datasets in folders (`resnet50`, `vit`, `smollm2`, `minilm`, `cifar10`, `shakespeare`; of a
ViT small_vit.py makes a small one); without it they come from the hub. Sized for one core of a CPU; the flags of the
second line scale it up. What is in the file of results already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pretrained_clients import (
    CLUSTERS,
    Size,
    for_resnet,
    for_vit,
    language_tail,
    passages_of_plays,
    resnet_tail,
    roles,
    sentence_tail,
    vit,
)
from torch import nn
from transformers import set_seed

from floral_peft import FederatedArguments, FederatedDataset, FederatedTrainer, FloralConfig
from floral_peft.reports import clusters_found
from floral_peft.tasks.changes import rotate, shift_labels


RESULTS = Path(__file__).parent / "results" / "pretrained.json"
#: Method → what trains it.
METHODS = {
    "pretrained": "fedavg",
    "probe": "fedavg",
    "local-probe": "local_only",
    "lora": "fedavg",
    "local-lora": "local_only",
    "floral": "floral",
    "floral-true": "floral",
}


@dataclass(frozen=True)
class Part:
    """A model, its clients and settings.

    Attributes:
        model: A new base model, all of it frozen.
        clients: (size, seed) → the clients.
        size: How much there is of everything, for a CPU.
        layers: Which layers are adapted, as in PEFT's configs.
        floral: Further fields of `FloralConfig`.
        settings: Fields of `FederatedArguments`.
        head: The new head, one of the adapted layers, and its classes: its adaptors have full rank.
    """

    model: Callable[[Size], nn.Module]
    clients: Callable[[Size, int], FederatedDataset]
    size: Size
    layers: list[str]
    floral: dict[str, Any]
    settings: dict[str, Any]
    head: tuple[str, int] | None = None

    @property
    def methods(self) -> list[str]:
        """Those that make sense: without a new head there is nothing to probe, and no true cluster is known."""
        left_out = ("pretrained",) if self.head else ("probe", "local-probe", "floral-true")
        return [method for method in METHODS if method not in left_out]


VISION: dict[str, Any] = {
    "model": resnet_tail,
    "size": Size(clients=12, examples=40, tests=50, side=64, layers=1),
    "layers": ["convolution", "classifier"],
    "floral": {"num_adaptors": 6, "r": 4, "shared_r": 4},
    "settings": {"rounds": 30, "per_device_train_batch_size": 10, "learning_rate": 5e-3},
    "head": ("classifier", 10),
}
VIT: dict[str, Any] = VISION | {
    "model": vit,
    "size": Size(clients=12, examples=40, tests=50, side=0, layers=0),
    "layers": ["q_proj", "v_proj", "fc2", "classifier"],
}
PARTS = {
    "vision-rotate": Part(clients=for_resnet(rotate), **VISION),
    "vision-label-shift": Part(clients=for_resnet(shift_labels), **VISION),
    "vit-rotate": Part(clients=for_vit(rotate), **VIT),
    "vit-label-shift": Part(clients=for_vit(shift_labels), **VIT),
    "language": Part(
        model=language_tail,
        clients=roles,
        size=Size(clients=6, examples=16, tests=10, side=64, layers=4),
        layers=["q_proj", "v_proj", "down_proj"],
        floral={"num_adaptors": 4, "r": 4, "shared_r": 8},
        settings={
            "rounds": 6, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 10, "learning_rate": 2e-3,
            "bf16": True,
        },
    ),
    "text": Part(
        model=sentence_tail,
        clients=passages_of_plays,
        size=Size(clients=12, examples=60, tests=40, side=24, layers=1),
        layers=["query", "key", "value", "dense", "classifier"],
        floral={"num_adaptors": 6, "r": 4, "shared_r": 4},
        settings={"rounds": 20, "per_device_train_batch_size": 10, "learning_rate": 5e-3},
        head=("classifier", 4),
    ),
}  # fmt: skip


def run(part: Part, method: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One method on one part: an evaluation at the end, by client, and what it took."""
    set_seed(seed)
    clients = part.clients(part.size, seed)
    model = prepared(part, method)
    trained = 0 if method == "pretrained" else sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        arguments = FederatedArguments(
            folder,
            seed=seed,
            cohort="loop",
            optimizer="adamw",
            precondition=False,
            optimal_routing=method == "floral-true",
            use_cpu=part.size.device == "cpu",
            disable_tqdm=True,
            **settings,
        )
        trainer = FederatedTrainer(model, arguments, clients, method=METHODS[method])
        clock = time.process_time if part.size.device == "cpu" else time.perf_counter
        began = clock()
        if method != "pretrained":
            trainer.train()
        seconds = clock() - began
        found = trainer.evaluate()
        routing = {}
        if METHODS[method] == "floral":
            names, mixtures = trainer.mixtures()
            routing = {"mixtures": mixtures.tolist()}
            if clients.clusters:
                routing["rand"] = clusters_found(names, mixtures, clients.clusters)
    measure = "eval_accuracy" if "eval_accuracy" in found else "eval_loss"
    return {
        **found,
        "by_client": {str(name): metrics[measure] for name, metrics in trainer.client_metrics.items()},
        **routing,
        "trained_parameters": trained,
        "seconds": seconds,
        "settings": settings,
    }


def prepared(part: Part, method: str) -> nn.Module:
    """The base with what the method trains in it."""
    base = part.model(part.size)
    if method == "pretrained":
        next(base.parameters()).requires_grad_()  # a trainer wants something to train; it evaluates only
        return base
    if method.endswith("probe") and part.head is not None:
        base.get_submodule(part.head[0]).requires_grad_()
        return base
    head = {} if part.head is None else {part.head[0]: part.head[1]}
    adaptors = dict(part.floral, target_modules=part.layers)
    if method.startswith("floral"):
        if method == "floral-true":
            adaptors["num_adaptors"] = CLUSTERS
        return get_peft_model(base, FloralConfig(rank_pattern=head, **adaptors))
    count, r, shared = (part.floral.get(name, 0) for name in ("num_adaptors", "r", "shared_r"))
    times, more = (1, 0) if method == "local-lora" else (count, shared)
    ranks = {name: times * rank + more for name, rank in head.items()}
    # alpha = rank: the scale is 1, as FLoRAL's.
    rank = times * r + more
    return get_peft_model(
        base,
        LoraConfig(r=rank, lora_alpha=rank, rank_pattern=ranks, alpha_pattern=ranks, target_modules=part.layers),
    )


def told(name: str, method: str, seed: int, found: dict[str, Any]) -> str:
    """One line on a run."""
    if "eval_accuracy" in found:
        score = f"accuracy {found['eval_accuracy']:.3f}, worst {found['eval_accuracy_worst_decile']:.3f}"
    else:
        score = f"perplexity {math.exp(found['eval_loss']):.2f}"
    more = f", rand {found['rand']:.2f}" if "rand" in found else ""
    more += f", {len(found['mixtures'][0])} left" if "mixtures" in found else ""
    rate = found["settings"]["learning_rate"]
    return f"{name:18} {method:11} seed {seed}, rate {rate:g}: {score}{more}, {found['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--methods", help="some of a part's, with commas")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rates", help="learning rates to try, with commas; nothing is written")
    for name in ("clients", "examples", "tests", "side", "layers"):
        parser.add_argument(f"--{name}", type=int, help="see Size in pretrained_clients.py")
    for name in ("rounds", "local_epochs", "num_adaptors", "r", "shared_r"):
        parser.add_argument(f"--{name}", type=int, help="the part's own by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()

    def flags(*names: str) -> dict[str, Any]:
        return {name: getattr(given, name) for name in names if getattr(given, name) is not None}

    for name in given.parts:
        part = PARTS[name]
        size = replace(part.size, **flags("clients", "examples", "tests", "side", "layers", "assets", "device"))
        part = replace(part, size=size, floral=part.floral | flags("num_adaptors", "r", "shared_r"))
        for seed in map(int, given.seeds.split(",")):
            for method in given.methods.split(",") if given.methods else part.methods:
                settings = part.settings | flags("rounds", "local_epochs")
                rates = map(float, given.rates.split(",")) if given.rates else [settings["learning_rate"]]
                for rate in rates:
                    found = run(part, method, seed, settings | {"learning_rate": rate})
                    print(told(name, method, seed, found), flush=True)
                    if not given.rates:
                        results = json.loads(given.out.read_text()) if given.out.exists() else {}
                        results.setdefault(name, {}).setdefault(method, {})[str(seed)] = found
                        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
