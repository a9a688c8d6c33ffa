"""A task, and the tasks known by name."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from floral_peft.federated import FederatedArguments, FederatedDataset, Method
from floral_peft.federated.evaluation import ComputeMetrics
from floral_peft.nearest import did_you_mean
from floral_peft.tuner import FloralConfig


@dataclass(frozen=True)
class Task:
    """Everything that a method needs to be trained and compared: the same for every method at the same seed.

    Attributes:
        name: What it is called on the command line.
        summary: One line on what it is.
        clients: Seed → the clients with their training and test examples. The same seed gives the same clients. Where
            `data` is given: (seed, data) → the clients.
        model: → a new base model. Its random numbers are PyTorch's global ones, which [`Task.model_for`] seeds.
        settings: Defaults of this task for the fields of `FederatedArguments` and `FloralConfig`, by name.
        loss_fn: (outputs, labels) → loss, for a model that does not return one itself.
        compute_metrics: What `FederatedTrainer` measures; the accuracy by default, for classifiers.
        threads: How many CPU threads the model's arithmetic can use; `None`: PyTorch's choice. Matrices of a few
            thousand elements are slowed down by a second thread, many times where other processes run.
        data: The name on the hub, or the folder, of the dataset that its clients are made from; `None` for a task that
            brings its examples along.

    Raises:
        ValueError: If a setting is a field of neither.
    """

    name: str
    summary: str
    clients: Callable[..., FederatedDataset]
    model: Callable[[], nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    compute_metrics: ComputeMetrics | None = None
    threads: int | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        known = {item.name for kind in (FederatedArguments, FloralConfig) for item in fields(kind)}
        for name in self.settings:
            if name not in known:
                raise ValueError(f"task {self.name!r}: there is no setting {name!r}{did_you_mean(name, known)}")

    def with_data(self, data: str | None) -> Task:
        """The task with its dataset chosen: its `clients` then take the seed alone.

        Args:
            data: A name on the hub, a folder, or a folder of datasets' folders; `None` for the task's own choice.

        Raises:
            ValueError: The task takes no data.
        """
        if self.data is None:
            if data is not None:
                raise ValueError(f"task {self.name!r} brings its examples along: leave data={data!r} out.")
            return self
        chosen = self.data if data is None else data
        return replace(self, clients=partial(self.clients, data=chosen), data=chosen)

    def model_for(self, method: Method, adaptors: FloralConfig, seed: int) -> nn.Module:
        """A new model for the method: the same initial base for every method at the same seed.

        Args:
            method: The method that is to train it.
            adaptors: The adaptors to put into it, for a method that has some.
            seed: Decides all initial weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return method.prepare(self.model(), deepcopy(adaptors))  # PEFT keeps books in its config


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known by its name.

    Raises:
        ValueError: If the name is taken.
    """
    if task.name in _TASKS:
        raise ValueError(f"there is a task {task.name!r} already: give this one another name.")
    _TASKS[task.name] = task
    return task


def as_task(
    name: str | None = None, *, model: Callable[[], nn.Module], **more: Any
) -> Callable[[Callable[..., FederatedDataset]], Task]:
    """Decorator: make a registered task of a function from a seed to clients.

    ```python
    @as_task(model=lambda: nn.Linear(8, 2), settings={"rounds": 20, "target_modules": "all-linear"})
    def coins(seed):
        \"\"\"Ten clients, each with a biased coin of its own.\"\"\"
        return FederatedDataset.from_partition(...)
    ```

    `floral-peft train --task my_package.my_module:coins` then trains on it.

    Args:
        name: The task's name; the function's by default, with dashes.
        model: → a new base model.
        more: More attributes of the [`Task`]. Its summary is the first line of the function's docstring by default.

    Raises:
        ValueError: If the name is taken, or a setting unknown.
    """

    def make(clients: Callable[..., FederatedDataset]) -> Task:
        doc = inspect.getdoc(clients) or ""
        called = {"name": name or clients.__name__.replace("_", "-"), "summary": doc.split("\n")[0].rstrip(".")}
        return register_task(Task(**{**called, "clients": clients, "model": model, **more}))

    return make


def task_names() -> list[str]:
    """Every known task's name, in order of registration."""
    return list(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name, or at that dotted path, such as `my_package.my_module:my_task`.

    Raises:
        ValueError: If there is none; the message names the nearest.
    """
    if ":" in name:
        return _imported(name)
    if name not in _TASKS:
        raise ValueError(
            f"there is no task {name!r}{did_you_mean(name, _TASKS)} The tasks are {', '.join(_TASKS)}; your own are "
            "named by a dotted path, my_package.my_module:my_task."
        )
    return _TASKS[name]


def _imported(path: str) -> Task:
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # where `python -m` would look, too
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"task {path!r}: {module_name!r} cannot be imported ({reason}).") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, Task):
        tasks = [name for name, value in vars(module).items() if isinstance(value, Task)]
        what = "does not exist" if found is None else f"is of type {type(found).__name__}, not a Task"
        raise ValueError(f"task {path!r}: {attribute!r} {what}{did_you_mean(attribute, tasks)}")
    return found
