"""From flags and a YAML file to checked settings: task defaults < YAML < flags."""

import argparse
import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import HfArgumentParser

from floral_peft.cli.errors import StrictParser, UsageError
from floral_peft.cli.yaml_file import read_yaml
from floral_peft.federated import FederatedArguments
from floral_peft.nearest import did_you_mean
from floral_peft.reports.saving import OF_ONE_RUN
from floral_peft.tasks import Task, get_task
from floral_peft.tuner import FloralConfig


@dataclass
class RunArguments:
    """What to train."""

    _argument_group_name = "what to train"

    task: str = field(
        default="digits",
        metadata={
            "help": "One of the tasks that `floral-peft tasks` lists, or the dotted path of your own: "
            "my_package.my_module:my_task."
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "The task's dataset: a name on the hub, a folder that `datasets` has saved or can read, or a "
            "folder of such folders. The task's choice by default."
        },
    )
    method: str = field(default="floral", metadata={"help": "The method to train."})
    baselines: list[str] | None = field(
        default=None,
        metadata={
            "help": "Methods to train beside it, on the same clients and initial weights. Clients are counted as "
            'gained or lost against the first. "none" for none; fedavg by default.'
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads for PyTorch's arithmetic. The task's choice by default."}
    )
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these settings; flags go before it."}
    )


@dataclass(frozen=True)
class Settings:
    """Everything that `floral-peft train` needs to know.

    Attributes:
        task: The task, with its dataset chosen.
        source: The name or the dotted path that the task was asked for by.
        data: The dataset that was asked for, or `None` for the task's choice.
        methods: The method, then its baselines.
        threads: CPU threads for PyTorch's arithmetic, or `None` for its own choice.
        federated: How to train; its `output_dir` is the folder of the whole comparison.
        adaptors: What is put into the model, for methods with adaptors.
    """

    task: Task
    source: str
    data: str | None
    methods: list[str]
    threads: int | None
    federated: FederatedArguments
    adaptors: FloralConfig

    def to_dict(self, method: str, args: FederatedArguments) -> dict[str, Any]:
        """One method's own settings, as a file that `--config` takes to train it alone, in a folder of its own.

        Args:
            method: The method.
            args: What it was trained with.
        """
        adaptors = {item.name: getattr(self.adaptors, item.name) for item in dataclasses.fields(AdaptorArguments)}
        return {
            "task": self.source,
            "data": self.data,
            "method": method,
            "baselines": ["none"],
            "threads": self.threads,
            **{name: value for name, value in args.to_dict().items() if name not in OF_ONE_RUN},
            **{name: sorted(value) if isinstance(value, set) else value for name, value in adaptors.items()},
        }


def read_settings(arguments: Sequence[str], many_tasks: bool = False) -> Settings:
    """Read the arguments of `floral-peft train`.

    Args:
        arguments: The words.
        many_tasks: They are for several tasks: one that brings its examples along leaves the data out, in place of
            refusing it.

    Raises:
        UsageError: An unknown key (the message names the nearest), a value of the wrong type, a missing file.
        ValueError, TypeError: A value that its dataclass refuses.
        SystemExit: `--help` was asked for and given.
    """
    first_look = _Parser(RunArguments, add_help=False)
    first_look.set_defaults(task=None)
    early, _ = first_look.parse_known_args(list(arguments))
    from_file = {} if early.config is None else read_yaml(early.config)
    for name in ("task", "method"):
        if not isinstance(from_file.get(name, ""), str):
            raise UsageError(f"{early.config}: {name} must be a name, got {from_file[name]!r}.")
    source = from_file.get("task", RunArguments.task) if early.task is None else early.task
    task = get_task(source)

    parser = _Parser(
        (RunArguments, FederatedArguments, AdaptorArguments),
        prog="floral-peft train",
        usage="floral-peft train [--config FILE.yaml] [--task NAME] [--method NAME] [--any_setting VALUE ...]",
        description="Train a method and its baselines on the same clients and initial weights, and compare them. "
        "Flags go before the settings of the YAML file, and those before the task's, which stand here as defaults.",
    )
    parser.set_defaults(output_dir=_new_folder(f"runs/{task.name}"))
    parser.set_defaults(**task.settings)
    if early.config is not None:
        parser.set_defaults(**_check_yaml(parser, from_file, early.config))
    run, federated, adaptors = parser.dataclasses_from(arguments)
    named = "output_dir" in from_file or any(re.match("--output[-_]dir", word) for word in arguments)
    if federated.resume_from_checkpoint and not named:  # the last of all runs, or that of the checkpoint
        where = federated.resume_from_checkpoint
        found = _last_folder(f"runs/{task.name}") if where == "true" else str(Path(where).parent.parent)
        federated = dataclasses.replace(federated, output_dir=found)
    methods, threads = _methods(run), _threads(run, task)
    data = None if many_tasks and task.data is None else run.data
    return Settings(task.with_data(data), source, data, methods, threads, federated, _floral_config(adaptors))


class _Parser(StrictParser, HfArgumentParser):
    """HfArgumentParser for several dataclasses, with [`StrictParser`]'s manners."""

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """The word "none" takes back a number that the task or the file has set, where the setting can be without."""
        if arg_string.lower() == "none" and action.dest in self._numbers_or_none:
            return None
        return super()._get_value(action, arg_string)

    @cached_property
    def _numbers_or_none(self) -> set[str]:
        hints = {name: hint for kind in self.dataclass_types for name, hint in typing.get_type_hints(kind).items()}
        return {name for name, hint in hints.items() if hint in (int | None, float | None)}

    def dataclasses_from(self, words: Sequence[str]) -> tuple[Any, ...]:
        """An instance of each dataclass."""
        *parsed, rest = self.parse_args_into_dataclasses(
            list(words), return_remaining_strings=True, look_for_args_file=False
        )
        self.refuse(rest)
        return tuple(parsed)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be an object, such as {{"hidden": 4}}')
    return value


def _yes_no_or_name(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


# The trainer sets these, and PEFT keeps its own books in the fields of PeftConfig.
_NOT_FLAGS = {"num_clients", "client_names", *(item.name for item in dataclasses.fields(PeftConfig))}
# Where a run is written, and whether it goes on from an earlier one, is no part of what is trained.
# HfArgumentParser takes one type per flag.
_FLAG_TYPES: dict[str, Any] = {
    "target_modules": list[str] | None,
    "exclude_modules": list[str] | None,
    "layers_pattern": list[str] | None,
    "layers_to_transform": list[int] | None,
    "rank_pattern": _json_object,
    "alpha_pattern": _json_object,
    "adapt_norms": _yes_no_or_name,
}
_FLAG_OPTIONS = {"adapt_norms": {"nargs": "?", "const": True}}
_PATTERNS = ("target_modules", "exclude_modules")


def _adaptor_arguments() -> type:
    """FloralConfig's own fields as a dataclass of flags."""
    types = typing.get_type_hints(FloralConfig)
    flags = [
        (
            item.name,
            _FLAG_TYPES.get(item.name, types[item.name]),
            field(
                default=item.default,
                default_factory=item.default_factory,
                metadata={**item.metadata, **_FLAG_OPTIONS.get(item.name, {})},
            ),
        )
        for item in dataclasses.fields(FloralConfig)
        if item.name not in _NOT_FLAGS
    ]
    return dataclasses.make_dataclass("AdaptorArguments", flags, namespace={"_argument_group_name": "adaptors"})


AdaptorArguments = _adaptor_arguments()


def _floral_config(arguments: Any) -> FloralConfig:
    """The adaptors' flags as a FloralConfig; a lone pattern, such as all-linear, is one, not a name."""
    values = dict(vars(arguments))
    for name in _PATTERNS:
        if values[name] is not None and len(values[name]) == 1 and not re.fullmatch(r"[\w.]+", values[name][0]):
            values[name] = values[name][0]
    for pattern in values["layers_pattern"] or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"layers_pattern: {pattern!r} is no regular expression ({error}).") from error
    return FloralConfig(**values)


def _methods(run: RunArguments) -> list[str]:
    baselines = ["fedavg"] if run.baselines is None else [name for name in run.baselines if name != "none"]
    return list(dict.fromkeys([run.method, *baselines]))


def _new_folder(path: str) -> str:
    """The path, numbered where there is something already: no run is lost by starting another."""
    return next(name for name in _numbered(path) if not Path(name).exists())


def _last_folder(path: str) -> str:
    """The last of those that [`_new_folder`] has given.

    Raises:
        UsageError: There is none.
    """
    found = list(takewhile(lambda name: Path(name).exists(), _numbered(path)))
    if not found:
        raise UsageError(f"resume_from_checkpoint: there is no run in {path}; --output_dir says where it is.")
    return found[-1]


def _numbered(path: str) -> Iterator[str]:
    return chain([path], (f"{path}-{number}" for number in count(2)))


def _threads(run: RunArguments, task: Task) -> int | None:
    if run.threads is not None and run.threads < 1:
        raise UsageError(f"threads={run.threads} must be at least 1.")
    return task.threads if run.threads is None else run.threads


def _check_yaml(parser: _Parser, values: dict[Any, Any], file: str) -> dict[str, Any]:
    """The file's settings in the types that the same flags would give them."""
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key == "config":
            raise UsageError(f"{file}: a file cannot name another one; 'config' is for the command line.")
        if key not in parser.keys:
            raise UsageError(f"{file}: there is no setting {key!r}{did_you_mean(str(key), parser.keys)}")
        if value is None or value == []:
            checked[key] = value
            continue
        words = (
            value
            if isinstance(value, list)
            else [json.dumps(value, default=str) if isinstance(value, dict) else value]
        )
        try:
            parsed, rest = parser.parse_known_args([f"--{key}", *map(str, words)])
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
        if rest:
            raise UsageError(f"{file}: {key} takes one value, not the list {value!r}.")
        checked[key] = getattr(parsed, key)
    return checked
