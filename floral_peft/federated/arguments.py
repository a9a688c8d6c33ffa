"""The settings of a federated run, under transformers' names wherever the meaning is the same."""

import dataclasses
import inspect
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}

COHORTS = ("auto", "loop", "vectorized")
AGGREGATIONS = ("factors", "product")


@dataclass
class FederatedArguments:
    """Settings of a [`FederatedTrainer`]. Values are checked here, once; the router update's name by the trainer.

    `HfArgumentParser` reads them from flags, YAML or JSON. Dictionaries are written as JSON on the command line.

    Raises:
        ValueError: A value is out of its range; the message names the field, the value and what is allowed.
        TypeError: A value is of the wrong type.
    """

    output_dir: str = field(
        default="federated_output", metadata={"help": "Folder of the records, the checkpoints and the clients' state."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Give up an earlier run in output_dir: its records, checkpoints and state."}
    )
    rounds: int = field(default=100, metadata={"help": "Number of rounds to train."})
    # `str` stands second because HfArgumentParser then hands the flag over as text: "1" is a count, "1.0" a fraction.
    clients_per_round: int | str | float | None = field(
        default=None,
        metadata={"help": "Clients sampled each round: a count, or a fraction in (0, 1]. All of them by default."},
    )
    local_epochs: int = field(default=1, metadata={"help": "Passes of a client over its examples in a round."})
    local_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps of a client in a round; overrides local_epochs."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples in a training batch."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Examples in an evaluation batch."})
    learning_rate: float = field(default=0.1, metadata={"help": "The clients' learning rate, of the base."})
    adaptor_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": 'Learning rate of the adaptors. By default learning_rate; with router_update="posterior" and SGD '
            "6 times as much while clients look for theirs (2.5 at most, unless learning_rate itself is more), and "
            "then falling to learning_rate until the run ends."
        },
    )
    router_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of routers that local steps train (gradient, mirror). learning_rate by default."
        },
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of the base and the adaptors; the router has none."}
    )
    max_step_norm: float | None = field(
        default=None,
        metadata={
            "help": "Clip the gradient of each base weight, and of each adaptor as the matrix that it adds, to this "
            "norm; 0: no clipping. By default none, unless max_adaptor_step_norm is not set either, with "
            'router_update="posterior" and SGD: 1, or less where steps would be longer than 1 at the adaptors\' rate; '
            "once clients have found their adaptors the base's is three to six times, in the end 18 to 36 times that."
        },
    )
    max_adaptor_step_norm: float | None = field(
        default=None,
        metadata={
            "help": "The same for adaptors alone; they have max_step_norm otherwise. Where neither is set, with "
            'router_update="posterior" and SGD: 1, then 2, and more as their rate falls, but no steps longer than 1, '
            "or than 1 / learning_rate, if that is less."
        },
    )
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip a local step's gradient to this norm. No clipping by default."}
    )
    optimizer: str = field(default="sgd", metadata={"help": "The clients' optimiser: a torch.optim class, by name."})
    optimizer_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'More arguments of the optimiser, as JSON: {"momentum": 0.9}.'}
    )
    server_optimizer: str = field(
        default="sgd",
        metadata={"help": "The server's optimiser: a torch.optim class, by name. SGD with rate 1 averages."},
    )
    server_learning_rate: float = field(default=1.0, metadata={"help": "Learning rate of the server's optimiser."})
    server_optimizer_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More arguments of the server's optimiser, as JSON."}
    )
    precondition: bool = field(default=True, metadata={"help": "Precondition the gradients of the low-rank factors."})
    precondition_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Damping of that: 1e-5 is the paper's. By default it follows the scale of the factors; with "
            'router_update="posterior" and SGD, not in mixed precision, it is 1e-5.'
        },
    )
    router_update: str = field(
        default="posterior",
        metadata={
            "help": "How clients find their routers: they are the posterior over the adaptors given the client's "
            'examples ("posterior"), or local steps train them ("gradient", the paper\'s; "mirror").'
        },
    )
    label_prior: bool | None = field(
        default=None,
        metadata={
            "help": "Where the loss is a classifier's cross entropy, train, and look for adaptors, on logits + log "
            "q(label), q how often the client has a label, and evaluate plain logits. By default where "
            'router_update="posterior" learns; then training is on plain logits once clients have found theirs.'
        },
    )
    adaptor_aggregation: str = field(
        default="factors",
        metadata={
            "help": 'How the server averages low-rank adaptors B A: their "factors", each apart, or the "product", '
            "which is then factored anew. For the product it sees each client's factors, not sums alone."
        },
    )
    search_adaptors: int | None = field(
        default=None,
        metadata={
            "help": 'With router_update="posterior", there are at least so many adaptors while clients look for '
            "theirs: until they have settled on no more than FloralConfig's num_adaptors, at their 30th "
            "participation or later, or half the run is over. Then no more than these stay. By default 4 times as "
            "many, but not more than there are clients, and above 16 not more than half as many; 1: no more than "
            "FloralConfig says."
        },
    )
    search_r: int | None = field(
        default=None,
        metadata={
            "help": "Meanwhile adaptors have at least this rank, 16 by default. Then they are compressed to what "
            "FloralConfig says; 1: they have that from the start."
        },
    )
    prune_adaptors: bool = field(
        default=True,
        metadata={"help": 'With router_update="posterior", remove adaptors that are dead or duplicates as it goes.'},
    )
    optimal_routing: bool = field(
        default=False, metadata={"help": "Fix each client's router one-hot at the dataset's true cluster."}
    )
    stateless: bool = field(
        default=False,
        metadata={
            "help": "Clients keep nothing: each visit relearns the router from the losses of the pure adaptors, "
            "π_c ∝ π_c exp(−η f_c) with η = router_learning_rate. Adaptors must not start equal (init_std)."
        },
    )
    proximal_weight: float = field(
        default=0.1,
        metadata={"help": "How strongly fedprox (μ) and ditto (λ) pull clients' parameters to the server's."},
    )
    finetune_epochs: int = field(
        default=5,
        metadata={"help": "For how many epochs fedavg_finetune trains a client's model before it is evaluated."},
    )
    alternating: bool = field(
        default=False,
        metadata={"help": "Train what is private first (the router), then the rest, each for the local epochs."},
    )
    cohort: str = field(
        default="auto",
        metadata={
            "help": 'How a round\'s clients train: one after the other ("loop"), many as one batched computation '
            '("vectorized"), or whichever of the two is faster when the run begins ("auto").'
        },
    )
    min_clients: int = field(default=1, metadata={"help": "Fewest clients whose updates must arrive in a round."})
    max_update_norm: float | None = field(
        default=None, metadata={"help": "Clip each client's update to this L2 norm. No clipping by default."}
    )
    eval_steps: int | None = field(
        default=None,
        metadata={"help": "Evaluate every this many rounds and after the last. Not while training by default."},
    )
    save_steps: int | None = field(
        default=None,
        metadata={"help": "Save a checkpoint every this many rounds and after the last. Never by default."},
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Keep only this many newest checkpoints. All by default."}
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata={"help": "Save whenever an evaluation is the best so far, spare that checkpoint, and end with it."},
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": 'Metric of an evaluation, with or without "eval_". The loss by default.'},
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether more of it is better. By default yes, unless its name ends in loss."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": 'A checkpoint\'s folder in output_dir, or "true" for the newest.'}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the sampling, the shuffling and the clients' training."})
    report_to: str | list[str] = field(
        default="none", metadata={"help": 'Accelerate\'s trackers by name (tensorboard, wandb, ...), "all" or "none".'}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bar."})
    ddp_timeout: int = field(
        default=1800,
        metadata={"help": "Seconds that the processes of a run wait for one another before all of them end."},
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 mixed precision."})
    fp16: bool = field(default=False, metadata={"help": "Train in float16 mixed precision. Prefer bf16."})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass: less memory, more time. transformers' models."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is an accelerator."})

    def __post_init__(self) -> None:
        self.output_dir = self._read_folder("output_dir", "the path of a folder")
        for name in ("rounds", "local_epochs", "finetune_epochs", "min_clients", "ddp_timeout"):
            self._check_count(name)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            self._check_count(name)
        for name in ("local_steps", "eval_steps", "save_steps", "save_total_limit", "search_adaptors", "search_r"):
            self._check_count(name, optional=True)
        self._check_count("seed", least=0)
        self._check_number("learning_rate")
        self._check_number("server_learning_rate", above_zero=True)
        for name in ("weight_decay", "proximal_weight"):
            self._check_number(name)
        for name in ("adaptor_learning_rate", "router_learning_rate", "max_step_norm", "max_adaptor_step_norm"):
            self._check_number(name, optional=True)
        for name in ("max_grad_norm", "max_update_norm", "precondition_epsilon"):
            self._check_number(name, above_zero=True, optional=True)
        if self.stateless and self.optimal_routing:
            raise ValueError("stateless=True and optimal_routing=True exclude each other: choose one.")
        self._read_best_model()
        for item in dataclasses.fields(self):
            if item.type is bool and not isinstance(getattr(self, item.name), bool):
                raise TypeError(f"{item.name}={getattr(self, item.name)!r} must be True or False.")
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True exclude each other: choose one.")
        if self.cohort not in COHORTS:
            raise ValueError(f"cohort={self.cohort!r} must be one of {', '.join(COHORTS)}.")
        if self.adaptor_aggregation not in AGGREGATIONS:
            raise ValueError(
                f"adaptor_aggregation={self.adaptor_aggregation!r} must be one of {', '.join(AGGREGATIONS)}."
            )
        self.resume_from_checkpoint = self._read_resume_from_checkpoint()
        self.clients_per_round = self._read_clients_per_round()
        self.optimizer_kwargs = self._read_dict("optimizer_kwargs")
        self.server_optimizer_kwargs = self._read_dict("server_optimizer_kwargs")
        self._check_keys("optimizer_kwargs", {"lr": "learning_rate", "weight_decay": "weight_decay"})
        self._check_keys("server_optimizer_kwargs", {"lr": "server_learning_rate"})
        self._check_optimizer("optimizer", "learning_rate", "optimizer_kwargs", self.weight_decay)
        self._check_optimizer("server_optimizer", "server_learning_rate", "server_optimizer_kwargs", 0.0)
        self._check_product()
        self.report_to = self._read_report_to()

    @property
    def mixed_precision(self) -> str:
        """Accelerate's name of the precision: "bf16", "fp16" or "no"."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    @property
    def eval_strategy(self) -> str:
        """When is evaluated, as transformers' callbacks ask for it: "no" or "steps"."""
        return "no" if self.eval_steps is None else "steps"

    @property
    def step_norms(self) -> tuple[float, float]:
        """The largest norms that the gradient of a base weight, and of an adaptor, may have; 0: any."""
        base = self.max_step_norm or 0.0
        return base, base if self.max_adaptor_step_norm is None else self.max_adaptor_step_norm

    def cohort_size(self, num_clients: int) -> int:
        """How many of `num_clients` take part in a round.

        Raises:
            ValueError: `clients_per_round` is a count above `num_clients`.
        """
        asked = self.clients_per_round
        if asked is None:
            return num_clients
        if isinstance(asked, float):
            return max(1, round(asked * num_clients))
        if int(asked) > num_clients:
            raise ValueError(f"clients_per_round={asked} is more than the dataset's {num_clients} clients.")
        return int(asked)

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The clients' optimiser over parameter groups that bring their own `lr` and `weight_decay`.

        In torch's fused form, one pass over memory, where there is one and `optimizer_kwargs` asks for no other.
        """
        kind = OPTIMIZERS[self.optimizer.lower()]
        kwargs = self._kwargs("learning_rate", "optimizer_kwargs")
        if "fused" in inspect.signature(kind).parameters and not kwargs.keys() & {
            "fused",
            "foreach",
            "differentiable",
        }:
            tensors = [tensor for group in params for tensor in group["params"]]
            kwargs["fused"] = all(t.device.type in ("cpu", "cuda") and t.is_floating_point() for t in tensors)
        return kind(params, **kwargs)

    def build_server_optimizer(self, params: list[torch.Tensor]) -> torch.optim.Optimizer:
        """The server's optimiser, which is given old − new as its gradient."""
        kind = OPTIMIZERS[self.server_optimizer.lower()]
        return kind(params, **self._kwargs("server_learning_rate", "server_optimizer_kwargs"))

    def to_dict(self) -> dict[str, Any]:
        """All the settings, as plain values that JSON can hold."""
        return dataclasses.asdict(self)

    def _read_best_model(self) -> None:
        name = self.metric_for_best_model
        if name is not None and not isinstance(name, str):
            raise TypeError(f"metric_for_best_model={name!r} must be a metric's name or None.")
        if self.label_prior not in (None, True, False):
            raise TypeError(f"label_prior={self.label_prior!r} must be True, False or None.")
        if self.greater_is_better not in (None, True, False):
            raise TypeError(f"greater_is_better={self.greater_is_better!r} must be True, False or None.")
        if self.load_best_model_at_end:
            self.metric_for_best_model = name = name or "loss"
            if self.eval_steps is None:
                raise ValueError("load_best_model_at_end=True needs evaluations: set eval_steps.")
        if name is not None and self.greater_is_better is None:
            worst_first = name.removesuffix("_client_mean").removesuffix("_worst_decile")
            self.greater_is_better = not worst_first.endswith("loss")

    def _check_product(self) -> None:
        plain = self.server_optimizer.lower() == "sgd" and self.server_learning_rate == 1.0
        if self.adaptor_aggregation == "product" and not (plain and not self.server_optimizer_kwargs):
            raise ValueError(
                f'adaptor_aggregation="product" needs the server\'s plain average, server_optimizer="sgd" at rate 1: '
                f"factors made anew are no direction to go in; got server_optimizer={self.server_optimizer!r}, "
                f"server_learning_rate={self.server_learning_rate}, "
                f"server_optimizer_kwargs={self.server_optimizer_kwargs!r}."
            )

    def _kwargs(self, rate: str, more: str) -> dict[str, Any]:
        return {"lr": getattr(self, rate), **(getattr(self, more) or {})}

    def _check_count(self, name: str, least: int = 1, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        expected = f"an int of at least {least}" + (" or None" if optional else "")
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be {expected}.")
        if value < least:
            raise ValueError(f"{name}={value!r} must be {expected}.")

    def _check_number(self, name: str, above_zero: bool = False, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        expected = f"a finite number {'above' if above_zero else 'of at least'} 0" + (" or None" if optional else "")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            # YAML reads 1e-3 as text.
            hint = " (YAML needs a dot: 1.0e-3)" if isinstance(value, str) else ""
            raise TypeError(f"{name}={value!r} must be {expected}{hint}.")
        if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
            raise ValueError(f"{name}={value!r} must be {expected}.")
        setattr(self, name, float(value))

    def _read_folder(self, name: str, expected: str) -> str:
        value = getattr(self, name)
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name}={value!r} must be {expected}.")
        if not str(value).strip():
            raise ValueError(f"{name}={value!r} must be {expected}.")
        return str(value)

    def _read_resume_from_checkpoint(self) -> str | None:
        word = str(self.resume_from_checkpoint).lower()
        if word in ("false", "none"):
            return None
        if word == "true":
            return word
        return self._read_folder("resume_from_checkpoint", "a checkpoint's folder, True for the newest, or None")

    def _read_clients_per_round(self) -> int | float | None:
        value = self.clients_per_round
        expected = "a count of at least 1, a fraction in (0, 1], or None for all clients"
        if isinstance(value, str):
            try:
                value = int(value) if value.strip().isdigit() else float(value)
            except ValueError:
                raise ValueError(f"clients_per_round={value!r} must be {expected}.") from None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"clients_per_round={value!r} must be {expected}.")
        if (isinstance(value, int) and value < 1) or (isinstance(value, float) and not 0 < value <= 1):
            raise ValueError(f"clients_per_round={value!r} must be {expected}.")
        return value

    def _read_dict(self, name: str) -> dict[str, Any]:
        value = getattr(self, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}={value!r} is not JSON ({error}).") from None
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise TypeError(
                f'{name}={value!r} must be a dictionary, on the command line as JSON: {{"momentum": 0.9}}.'
            )
        return value

    def _check_keys(self, name: str, instead: dict[str, str]) -> None:
        """Refuse what has a field of its own, or what the trainer sets."""
        for key in getattr(self, name):
            if key in instead:
                raise ValueError(f"{name}={getattr(self, name)!r}: set {instead[key]} instead of {key!r}.")
            if key == "params":
                raise ValueError(f"{name}={getattr(self, name)!r}: leave 'params' out, the trainer gives them.")

    def _check_optimizer(self, name: str, rate: str, more: str, weight_decay: float) -> None:
        """Try the optimiser on one parameter: its own errors come out here, under our field's name."""
        value = getattr(self, name)
        kind = OPTIMIZERS.get(value.lower()) if isinstance(value, str) else None
        if kind is None:
            raise ValueError(
                f"{name}={value!r} must be one of torch.optim's classes: {', '.join(sorted(OPTIMIZERS))}."
            )
        parameter = torch.zeros(1, requires_grad=True)
        parameter.grad = torch.zeros(1)
        try:
            trial = kind([parameter], **self._kwargs(rate, more))
            trial.step()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}={value!r} with {more}={getattr(self, more)!r} does not work: {error}") from error
        if weight_decay and "weight_decay" not in trial.defaults:
            raise ValueError(
                f"weight_decay={weight_decay} needs an optimizer that has one; {name}={value!r} does not."
            )

    def _read_report_to(self) -> list[str]:
        value = self.report_to
        names = [value] if isinstance(value, str) else value or []  # HfArgumentParser gives None for no list
        known = sorted(LOGGER_TYPE_TO_CLASS)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"report_to={value!r} must be a tracker's name or a list of them, of {known}.")
        if names in (["none"], []):
            return []
        available = [str(tracker) for tracker in get_available_trackers()]
        if names == ["all"]:
            return available
        for name in names:
            if name not in known:
                raise ValueError(f'report_to={value!r}: {name!r} must be one of {known}, or "all" or "none".')
            if name not in available:
                raise ValueError(f"report_to={value!r}: {name!r} is not installed; pip install {name}.")
        return names
