"""What a mixture of C adaptors costs beside plain training and PEFT's LoRA, layer by layer and step by step.

    python benchmarks/layers.py [--cases linear,conv] [--filter "C=4"] [--rounds 30] [--threads 1,2]
    python benchmarks/layers.py --device cuda --dtype bfloat16 --scale 4 [--compile]

Every figure is a ratio to the case's reference, measured in one run: in each round all variants are run in a new
random order, each variant's time is divided by the reference's of the same round, and the median of the rounds is
reported with its quartiles. "saved" is the memory that autograd keeps for the backward pass, parameters not counted,
and "peak" the most that a step allocates on top of what it finds, both as ratios likewise. "of matmul" is the rate of
a step's arithmetic, as a fraction of the rate at which the device multiplies two large matrices of that dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler greets on every use

import peft
import torch
from models import cifar_net, mnist_net, transformer, vgg8
from peft import LoraConfig, PolyConfig
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from floral_peft import FloralConfig
from floral_peft.tuner import factor_pairs, precondition_gradients


get_peft_model: Any = peft.get_peft_model

SECONDS = 3.0
MOST_ROUNDS = 300
"""A case is repeated for so long, but not more often."""

Step = tuple[Any, Callable[[], Any]]
"""A model, and a function that runs one step of it."""


@dataclass
class Case:
    """Variants to compare, built on demand: name -> a function that builds a step."""

    name: str
    reference: str
    variants: dict[str, Callable[[], Step]]
    targets: dict[str, float] = field(default_factory=dict)


# Single layers: forward and backward


class Loop(nn.Module):
    """C adaptors the plain way: one after the other."""

    def __init__(self, base: nn.Module, first: list[nn.Module], second: list[nn.Module]) -> None:
        super().__init__()
        self.base, self.first, self.second = base, nn.ModuleList(first), nn.ModuleList(second)
        self.logits = nn.Parameter(torch.zeros(len(first)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for weight, first, second in zip(torch.softmax(self.logits, 0), self.first, self.second, strict=True):
            y = y + weight * second(first(x))
        return y


def step_of(model: Any, x: Tensor, **kwargs: Any) -> Step:
    """Forward and backward of one batch, through to the input, as inside a network."""
    x = x.clone().requires_grad_()
    target = torch.randn_like(model(x, **kwargs))

    def step() -> Tensor:
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None
        out = model(x, **kwargs)
        out.backward(target)
        return out

    return model, step


def layer_case(
    name: str, base: Callable[[], nn.Module], x: Tensor, c: int, r: int, trained: bool, **options: Any
) -> Case:
    """One layer, C adaptors of rank r, against LoRA of rank C·r (frozen) or plain training (trained)."""

    def fresh() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(base()).to(x.device, x.dtype)
        model.requires_grad_(trained)
        return model

    def floral(compute: str, mixed: bool = False) -> Step:
        config = FloralConfig(
            num_adaptors=c, r=r, target_modules=["0"], train_base=trained, compute=compute,
            num_clients=32 if mixed else None, init_weights=False,
        )  # fmt: skip
        model = get_peft_model(fresh(), config).to(x.dtype)
        return step_of(model, x, client_ids=torch.arange(len(x), device=x.device) % 32) if mixed else step_of(model, x)

    def lora(rank: int) -> Step:
        config = LoraConfig(r=rank, target_modules=["0"], lora_alpha=rank, init_lora_weights=False)
        model = get_peft_model(fresh(), config).to(x.dtype)
        for parameter in model.base_model.model[0].base_layer.parameters():
            parameter.requires_grad_(trained)
        return step_of(model, x)

    def poly() -> Step:
        model = get_peft_model(fresh(), PolyConfig(r=r, target_modules=["0"], n_tasks=4, n_skills=c, n_splits=1))
        return step_of(model.base_model, x, task_ids=torch.zeros(len(x), dtype=torch.long))

    def loop() -> Step:
        layer: Any = base()
        if isinstance(layer, nn.Linear):
            first: list[nn.Module] = [nn.Linear(layer.in_features, r, bias=False) for _ in range(c)]
            second: list[nn.Module] = [nn.Linear(r, layer.out_features) for _ in range(c)]
        else:
            k, p = layer.kernel_size, layer.padding
            first = [nn.Conv2d(layer.in_channels, r, (1, k[1]), padding=(0, p[1]), bias=False) for _ in range(c)]
            second = [nn.Conv2d(r, layer.out_channels, (k[0], 1), padding=(p[0], 0)) for _ in range(c)]
        model = Loop(layer.requires_grad_(trained), first, second).to(x.device, x.dtype)
        return step_of(model, x)

    variants: dict[str, Callable[[], Step]] = {
        "base": lambda: step_of(fresh(), x),
        f"lora r={r}": lambda: lora(r),
        f"lora r={c * r}": lambda: lora(c * r),
        "loop": loop,
        "stacked": lambda: floral("stacked"),
        "merged": lambda: floral("merged"),
        "auto": lambda: floral("auto"),
        "mixed clients": lambda: floral("auto", mixed=True),
    }
    if x.dim() == 3 and x.device.type == "cpu":  # Poly takes nothing else
        variants["poly"] = poly
    return Case(f"{name}, C={c}, r={r}, {'trained' if trained else 'frozen'} base",
                "base" if trained else f"lora r={c * r}", variants, **options)  # fmt: skip


# Whole training steps


def whole_step(model: Any, x: Tensor, y: Tensor, precondition: bool = False) -> Step:
    """Forward, loss, backward and an SGD step of everything that trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss_fn = nn.CrossEntropyLoss()
    factors = factor_pairs(model)

    def step() -> Tensor:
        loss = loss_fn(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        if precondition:
            precondition_gradients(factors)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step


def step_case(
    name: str, build: Callable[[], nn.Module], x: Tensor, y: Tensor, c: int, dtype: torch.dtype | None = None
) -> Case:
    """The paper's setting: ρ = 1 %, all Linear and Conv2d layers adapted, the base trained too."""
    targets = [name for name, module in build().named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build().to(x.device, dtype or x.dtype)

    def floral(compute: str, precondition: bool = False) -> Step:
        config = FloralConfig(num_adaptors=c, budget=0.01, target_modules=targets, train_base=True, compute=compute)
        model = get_peft_model(fresh(), config, autocast_adapter_dtype=False)
        return whole_step(model, x, y, precondition)

    return Case(
        f"{name} step, ρ=1 %, C={c}, trained base",
        "plain training",
        {
            "plain training": lambda: whole_step(fresh(), x, y),
            "stacked": lambda: floral("stacked"),
            "merged": lambda: floral("merged"),
            "auto": lambda: floral("auto"),
            "auto + preconditioning": lambda: floral("auto", precondition=True),
        },
    )


def cases(names: set[str], device: str, dtype: torch.dtype, scale: int) -> Iterator[Case]:
    """All cases of the groups named. `scale` multiplies the batches and the width of the large Linear layer."""
    grid = [(c, r) for c in (4, 8, 16) for r in (4, 8)]
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    width, batch = 768 * scale, 32 * scale
    for trained in (False, True):
        for c, r in grid:
            if "linear" in names:
                yield layer_case(f"Linear {width}², {2048 * scale} tokens", lambda: nn.Linear(width, width),
                                 draw(16 * scale, 128, width), c, r, trained)  # fmt: skip
            if "small" in names:
                yield layer_case("Linear 784→200, batch 32", lambda: nn.Linear(784, 200),
                                 draw(32, 784), c, r, trained)  # fmt: skip
            if "conv" in names:
                conv = lambda: nn.Conv2d(64, 128, 3, padding=1)  # noqa: E731
                yield layer_case(f"Conv2d 3×3 64→128 at 32×32, batch {batch}", conv,
                                 draw(batch, 64, 32, 32), c, r, trained)  # fmt: skip
    batch = 64 * scale
    images, labels = draw(batch, 3, 32, 32), torch.randint(0, 10, (batch,), device=device)
    for c in (4, 10):
        if "mnist" in names:
            yield step_case("784-200-10 net, batch 32", mnist_net, draw(32, 784), labels[:32], c)
        if "cifar" in names:
            yield step_case(f"CIFAR-10 net, batch {batch}", cifar_net, images, labels, c)
        if "vgg" in names:
            yield step_case(f"VGG-8, batch {batch}", vgg8, images, labels, c)
        if "transformer" in names:
            tokens = torch.randint(0, 1000, (8 * scale, 128), device=device)
            yield step_case(f"6-layer transformer, {1024 * scale} tokens", transformer, tokens, tokens, c, dtype)


# Measuring


@contextmanager
def saved_bytes(count: list[int], parameters: set[int]) -> Iterator[None]:
    """Count the bytes of storage that autograd saves, each storage once, parameters not."""
    seen = set(parameters)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            count[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most that a step allocates on top of what is there before it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    held = lowest = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            lowest = min(lowest, held)  # a step begins by giving back the last one's gradients
            peak = max(peak, held - lowest)
    return peak


def matmul_rate(device: str, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Floating-point operations a second of one large matrix product, the best of ten."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    seconds = [timed(lambda: a @ b, device, clock) for _ in range(10)]
    return 2 * n**3 / min(seconds)


def timed(step: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Seconds that a step takes, the device's work included."""
    began = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def measure(
    case: Case,
    rounds: int,
    rng: random.Random,
    device: str,
    rate: float,
    clock: Callable[[], float],
    *,
    compiled: bool,
) -> dict[str, Any]:
    """Medians and quartiles of the rounds' ratios to the reference, memory, and the rate of the arithmetic."""
    built = {name: build() for name, build in case.variants.items()}
    steps = {name: step for name, (_, step) in built.items()}
    saved, peak, operations = {}, {}, {}
    for name, (model, step) in built.items():
        count = [0]
        with saved_bytes(count, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}):
            step()
        with FlopCounterMode(display=False) as counter:
            step()
        saved[name], peak[name], operations[name] = count[0], peak_bytes(step, device), counter.get_total_flops()
    if compiled:
        for model, _ in built.values():
            model.compile()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in [*steps.values()] * 2:  # to warm up
        timed(step, device, clock)
    began = time.perf_counter()
    while len(times[case.reference]) < rounds or (
        time.perf_counter() - began < SECONDS and len(times[case.reference]) < MOST_ROUNDS
    ):
        for name in rng.sample(list(steps), len(steps)):
            times[name].append(timed(steps[name], device, clock))
    result: dict[str, Any] = {"case": case.name, "reference": case.reference, "compiled": compiled, "variants": {}}
    for name, own in times.items():
        ratios = [one / other for one, other in zip(own, times[case.reference], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        seconds = statistics.median(own)
        result["variants"][name] = {
            "ratio": median,
            "quartiles": [low, high],
            "milliseconds": 1000 * seconds,
            "saved": saved[name] / max(1, saved[case.reference]),
            "peak": peak[name] / max(1, peak[case.reference]),
            "of_matmul": operations[name] / seconds / rate,
        }
    return result


def show(result: dict[str, Any]) -> None:
    """One case as a table."""
    print(f"\n{result['case']}{', compiled' if result['compiled'] else ''}  (1.00 = {result['reference']})")
    for name, row in result["variants"].items():
        low, high = row["quartiles"]
        speed = f"{row['ratio']:6.2f} ×   [{low:.2f}, {high:.2f}]   {row['milliseconds']:9.3f} ms"
        memory = f"saved {row['saved']:5.2f} ×   peak {row['peak']:5.2f} ×"
        print(f"  {name:24} {speed}   {memory}   {row['of_matmul']:4.0%} of matmul")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="linear,small,conv,mnist,cifar,vgg,transformer")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=9, help="at least; small cases are repeated more often")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--scale", type=int, default=1, help="times the batches and the width of the large Linear")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, after the memory is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layers.json")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    results = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        rng = random.Random(0)  # noqa: S311 (an order, not a secret)
        # one thread's processor time does not count what else runs on the machine
        clock = time.process_time if options.device == "cpu" and threads == 1 else time.perf_counter
        rate = matmul_rate(options.device, dtype, clock)
        print(f"\n# {threads} thread{'s' if threads > 1 else ''}, {options.device}, {options.dtype}: "
              f"a large matrix product runs at {rate / 1e9:,.0f} GFLOP/s")  # fmt: skip
        for case in cases(set(options.cases.split(",")), options.device, dtype, options.scale):
            if options.filter in case.name:
                result = measure(case, options.rounds, rng, options.device, rate, clock, compiled=options.compile)
                show(result)
                results.append(result | {"threads": threads})
    machine = {"torch": torch.__version__, "peft": peft.__version__, "machine": platform.machine()}
    setting = {"device": options.device, "dtype": options.dtype, "scale": options.scale}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, **setting, "results": results}, indent=1) + "\n")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
