"""A run's records: one JSON object per round and per evaluation, in order. Aggregates only."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from floral_peft.federated.files import write_file
from floral_peft.federated.rounds import RoundReport


logger = logging.getLogger(__name__)

Record = dict[str, Any]


class Records:
    """The records of a run in memory and, once it has started, in `records.jsonl`: before, that file may be another's.

    Args:
        path: The file.
        written: Whether this process is the one that writes it.
    """

    def __init__(self, path: Path, written: bool = True) -> None:
        self._path = path
        self._written = written
        self.started = False
        self.items: list[Record] = []

    def on_disk(self) -> bool:
        """Whether the file holds records, of this run or another."""
        return self._path.is_file() and self._path.stat().st_size > 0

    def start(self, round: int) -> None:
        """Begin anew after a round: earlier records are read back, later ones forgotten."""
        if not self._written:
            return
        if round and self._path.is_file():
            self.items[:] = _parse(self._path)
        self.items[:] = [record for record in self.items if record["round"] <= round]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._path, "".join(map(_line, self.items)).encode())
        self.started = True

    def add(self, record: Record) -> None:
        """Append a record."""
        self.items.append(record)
        if self.started and self._written:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(record))


def round_record(report: RoundReport) -> Record:
    """A round's record."""
    dropped = {str(client_id): reason for client_id, reason in report.clients_dropped.items()}
    return {"event": "round", **vars(report), "clients_dropped": dropped}


def train_metrics(reports: Sequence[RoundReport], seconds: float) -> tuple[float, dict[str, float]]:
    """Of a whole training: the mean loss of a round, and transformers' metrics."""
    loss = float(np.mean([report.train_loss for report in reports])) if reports else math.nan
    return loss, {
        "train_runtime": seconds,
        "train_rounds_per_second": len(reports) / seconds,
        "train_clients_per_second": sum(report.clients_trained for report in reports) / seconds,
        "train_loss": loss,
    }


def round_logs(report: RoundReport) -> dict[str, float]:
    """A round's numbers, flat, for callbacks and trackers."""
    logs = {
        "loss": report.train_loss,
        "update_norm": report.update_norm,
        "clients_trained": report.clients_trained,
        "clients_dropped": len(report.clients_dropped),
        "clients_per_second": report.clients_trained / sum(report.seconds.values()),
    }
    if report.router_entropy is not None:
        logs["router_entropy"] = report.router_entropy
    return logs | {f"usage_{index}": share for index, share in enumerate(report.usage or [])}


def _line(record: Record) -> str:
    # JSON has neither NaN nor infinity.
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(plain) + "\n"


def _parse(path: Path) -> list[Record]:
    """The records of the lines before the first that is none: a crash may have cut the last one off."""
    records: list[Record] = []
    lines = path.read_bytes().splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record["round"], int):
                raise ValueError(record["round"])
        except (ValueError, TypeError, KeyError, RecursionError):
            logger.warning(
                "%s: line %d of %d is damaged; it and those after it are dropped", path, len(records) + 1, len(lines)
            )
            break
        records.append(record)
    return records
