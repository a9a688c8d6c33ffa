"""Calling a model on a batch: Hugging Face models that return their loss, and any other `nn.Module`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch import Tensor, nn

from floral_peft.federated.batches import Batch, Examples
from floral_peft.federated.label_prior import label_log_prior
from floral_peft.federated.seeding import generators_kept
from floral_peft.federated.visitor import modes_kept
from floral_peft.tuner import FloralModel
from floral_peft.tuner.layers.base import has_hooks


LossFunction = Callable[[Any, Tensor], Tensor]

LABELS = "labels"
#: In a batch: log q of the client at hand, (classes,), for `Forward.discount_labels`.
LABEL_PRIOR = "label_log_prior"
#: Cross entropy leaves out examples with this label.
_LEFT_OUT = -100
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Prediction:
    """What a model says of one batch.

    Args:
        loss: Scalar, the batch's mean loss.
        logits: The model's outputs without the loss.
        labels: The batch's labels.
    """

    loss: Tensor
    logits: Any
    labels: Tensor


class Forward:
    """Calls a model on batches. Decides once, from the signature of its `forward`, how it wants to be called.

    - Without `loss_fn`, a model whose `forward` takes `labels` gets the batch by keyword and returns its loss.
    - Any other model gets the columns that its `forward` names by keyword or, where it names none of them, the only
      column besides the labels by position. Its loss is `loss_fn(outputs, labels)`; without `loss_fn`, cross entropy
      of logits (examples, classes) and integer labels.

    Args:
        model: The model.
        loss_fn: Loss of the model's outputs and the labels, a scalar.

    """

    #: Whether the loss can discount the labels.
    discounts_labels = True

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None = None) -> None:
        self._model = model
        self.discounting = False
        self._classes: int | None = None  # 0: the model is no classifier
        # Around our tuner a plain PeftModel calls the base model and adds nothing, but takes a while for it.
        self._inside: nn.Module | None = None
        if type(model) is PeftModel and isinstance(model.base_model, FloralModel):
            self._inside = model.get_base_model()
        self._loss_fn = loss_fn
        inner = _innermost(model)
        self._who = type(inner).__name__
        parameters = inspect.signature(inner.forward).parameters.values()
        self._names = [parameter.name for parameter in parameters if parameter.kind in _NAMED]
        self._required = [
            parameter.name
            for parameter in parameters
            if parameter.kind in _NAMED and parameter.default is inspect.Parameter.empty
        ]
        self._returns_loss = loss_fn is None and LABELS in self._names

    def __call__(self, batch: Batch) -> Prediction:
        """Run the model on a batch.

        Raises:
            ValueError: The batch lacks the labels or a column that the model needs, or there is no loss for it.
        """
        labels = self.labels(batch)
        return self._discounted(self.outputs(batch), labels, batch)

    @property
    def splits(self) -> bool:
        """Whether the losses of several batches may come from one pass: not those that a model computes itself."""
        return type(self) is Forward and not self._returns_loss

    def losses_of_parts(self, parts: Sequence[Batch]) -> Tensor:
        """The mean loss of each of several batches, (parts,), from one pass where the model's outputs are a tensor.

        Args:
            parts: The batches; each may have a label prior of its own.
        """
        joined = _joined(parts) if self.splits and len(parts) > 1 else None
        outputs = None if joined is None else self.outputs(joined)
        if joined is None or not isinstance(outputs, Tensor):
            return torch.stack([self(part).loss for part in parts])
        labels = self.labels(joined)
        sizes = [len(part[LABELS]) for part in parts]
        if self._classes:  # the loss is known to be the cross entropy: that of all examples at once
            if LABEL_PRIOR in parts[0]:
                rows = torch.tensor(sizes, device=labels.device)
                outputs = outputs + torch.stack([part[LABEL_PRIOR] for part in parts]).repeat_interleave(rows, dim=0)
            losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
            shares = _shares(labels, sizes).to(losses)
            return torch.where(shares == 0, 0.0, shares * losses).sum(dim=-1)  # NaN · 0, of another part, is no 0
        pairs = zip(outputs.split(sizes), labels.split(sizes), parts, strict=True)
        return torch.stack([self._discounted(output, label, part).loss for output, label, part in pairs])

    def _discounted(self, outputs: Any, labels: Tensor, batch: Batch) -> Prediction:
        prediction = self.predict(outputs, labels)
        if LABEL_PRIOR not in batch:
            return prediction
        loss = nn.functional.cross_entropy(prediction.logits + batch[LABEL_PRIOR], labels)
        return replace(prediction, loss=loss)

    def discount_labels(self, asked: bool) -> None:
        """Whether a classifier's loss may be that of logits + log q, where it is the cross entropy.

        q(y) is how often the client has the label y: what its labels are, by chance or by nature, is then no part of
        what its adaptors learn. Outputs stay plain.

        Raises:
            ValueError: It is asked for, but the method's loss cannot do so.
        """
        if asked and not self.discounts_labels:
            raise ValueError(f"label_prior=True: {type(self).__name__} has a loss that cannot discount labels.")
        self.discounting = asked

    def constants(self, examples: Examples) -> Batch:
        """What the batches of a client's turn hold beside its examples.

        Args:
            examples: The client's examples, at least one.
        """
        if not self.discounting or self._classes == 0 or (labels := examples.classes()) is None:
            return {}
        if self._classes is None:
            with generators_kept(examples.device):
                self._classes = self._count_classes(examples.batch(torch.arange(min(2, len(examples)))))
        if self._classes == 0:
            return {}
        return {LABEL_PRIOR: label_log_prior(labels, self._classes).to(examples.device)}

    @torch.no_grad()
    def _count_classes(self, batch: Batch) -> int:
        """How many classes the model tells apart; 0 unless its loss is the cross entropy of its logits."""
        with modes_kept(self._model):
            self._model.eval()
            prediction = self(batch)
        return int(prediction.logits.shape[-1]) if is_cross_entropy(prediction) else 0

    def outputs(self, batch: Batch) -> Any:
        """What the model returns for a batch."""
        args, kwargs = self._inputs(batch)
        if self._inside is not None and not has_hooks(self._model):
            return self._inside(*args, **kwargs)
        return self._model(*args, **kwargs)

    def predict(self, outputs: Any, labels: Tensor) -> Prediction:
        """What a model's outputs say, given the labels.

        Raises:
            ValueError: There is no loss for them.
        """
        if self._returns_loss:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
            if not isinstance(loss, Tensor):
                raise ValueError(f"{self._who} takes labels but returned no loss: give the trainer a loss_fn.")
            return Prediction(loss, _logits(outputs), labels)
        logits = _logits(outputs)
        if self._loss_fn is not None:
            loss = self._loss_fn(outputs, labels)
            if not isinstance(loss, Tensor) or loss.ndim:
                raise ValueError(
                    f"loss_fn returned {_describe(loss)}, expected a scalar tensor: the batch's mean loss."
                )
            return Prediction(loss, logits, labels)
        if not is_classification(logits, labels):
            raise ValueError(
                f"{self._who} returns no loss, and its outputs {_describe(logits)} with labels {_describe(labels)} "
                "are not those of a classifier (examples, classes): give the trainer a loss_fn(outputs, labels)."
            )
        return Prediction(nn.functional.cross_entropy(logits, labels), logits, labels)

    def labels(self, batch: Batch) -> Tensor:
        """The batch's labels.

        Raises:
            ValueError: It has none.
        """
        labels = batch.get(LABELS)
        if not isinstance(labels, Tensor):
            if labels is not None:
                raise ValueError(
                    f'the batch\'s "{LABELS}" are a {type(labels).__name__}, not a tensor: give a data_collator that '
                    "makes them one."
                )
            raise ValueError(
                f'the batch has no column "{LABELS}"; its columns: {sorted(batch)}. Rename the column of labels to '
                f'"{LABELS}", or give a data_collator that makes them.'
            )
        return labels

    def _inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model."""
        wanted = [name for name in self._names if self._returns_loss or name != LABELS]
        named = {name: batch[name] for name in wanted if name in batch}
        others = [name for name in batch if name not in (LABELS, LABEL_PRIOR)]
        if not named.keys() - {LABELS}:
            if len(others) != 1 or self._returns_loss:
                raise ValueError(
                    f"{self._who} takes {self._names}; the batch's columns {sorted(others)} match none of them. "
                    "Rename the columns"
                    + ("." if self._returns_loss else ", or leave a single one besides the labels.")
                )
            return (batch[others[0]],), {}
        missing = [name for name in self._required if name not in batch]
        if missing:
            raise ValueError(f"{self._who} needs {missing}, which the batch lacks; its columns: {sorted(batch)}.")
        return (), named


def _joined(parts: Sequence[Batch]) -> Batch | None:
    """Batches as one, without label priors; None where their columns cannot be put together."""
    first, *others = [{name: value for name, value in part.items() if name != LABEL_PRIOR} for part in parts]
    shapes = {name: value.shape[1:] for name, value in first.items() if isinstance(value, Tensor) and value.ndim}
    for part in (first, *others):
        found = {name: value.shape[1:] for name, value in part.items() if isinstance(value, Tensor) and value.ndim}
        if found != shapes or len(found) != len(part):
            return None
    return {name: torch.cat([first[name], *(part[name] for part in others)]) for name in first}


def _shares(labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """What each example counts in the mean of its part, (parts, examples); those left out by the loss do not."""
    counted = labels != _LEFT_OUT
    return torch.block_diag(*(part / part.sum() for part in counted.float().split(list(sizes))))


def _innermost(model: Any) -> nn.Module:
    """The model under torch.compile's, PEFT's and like wrappers, whose `forward` names its arguments."""
    while True:
        if is_compiled_module(model):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def is_classification(logits: Any, labels: Tensor) -> bool:
    """Whether these are logits (examples, classes) and integer labels (examples,)."""
    return (
        isinstance(logits, Tensor)
        and logits.ndim == 2
        and labels.shape == logits.shape[:1]
        and not labels.is_floating_point()
        and labels.dtype != torch.bool
    )


def is_cross_entropy(prediction: Prediction) -> bool:
    """Whether a classifier's loss is the cross entropy of its logits, as far as these examples tell."""
    logits, labels = prediction.logits, prediction.labels
    return is_classification(logits, labels) and _is_cross_entropy(prediction.loss, logits, labels)


def as_cross_entropy(prediction: Prediction) -> tuple[Tensor, Tensor] | None:
    """Logits (rows, classes) and labels (rows,) whose cross entropy the loss is: of a row for each example or token.

    Of tokens each may be predicted at its own position, or at the one before it, as causal language models do. None
    where the loss is neither, as far as these examples tell.
    """
    logits, labels = prediction.logits, prediction.labels
    if is_cross_entropy(prediction):
        return logits, labels
    first = logits[0] if isinstance(logits, tuple) and logits else logits
    if not isinstance(first, Tensor) or first.ndim != 3 or first.shape[:2] != labels.shape or not labels.shape[1]:
        return None
    if not is_classification(first[:, 0], labels[:, 0]):
        return None
    for rows, words in ((first[:, :-1], labels[:, 1:]), (first, labels)):
        found = rows.flatten(0, 1), words.flatten()
        if _is_cross_entropy(prediction.loss, *found):
            return found
    return None


def _is_cross_entropy(loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
    if labels.dtype != torch.long:  # what the cross entropy takes
        return False
    counted = labels[labels != _LEFT_OUT]
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[-1]:
        return False
    expected = nn.functional.cross_entropy(logits.float(), labels)
    return torch.allclose(loss.float(), expected, rtol=1e-3, equal_nan=True)


def _logits(outputs: Any) -> Any:
    """The outputs without the loss: one tensor where there is one, else a tuple, as in transformers."""
    if isinstance(outputs, Mapping):
        rest = tuple(value for name, value in outputs.items() if name not in ("loss", "past_key_values"))
    elif isinstance(outputs, tuple):
        rest = outputs
    else:
        return outputs
    return rest[0] if len(rest) == 1 else rest


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
