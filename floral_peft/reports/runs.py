"""A finished run, read back from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from floral_peft.federated import ClientId


RECORDS = "records.jsonl"
CLIENTS = "client_metrics.jsonl"
SETTINGS = "settings.yaml"
MIXTURES = "mixtures.jsonl"
RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """One method trained on one task.

    Attributes:
        folder: Where it was read from.
        settings: Every setting it was trained with, by name, `task` and `method` among them.
        records: What happened, in order: an event per round and per evaluation.
        client_metrics: Client id → its last metrics.
        mixtures: One row per client, with `client`, `mixture` and, where it is known, `cluster`.
        result: What was found when the run was done: `label`, `parameters`, `base_parameters`, `adjusted_rand_index`.
            Empty while it is not.
    """

    folder: Path
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    client_metrics: dict[ClientId, dict[str, float]]
    mixtures: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task's name, or where it was trained if that is not known."""
        return str(self.settings.get("task", self.folder.parent.name))

    @property
    def seed(self) -> int | None:
        """The seed, if it is known."""
        return self.settings.get("seed")

    @property
    def is_done(self) -> bool:
        """Whether it was trained and evaluated to its end."""
        return bool(self.result or self.client_metrics)

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.settings.get("method", self.folder.name))

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Round → what its evaluation measured."""
        return {event["round"]: event for event in self.records if event["event"] == "evaluate"}

    @property
    def rounds(self) -> int:
        """How many rounds were trained."""
        return max((event["round"] for event in self.records if event["event"] == "round"), default=0)

    @property
    def last_round(self) -> dict[str, Any]:
        """The record of the last round; empty if there was none."""
        return next((event for event in reversed(self.records) if event["event"] == "round"), {})

    @property
    def search_ended(self) -> int | None:
        """After which round the routers' search among more adaptors ended; None if it did not, or there was none."""
        ends = (
            event["round"]
            for event in self.records
            if event.get("lost") or any(drop["why"] == "bound" for drop in event.get("pruned") or ())
        )
        return next(ends, None)

    @property
    def metrics(self) -> dict[str, float]:
        """What the last evaluation measured; empty if there was none."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}


def read_run(folder: str | Path) -> Run:
    """Read one run's folder.

    Raises:
        ValueError: If a file in it is not what a run writes; the message names the file and the line.
        FileNotFoundError: If it holds no records.
    """
    folder = Path(folder)
    if not (folder / RECORDS).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORDS}: give the folder that a run was written to.")
    clients = _read_lines(folder / CLIENTS, needed={"client": (str, int)})
    return Run(
        folder=folder,
        settings=_read_settings(folder / SETTINGS),
        records=_read_lines(folder / RECORDS, needed={"event": str, "round": int}),
        client_metrics={row.pop("client"): {name: v for name, v in row.items() if v is not None} for row in clients},
        mixtures=_read_lines(folder / MIXTURES, needed={"client": (str, int), "mixture": list}),
        result=_read_result(folder / RESULT),
    )


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read run folders, and every run in a folder that holds several (such as one task's), in order of their path.

    Raises:
        FileNotFoundError: If a folder is missing or has no run in it.
        ValueError: As [`read_run`].
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist: give the folder that a run was written to.")
        runs = sorted(path.parent for path in folder.rglob(RECORDS))
        if not runs:
            raise FileNotFoundError(f"{folder} holds no run: no {RECORDS} in it or below it.")
        found.update(dict.fromkeys(runs))
    return [read_run(folder) for folder in found]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}).") from error


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = _read_text(path)
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no date where it looks like one
        raise ValueError(f"{path} is not YAML ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected settings as `name: value`, got {type(settings).__name__}.")
    return settings


def _read_result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        result = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: expected an object, got {type(result).__name__}.")
    return result


def _read_lines(path: Path, needed: dict[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """One object a line; none where there is no file."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in needed.items()):
            raise ValueError(f"{path}, line {number}: expected an object with {' and '.join(needed)}.")
        for name, value in row.items():
            if name.startswith("eval_") and not isinstance(value, (int, float, type(None))):  # null: not a number
                raise ValueError(f"{path}, line {number}: {name} is {value!r}, not a number.")
        rows.append(row)
    return rows
