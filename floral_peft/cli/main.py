"""Which command, and what becomes of its errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from floral_peft.cli.errors import UsageError
from floral_peft.cli.report import report
from floral_peft.cli.reproduce import reproduce
from floral_peft.cli.tasks import tasks
from floral_peft.cli.train import train
from floral_peft.federated import OutputDirInUseError
from floral_peft.nearest import did_you_mean


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "reproduce": reproduce,
    "report": report,
    "tasks": tasks,
}

HELP = """\
usage: floral-peft COMMAND ...

FLoRAL: federated personalisation with mixtures of low-rank adaptors.

  train      train a task with FLoRAL and with FedAvg and compare them; with no argument, the digits that come along
  reproduce  train several methods on several tasks with several seeds, such as the paper's table; resumable
  report     turn run folders into tables, pictures and a page
  tasks      list the tasks

floral-peft COMMAND --help tells the settings of each. To begin with:

  floral-peft train                                              FLoRAL and FedAvg on 20 clients, half a minute
  floral-peft train --task digits-label-shift --method floral --baselines local_only fedavg --rounds 50 --seed 1
  floral-peft train --task mnist-rotate-reduced --data FOLDER    a dataset that save_to_disk wrote; else from the hub
  floral-peft report runs/digits/floral runs/digits/fedavg       who gained, who lost
  floral-peft report runs/digits --html page.html --pictures pictures

A model and clients of your own: --task my_package.my_module:my_task, or FederatedTrainer in Python.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after `floral-peft`; those of the process by default.

    Returns:
        The exit status: 0, 2 if what was asked for cannot be (one paragraph on stderr says why), 130 if interrupted.

    Raises:
        SystemExit: With status 0, after a command's `--help`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    command, *rest = words
    try:
        if command not in COMMANDS:
            raise UsageError(
                f"there is no command {command!r}{did_you_mean(command, COMMANDS)} See floral-peft --help."
            )
        COMMANDS[command](rest)
    except (UsageError, OutputDirInUseError) as error:
        print(f"floral-peft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"floral-peft: interrupted{interrupt}", file=sys.stderr)
        return 130
    return 0
