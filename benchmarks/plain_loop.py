"""The authors' algorithm under true routing, written once more as a plain loop: what their code comes to here.

    python benchmarks/plain_loop.py --data FOLDER [--task mnist-rotate-reduced] [--biases 1] [--least 0.01] [--plain]

On the task's own clients, for its net of two linear layers and one local step a round, from nothing but torch: rank 1,
steps preconditioned with ε = 1e-5, factors averaged over the clients of a cluster and the base over all. `--biases`
says where adaptors' biases start, uniform in ± that much; `--least` is what mixture weights are clamped to from below;
`--plain` goes without preconditioning. Prints the accuracy over all clients' test examples as rounds go by.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from floral_peft.tasks import get_task


#: Those with ten examples a client: one batch, and so one step.
TASKS = ("mnist-label-shift-reduced", "mnist-rotate-reduced")
#: Clients in a round, its rate, and the damping of the paper.
SAMPLED, RATE, EPSILON = 30, 0.1, 1e-5
#: Where A and B stand among a model's tensors, for both layers: W, b, W, b, then A, B, β of each.
PAIRS = ((4, 5), (7, 8))

Tensors = list[Tensor]


def clients_of(task: str, data: str | None, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each client's training images (clients, n, 784), labels and cluster; all test images, labels and clusters."""
    found = get_task(task).with_data(data).clients(seed)
    clusters = torch.tensor([(found.clusters or {})[client] for client in found])
    splits = {name: [found[client][name][:] for client in found] for name in ("train", "test")}
    inputs, unseen = ([split["inputs"].flatten(1) for split in splits[name]] for name in ("train", "test"))
    labels, wanted = ([split["labels"] for split in splits[name]] for name in ("train", "test"))
    owners = clusters.repeat_interleave(torch.tensor([len(split) for split in wanted]))
    return torch.stack(inputs), torch.stack(labels), clusters, torch.cat(unseen), torch.cat(wanted), owners


def start(clusters: int, biases: float) -> tuple[Tensors, Tensors]:
    """The base, as torch starts it, and the adaptors of both layers."""
    layers = [nn.Linear(784, 200), nn.Linear(200, 10)]
    base = [tensor.detach().clone() for layer in layers for tensor in (layer.weight, layer.bias)]
    adaptors: Tensors = []
    for layer in layers:
        inputs, outputs = layer.in_features, layer.out_features
        bound = math.sqrt(6 / inputs)
        adaptors.append(torch.empty(clusters, 1, inputs).uniform_(-bound, bound))
        adaptors.append(torch.zeros(clusters, outputs, 1))
        adaptors.append(torch.empty(clusters, outputs).uniform_(-biases, biases))
    return base, adaptors


def outputs(tensors: Tensors, x: Tensor, mixture: Tensor) -> Tensor:
    """The logits of a batch, for π of shape (C,)."""
    w1, b1, w2, b2, a1, v1, c1, a2, v2, c2 = tensors

    def layer(x: Tensor, w: Tensor, b: Tensor, a: Tensor, v: Tensor, c: Tensor) -> Tensor:
        terms = torch.einsum("ni,cri,cor->nco", x, a, v) + c
        return x @ w.T + b + torch.einsum("c,nco->no", mixture, terms)

    return layer(torch.relu(layer(x, w1, b1, a1, v1, c1)), w2, b2, a2, v2, c2)


def loss(tensors: Tensors, x: Tensor, y: Tensor, mixture: Tensor) -> Tensor:
    """The cross entropy of a client's batch."""
    return F.cross_entropy(outputs(tensors, x, mixture), y)


def preconditioned(grad_a: Tensor, grad_b: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(BᵀB + εI)⁻¹ G_A and G_B (AAᵀ + εI)⁻¹, for each client and adaptor."""
    damping = EPSILON * torch.eye(a.shape[-2])
    of_b = torch.linalg.solve(a @ a.mT + damping, grad_b.mT).mT
    return torch.linalg.solve(b.mT @ b + damping, grad_a), of_b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=TASKS[0], choices=TASKS)
    parser.add_argument("--data", help="folder of the task's dataset")
    parser.add_argument("--rounds", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--biases", type=float, default=0.0)
    parser.add_argument("--least", type=float, default=0.0)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    inputs, labels, clusters, unseen, wanted, owners = clients_of(given.task, given.data, given.seed)
    num_clusters = int(clusters.max()) + 1
    base, adaptors = start(num_clusters, given.biases)
    mixtures = torch.eye(num_clusters).clamp(min=given.least)
    gradients = vmap(grad(loss))
    for round in range(1, given.rounds + 1):
        sampled = torch.randperm(len(inputs))[:SAMPLED]
        cluster = clusters[sampled]
        held = [tensor.expand(len(sampled), *tensor.shape) for tensor in base + adaptors]
        steps = list(gradients(held, inputs[sampled], labels[sampled], mixtures[cluster]))
        if not given.plain:
            for a, b in PAIRS:
                steps[a], steps[b] = preconditioned(steps[a], steps[b], held[a], held[b])
        after = [tensor - RATE * step for tensor, step in zip(held, steps, strict=True)]
        base = [tensor.mean(dim=0) for tensor in after[: len(base)]]
        for c in cluster.unique():
            for old, new in zip(adaptors, after[len(base) :], strict=True):
                old[c] = new[cluster == c, c].mean(dim=0)
        if round % 250 == 0 or round == given.rounds:
            rows = [owners == c for c in range(num_clusters)]
            right = sum(
                int((outputs(base + adaptors, unseen[own], mixtures[c]).argmax(dim=1) == wanted[own]).sum())
                for c, own in enumerate(rows)
            )
            print(f"round {round}: {100 * right / len(wanted):.1f} %", flush=True)


if __name__ == "__main__":
    main()
