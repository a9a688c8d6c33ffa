"""What all local training on one model has in common."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from floral_peft.federated.arguments import FederatedArguments
from floral_peft.federated.batches import Collator
from floral_peft.federated.forward import Forward
from floral_peft.federated.groups import ParameterGroups
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
    """

    model: nn.Module
    visitor: Visitor
    forward: Forward
    groups: ParameterGroups
    args: FederatedArguments
    accelerator: Accelerator
    collator: Collator
