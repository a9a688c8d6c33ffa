"""What a batch of requests from different clients costs: one forward pass, PEFT's mixed batches, or merging.

    python benchmarks/serving.py --model HuggingFaceTB/SmolLM2-135M [--cases generate,forward,images] [--rounds 5]
    python benchmarks/serving.py --model ... --device cuda --dtype bfloat16

A request is one example of one client. Compared are, on the same batch:

- base: the model without adaptors, what serving costs at least;
- floral: C adaptors of rank r, a router per client, all requests in one pass;
- peft r: a LoRA of rank r per client, all requests in one pass, by PEFT's `adapter_names`;
- peft C·r: the same with rank C·r, which is what `export_client` writes of each client: the same models;
- merge: each request for itself, after its client's mixture was merged into the weights (measured for one request,
  times their number).

Every figure is a ratio of times of one round, in which all variants are run in a new random order: the median over
rounds, with its quartiles. On a CPU with one thread the time is the process's own, which does not count what else the
machine does.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from models import mnist_net, vgg8
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from floral_peft import FloralConfig


get_peft_model: Any = peft.get_peft_model

Run = Callable[[], Any]


class Served:
    """One model in the ways to serve it.

    Args:
        build: Makes the base model.
        call: (model, first n requests, keywords) → what serving them is.
        targets: The layers that are adapted.
        clients: The number of clients.
        c: The number of adaptors.
        r: The rank of an adaptor, and of a client's LoRA.
    """

    def __init__(
        self, build: Callable[[], nn.Module], call: Callable[..., Any], targets: Any, clients: int, c: int, r: int
    ) -> None:
        self.call = call
        self.base = build()
        dtype = next(self.base.parameters()).dtype
        config = FloralConfig(num_adaptors=c, r=r, target_modules=targets, num_clients=clients, init_weights=False)
        self.floral = get_peft_model(build(), config).to(dtype).eval()
        with torch.no_grad():
            self.floral.router.logits["default"].normal_()
        self.peft = get_peft_model(build(), _lora(r, targets), adapter_name="r 0")
        layers = [module for module in self.peft.modules() if isinstance(module, LoraLayer)]
        for rank, mark in ((r, "r"), (c * r, "C·r")):
            config = _lora(rank, targets)
            for client in range(
                mark == "r", clients
            ):  # not by add_adapter, whose time grows with those that are there
                self.peft.peft_config[f"{mark} {client}"] = config
                for layer in layers:
                    layer.update_layer(f"{mark} {client}", rank, rank, config)
        self.peft.to(dtype).eval()
        self.held = self._bytes()

    def _bytes(self) -> dict[str, float]:
        """What is held beside the base: in common, and what each client adds."""
        table = self.floral.router.logits["default"]
        factors = sum(p.nbytes for name, p in self.floral.named_parameters() if ".floral_" in name) - table.nbytes
        loras = {
            f"peft {mark}, per client": sum(
                p.nbytes for name, p in self.peft.named_parameters() if f".{mark} 0." in name
            )
            for mark in ("r", "C·r")
        }
        return {"floral, in common": factors, "floral, per client": table.nbytes / len(table), **loras}

    def runs(self, clients: list[int]) -> dict[str, Run]:
        """The variants of a batch whose requests are of these clients."""
        count = len(clients)

        def floral() -> Any:
            with self.floral.client(clients):
                return self.call(self.floral, count)

        def merge() -> Any:
            with self.floral.client(clients[0]):
                self.floral.merge_adapter()
                try:
                    return self.call(self.floral, 1)
                finally:
                    self.floral.unmerge_adapter()

        def mixed(mark: str) -> Run:
            names = [f"{mark} {client}" for client in clients]
            return lambda: self.call(self.peft, count, adapter_names=names)

        return {
            "base": lambda: self.call(self.base, count),
            "floral": floral,
            "peft r": mixed("r"),
            "peft C·r": mixed("C·r"),
            "merge": merge,
        }


def _lora(rank: int, targets: Any) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)


def language(name: str, job: str, length: int, device: str, dtype: torch.dtype, *sizes: int) -> Served:
    """Requests of some tokens to a causal language model: read them, or write as many more."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.randint(5, 1000, (sizes[0], length), device=device)

    def forward(model: Any, count: int, **kwargs: Any) -> Tensor:
        return model(input_ids=tokens[:count], **kwargs).logits

    def generate(model: Any, count: int, **kwargs: Any) -> Tensor:
        ids = tokens[:count]
        written = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **written, **kwargs)

    def build() -> Any:
        return load(name, dtype=dtype).to(device).eval()

    return Served(build, generate if job == "generate" else forward, "all-linear", *sizes)


def images(
    net: Callable[[], nn.Module], shape: tuple[int, ...], device: str, dtype: torch.dtype, *sizes: int
) -> Served:
    """Requests of one image."""
    batch = torch.randn(sizes[0], *shape, device=device, dtype=dtype)
    targets = [name for name, module in net().named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]

    def call(model: Any, count: int, **kwargs: Any) -> Tensor:
        return model(batch[:count], **kwargs)

    return Served(lambda: net().to(device, dtype).eval(), call, targets, *sizes)


def cases(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[tuple[str, str, int, Served]]:
    """Name, unit, units a request has, and the model."""
    sizes = (max(*options.clients, options.batch), options.c, options.r)
    for name in options.cases.split(","):
        if name in ("generate", "forward"):
            where = Path(options.model).name
            yield (
                f"{where}, {name}",
                "tokens",
                options.tokens,
                language(options.model, name, options.tokens, options.device, dtype, *sizes),
            )
        else:
            yield "VGG-8 on 32×32 images", "images", 1, images(vgg8, (3, 32, 32), options.device, dtype, *sizes)
            yield "784-200-10 net", "images", 1, images(mnist_net, (1, 28, 28), options.device, dtype, *sizes)


@torch.no_grad()
def measure(served: Served, clients: list[int], options: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """All variants of one batch."""
    on_cpu = options.device == "cpu"
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter

    def seconds(run: Run, repeats: int) -> float:
        began = clock()
        for _ in range(repeats):
            run()
        if not on_cpu:
            torch.cuda.synchronize()
        return (clock() - began) / repeats

    runs = served.runs(clients)
    first = {name: seconds(run, 1) for name, run in runs.items()}  # also warms up
    repeats = {name: max(1, min(50, int(0.05 / spent))) for name, spent in first.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name in rng.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name], repeats[name]) * (len(clients) if name == "merge" else 1))
    return {
        "requests": len(clients),
        "clients": len(set(clients)),
        "milliseconds": {name: 1000 * statistics.median(own) for name, own in times.items()},
        "floral / base": ratio(times["floral"], times["base"]),
        **{f"{name} / floral": ratio(times[name], times["floral"]) for name in ("peft r", "peft C·r", "merge")},
    }


def ratio(ones: list[float], others: list[float]) -> list[float]:
    """Median and quartiles of the ratios, round by round: (low, median, high)."""
    return statistics.quantiles([one / other for one, other in zip(ones, others, strict=True)], n=4)


def show(row: dict[str, Any], unit: str, per_request: int) -> None:
    """One batch as a line."""
    rate = 1000 * row["requests"] * per_request / row["milliseconds"]["floral"]
    ratios = "   ".join(
        f"{name} {row[name][1]:6.2f} [{row[name][0]:.2f}, {row[name][2]:.2f}]"
        for name in ("floral / base", "peft r / floral", "peft C·r / floral", "merge / floral")
    )
    print(f"  {row['requests']:3} requests of {row['clients']:3} clients: {rate:9.1f} {unit}/s   {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M", help="a causal language model, name or folder"
    )
    parser.add_argument("--cases", default="generate,forward,images")
    parser.add_argument(
        "--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8, 16, 32, 64]
    )
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a request, and tokens that are written")
    parser.add_argument("--batch", type=int, default=16, help="requests where only the number of clients changes")
    parser.add_argument("--c", type=int, default=4, help="adaptors")
    parser.add_argument("--r", type=int, default=8, help="rank of an adaptor, and of a client's LoRA")
    parser.add_argument("--rounds", type=int, default=5, help="two or more: ratios come with quartiles")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: quartiles need two or more.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    rng = random.Random(0)  # noqa: S311 (an order, not a secret)
    machine = {"torch": torch.__version__, "peft": peft.__version__, "machine": platform.machine()}
    setting = {"device": options.device, "dtype": options.dtype, "threads": options.threads}
    setting |= {"num_adaptors": options.c, "r": options.r, "tokens": options.tokens}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for name, unit, per_request, served in cases(options, getattr(torch, options.dtype)):
        print(
            f"\n{name}: " + ", ".join(f"{what} {size / 1e6:.3g} MB" for what, size in served.held.items()), flush=True
        )
        batches = [list(range(n)) for n in options.clients]
        batches += [[i % n for i in range(options.batch)] for n in options.clients if n < options.batch]
        for batch in batches:
            row = measure(served, batch, options, rng)
            show(row, unit, per_request)
            results.append({"case": name, "unit": unit, "units_per_request": per_request, "bytes": served.held} | row)
            options.out.write_text(json.dumps({"machine": machine, **setting, "results": results}, indent=1) + "\n")
        del served
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
