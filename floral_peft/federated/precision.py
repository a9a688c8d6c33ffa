"""Device, precision and processes of one trainer; accelerate's own are shared by everything in a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from peft import PeftModel
from torch import nn

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.processes import Processes


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainerAccelerator(Accelerator):
    """Accelerate's processes and trackers, with a device and a precision of this trainer's own.

    Args:
        args: The run's settings.

    Raises:
        ValueError: `fp16` on the CPU.
    """

    def __init__(self, args: FederatedArguments) -> None:
        timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))
        folder = Path(args.output_dir)
        super().__init__(
            cpu=_starts_on_cpu(args), log_with=args.report_to or None, project_dir=folder, kwargs_handlers=[timeout]
        )
        self._timeout = args.ddp_timeout
        self._precision = args.mixed_precision
        self._device = torch.device("cpu") if args.use_cpu else self.state.device
        if args.fp16 and self._device.type == "cpu":
            raise ValueError("fp16=True needs an accelerator, and the run is on the CPU: use bf16=True.")

    @property
    def processes(self) -> Processes:
        """The processes that were started for this run."""
        return Processes(self.process_index, self.num_processes, self._timeout)

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        return self._device

    @property
    def mixed_precision(self) -> str:
        """One of "bf16", "fp16" and "no"."""
        return self._precision

    def finish_trackers(self) -> None:
        """End the trackers of a training; accelerate's `end_training` would part the processes, too."""
        while self.trackers:
            self.trackers.pop().finish()

    @contextmanager
    def autocast(self, autocast_handler: Any = None) -> Iterator[None]:
        """Compute in this trainer's precision, whatever the process's other trainers use."""
        dtype = _DTYPES.get(self._precision)
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
            yield


def checkpoint_gradients(model: nn.Module) -> None:
    """Let a model recompute its activations in the backward pass (`gradient_checkpointing`).

    Raises:
        ValueError: It cannot.
    """
    try:
        # transformers 5 has renamed the method; PEFT's models and the older ones know the old name.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    except (AttributeError, ValueError) as error:
        who = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
        raise ValueError(f"gradient_checkpointing=True: {who} cannot recompute its activations ({error}).") from error


def _starts_on_cpu(args: FederatedArguments) -> bool:
    """Whether accelerate must be told that the processes of `torchrun` or `accelerate launch` meet on the CPU."""
    launched = "LOCAL_RANK" in os.environ and not PartialState._shared_state
    accelerator = torch.accelerator.current_accelerator()
    return launched and (args.use_cpu or accelerator is None or accelerator.type == "mps")
