"""What all local training on one model has in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.batches import RESIDENT_BYTES, Collator, Examples
from floral_peft.federated.forward import Forward
from floral_peft.federated.groups import ParameterGroups
from floral_peft.federated.readings import Readings
from floral_peft.federated.visitor import Visitor


@dataclass
class Workplace:
    """Where clients train, one after the other or side by side: the model, and what belongs to it.

    Args:
        model: The model, on the accelerator's device.
        visitor: Sets the model's tensors.
        forward: Calls the model on a batch.
        groups: Which of its tensors are shared, clustered, private.
        args: The run's settings; they may change from round to round.
        accelerator: Device and autocast.
        collator: Makes a batch from a list of examples.
        readings: Splits that have been read of late.
    """

    model: nn.Module
    visitor: Visitor
    forward: Forward
    groups: ParameterGroups
    args: FederatedArguments
    accelerator: Accelerator
    collator: Collator
    readings: Readings = field(default_factory=Readings)

    def examples(self, data: Dataset | Examples, resident: int = RESIDENT_BYTES) -> Examples:
        """A split's examples, which may have been read already, on the accelerator's device.

        Args:
            data: The split.
            resident: Splits up to this many bytes are held in memory as a whole.
        """
        if isinstance(data, Examples):
            return data
        return Examples(data, self.collator, self.accelerator.device, resident, self.readings)
