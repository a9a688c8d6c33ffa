"""What a round costs: FedAvg and FLoRAL beside a plain loop, many clients at once, two processes, a large population.

    python benchmarks/engine.py [--parts rounds,cohort,memory,processes,population] [--repeats 5] [--rounds 3]

One thread, CPU (`--device cuda` for the parts "rounds" and "cohort"). Figures are ratios measured in one run: the
variants take turns in a new random order in each repeat, each repeat's first round is left out, and medians over all
rounds are reported with their quartiles. The plain loop is `others/plain.py`; `others/README.md` runs other frameworks
on the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))  # also when started by torchrun

import datasets
import numpy as np
import torch
from datasets import Array3D, Dataset, Features, Value
from models import cifar_net, vgg8
from others.plain import fedavg_round
from others.settings import SETTINGS, Setting, initial_net, population
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback

from floral_peft import FederatedArguments, FederatedDataset, FederatedTrainer, FloralConfig


PAPER_NETS = {
    "CIFAR-10 net": Setting("CIFAR-10 net", cifar_net, (3, 32, 32), 20, 500, 10, 64, 0.1, pattern=0.5),
    "VGG-8": Setting("VGG-8", vgg8, (3, 32, 32), 20, 128, 4, 64, 0.1, pattern=0.5),
}


class Clock(TrainerCallback):
    """Seconds of each round."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self.clock() - self.began)


def clients_of(setting: Setting) -> FederatedDataset:
    """The setting's clients as Arrow tables."""
    images, labels = population(setting)
    features = Features({"image": Array3D(setting.shape, "float32"), "labels": Value("int64")})
    examples = Dataset.from_dict({"image": images.flatten(0, 1).numpy(), "labels": labels.flatten().numpy()}, features)
    rows = np.arange(labels.numel()).reshape(labels.shape)
    return FederatedDataset({client: examples.select(own) for client, own in enumerate(rows)})


def adapted(net: nn.Module, trained: bool) -> Any:
    """FLoRAL as in the paper: ρ = 1 %, C = 4, every Linear and Conv2d layer."""
    targets = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return get_peft_model(net, FloralConfig(num_adaptors=4, budget=0.01, target_modules=targets, train_base=trained))


Rounds = tuple[list[float], list[dict[str, float]]]
"""Seconds of each round, in all and by phase."""


def run_rounds(
    model: nn.Module,
    method: str,
    setting: Setting,
    clients: FederatedDataset,
    options: argparse.Namespace,
    cohort: str,
) -> Rounds:
    """Every round but the first."""
    clock = Clock(options.clock)
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedArguments(
            folder,
            rounds=options.rounds + 1,
            clients_per_round=setting.cohort,
            per_device_train_batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            use_cpu=options.device == "cpu",
            disable_tqdm=True,
            cohort=cohort,
        )
        trainer = FederatedTrainer(model, args, clients, method=method, callbacks=[clock])
        trainer.train()
        phases = [record["seconds"] for record in trainer.records if record["event"] == "round"]
    return clock.seconds[1:], phases[1:]


def plain_rounds(setting: Setting, options: argparse.Namespace) -> list[float]:
    """Seconds of each round of the plain loop but the first."""
    model = initial_net(setting)
    seconds = []
    for _ in range(options.rounds + 1):
        cohort = torch.randperm(setting.clients)[: setting.cohort].tolist()
        began = options.clock()
        fedavg_round(model, setting, cohort)
        seconds.append(options.clock() - began)
    return seconds[1:]


Variant = Callable[[], Rounds]


def compare(title: str, variants: dict[str, Variant], reference: str, options: argparse.Namespace) -> dict[str, Any]:
    """Let the variants take turns; ratios to the reference, and each one's seconds by phase."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name in options.rng.sample(list(variants), len(variants)):
            own, by_phase = variants[name]()
            seconds[name] += own
            phases[name] += by_phase
    print(f"\n{title}  (1.00 = {reference})")
    result: dict[str, Any] = {"title": title, "reference": reference, "variants": {}}
    scale = statistics.median(seconds[reference])
    for name, own in seconds.items():
        low, median, high = statistics.quantiles(own if len(own) > 1 else own * 2, n=4)
        share = {phase: statistics.median(p[phase] for p in phases[name]) for phase in (phases[name] or [{}])[0]}
        result["variants"][name] = {
            "ratio": median / scale,
            "quartiles": [low / scale, high / scale],
            "seconds": median,
            "phases": share,
        }
        told = "   ms: " + ", ".join(f"{phase} {1000 * value:.1f}" for phase, value in share.items()) if share else ""
        spread = f"[{low / scale:.2f}, {high / scale:.2f}]"
        print(f"  {name:12} {median / scale:6.2f} ×   {spread}   {median:8.4f} s a round{told}")
    sys.stdout.flush()
    return result


def rounds_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """FedAvg against the plain loop, FLoRAL against FedAvg."""
    results = []
    for setting in (SETTINGS["mnist"], SETTINGS["cifar"], *PAPER_NETS.values()):
        clients = clients_of(setting)

        def ours(method: str, setting: Setting = setting, clients: FederatedDataset = clients) -> Variant:
            def run() -> Rounds:
                net = initial_net(setting)
                model = adapted(net, trained=True) if method == "floral" else net
                return run_rounds(model, method, setting, clients, options, cohort="loop")

            return run

        variants: dict[str, Variant] = {"fedavg": ours("fedavg"), "floral": ours("floral")}
        if options.device == "cpu":
            variants["plain loop"] = lambda setting=setting: (plain_rounds(setting, options), [])  # type: ignore[misc]
        results.append(compare(f"{setting.name}, {setting.cohort} clients a round", variants, "fedavg", options))
    return results


def cohort_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """100 clients one after the other, and at once."""
    results = []
    mnist, cifar = SETTINGS["mnist"], PAPER_NETS["CIFAR-10 net"]
    for like, trained in ((mnist, False), (mnist, True), (cifar, True)):
        title = f"{'784-200-10' if like is mnist else like.name}, {'trained' if trained else 'frozen'} base"
        setting = Setting(title, like.net, like.shape, 100, 128, 100, 32, 0.1, pattern=0.1)
        clients = clients_of(setting)

        def ours(
            cohort: str, setting: Setting = setting, clients: FederatedDataset = clients, trained: bool = trained
        ) -> Variant:
            def run() -> Rounds:
                return run_rounds(
                    adapted(initial_net(setting), trained), "floral", setting, clients, options, cohort=cohort
                )

            return run

        variants = {kind: ours(kind) for kind in ("loop", "vectorized")}
        results.append(compare(f"{title}, 100 clients a round", variants, "loop", options))
    return results


def memory_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of processes that keep what they free, and of processes that give it back to the system."""
    results = []
    handed_back = {"MALLOC_PERTURB_": "0"}  # does nothing, but who sets one is not disturbed
    for name in SETTINGS:
        for cohort in ("loop", "vectorized"):

            def ours(environment: dict[str, str], name: str = name, cohort: str = cohort) -> Variant:
                own = ["--worker", name, "--cohort", cohort, "--clock", "processor"]
                return lambda: (in_processes(1, own, options.rounds, environment), [])

            variants = {"kept": ours({}), "given back": ours(handed_back)}
            results.append(compare(f"{name}, FedAvg, {cohort}", variants, "given back", options))
    return results


def processes_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One process and two, one thread each, by the wall clock. Needs two idle cores."""
    results = []
    for name in ("mnist", "cifar"):
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.repeats):
            for count in options.rng.sample([1, 2], 2):
                seconds[count] += in_processes(count, ["--worker", name], options.rounds)
        gain = statistics.median(seconds[1]) / statistics.median(seconds[2])
        print(f"\n{name}, FedAvg: two processes are {gain:.2f} × as fast as one")
        results.append({"title": f"{name}, two processes", "speedup": gain, "seconds": seconds})
    return results


def in_processes(
    count: int, work: Sequence[str], rounds: int, environment: Mapping[str, str] = MappingProxyType({})
) -> list[float]:
    """Seconds of the rounds of a run in so many processes, by the wall clock unless another is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        own = [str(Path(__file__).resolve()), *work, "--rounds", str(rounds), "--out", str(out)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        subprocess.run([*launcher, *own], check=True, env=told)  # noqa: S603
        return json.loads(out.read_text())


def worker(options: argparse.Namespace) -> None:
    """One of the processes of `in_processes`."""
    setting = SETTINGS[options.worker]
    options.clock = time.perf_counter if options.clock_name == "wall" else time.process_time
    seconds, _ = run_rounds(initial_net(setting), "fedavg", setting, clients_of(setting), options, options.cohort)
    if os.environ.get("RANK", "0") == "0":
        options.out.write_text(json.dumps(seconds))


def population_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same cohort out of 1,000 clients and out of 1,000,000, each in a process of its own."""
    results = []
    for clients in (1_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "figures.json"
            make_crowd(clients, folder)
            own = [str(Path(__file__).resolve()), "--crowd", folder, "--rounds", "20", "--out", str(out)]
            subprocess.run([sys.executable, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603
            figures = json.loads(out.read_text())
        print(f"\n{clients:,} clients: start-up {figures['startup_seconds']:.2f} s, "
              f"{1000 * figures['overhead_seconds']:.2f} ms a round beside training, "
              f"{figures['megabytes']:.0f} MB at most")  # fmt: skip
        results.append({"title": f"{clients:,} clients", **figures})
    return results


def make_crowd(clients: int, folder: str) -> None:
    """Four examples for each of very many clients, in an order that is nobody's, as an Arrow file."""
    rng = np.random.default_rng(0)
    rows = 4 * clients
    columns = {"x": rng.standard_normal((rows, 8), dtype=np.float32), "labels": rng.integers(0, 2, rows)}
    client = rng.permutation(np.arange(rows) % clients)
    Dataset.from_dict({**columns, "client": client}).save_to_disk(f"{folder}/examples")


def crowd(options: argparse.Namespace) -> None:
    """Train FLoRAL on 16 of very many clients a round."""
    examples = datasets.load_from_disk(f"{options.crowd}/examples")
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), trained=True)
    clock = Clock(time.perf_counter)
    began = time.perf_counter()
    clients = FederatedDataset.from_column(examples, "client")
    args = FederatedArguments(
        f"{options.crowd}/out",
        rounds=options.rounds,
        clients_per_round=16,
        disable_tqdm=True,
        use_cpu=True,
        cohort="loop",
    )
    trainer = FederatedTrainer(model, args, clients, method="floral", callbacks=[clock])
    trainer.train()
    trained = time.perf_counter() - began
    rounds = [record["seconds"] for record in trainer.records if record["event"] == "round"]
    beside = [whole - own["train"] for whole, own in zip(clock.seconds, rounds, strict=True)]
    figures = {
        "startup_seconds": trained - sum(clock.seconds),
        "overhead_seconds": statistics.median(beside),
        "round_seconds": statistics.median(clock.seconds),
        "megabytes": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024,  # Linux
    }
    options.out.write_text(json.dumps(figures))


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "rounds": rounds_part,
    "cohort": cohort_part,
    "memory": memory_part,
    "processes": processes_part,
    "population": population_part,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="how many are measured in a repeat")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.json")
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--cohort", default="loop", help=argparse.SUPPRESS)
    parser.add_argument("--clock", dest="clock_name", default="wall", help=argparse.SUPPRESS)
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    # one thread's processor time does not count what else runs on the machine
    options.clock = time.process_time if options.device == "cpu" else time.perf_counter
    options.rng = random.Random(0)  # noqa: S311 (an order, not a secret)
    if options.worker:
        worker(options)
    elif options.crowd:
        crowd(options)
    else:
        results = {part: PARTS[part](options) for part in options.parts.split(",")}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"torch": torch.__version__, "device": options.device, "threads": 1}
        options.out.write_text(json.dumps(about | results, indent=1) + "\n")
        print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
