"""`floral-peft tasks`."""

from __future__ import annotations

from collections.abc import Sequence

from floral_peft.cli.errors import StrictParser
from floral_peft.tasks import get_task, task_names


def tasks(arguments: Sequence[str]) -> None:
    """List the tasks, a line each."""
    parser = StrictParser(prog="floral-peft tasks", description="List the tasks.")
    parser.refuse(parser.parse_known_args(list(arguments))[1])
    width = max(map(len, task_names()))
    for name in task_names():
        task = get_task(name)
        source = "" if task.data is None else f" (--data {task.data})"
        print(f"{name:<{width}}   {task.summary}{source}")
