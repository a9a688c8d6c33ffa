"""One common model, and for each client a model of its own that is held near it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import nn

from floral_peft.federated import Group, register_method
from floral_peft.federated.batches import Batch
from floral_peft.federated.forward import Forward, LossFunction, Prediction
from floral_peft.methods.fedavg import FedAvg
from floral_peft.tuner import FloralConfig, Role


class Twin(nn.Module):
    """A common and a personal model of one kind. Called, it is the personal one.

    Args:
        common: The model that clients train together. The personal one starts as its copy.
    """

    def __init__(self, common: nn.Module) -> None:
        super().__init__()
        self.common = common
        self.personal = deepcopy(common)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the personal model returns."""
        return self.personal(*args, **kwargs)


@register_method
class Ditto(FedAvg):
    """Ditto (Li et al., ICML 2021, arXiv 2012.04221, algorithm 1): h_k(v) = F_k(v) + λ/2 ‖v − wᵗ‖².

    The common model w is FedAvg's. Beside it each client trains a personal model v on h_k, where wᵗ is what the server
    sent and λ `proximal_weight`; the client keeps it, and is evaluated with it. Both take the same local steps, on the
    same batches, and neither feels the other: one backward pass serves both.
    """

    name = "ditto"

    def prepare(self, model: nn.Module, adaptors: FloralConfig) -> nn.Module:
        """Two of the base model."""
        return Twin(model)

    def group(self, name: str, role: Role) -> Group:
        """The common model is shared, the personal one private."""
        return "private" if name.startswith("personal.") else "shared"

    def deployed(self, model: nn.Module) -> nn.Module:
        """The personal model: the common one only helps to train it."""
        return model.personal if isinstance(model, Twin) else model

    def anchor(self, name: str) -> str | None:
        """The personal model is pulled to the common one."""
        return f"common.{name.removeprefix('personal.')}" if name.startswith("personal.") else None

    def forward(self, model: nn.Module, loss_fn: LossFunction | None) -> Forward:
        """Both models' losses in training, the personal model's outputs."""
        if not isinstance(model, Twin):
            raise TypeError(
                f'method "{self.name}" got a {type(model).__name__}; it needs a Twin of the common and the personal '
                "model: `from floral_peft.methods import Twin`, then model = Twin(model)."
            )
        return TwinForward(model, loss_fn)


class TwinForward(Forward):
    """Calls the personal model and, in training, the common one.

    Args:
        model: Both.
        loss_fn: Loss of one model's outputs and the labels.
    """

    def __init__(self, model: Twin, loss_fn: LossFunction | None = None) -> None:
        super().__init__(model.personal, loss_fn)
        self._common = Forward(model.common, loss_fn)
        self._twin = model

    def __call__(self, batch: Batch) -> Prediction:
        """The personal model's prediction. In training its loss has the common model's gradient too."""
        own = super().__call__(batch)
        if not self._twin.training:
            return own
        common = self._common(batch).loss
        return replace(own, loss=own.loss + (common - common.detach()))
