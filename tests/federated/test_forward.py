"""Batches and the ways in which a model is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Array2D, Dataset, Features, Image, List, Value, concatenate_datasets
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

from floral_peft.federated.batches import Examples, ordered_batches, shuffled_batches
from floral_peft.federated.forward import Forward, Prediction, as_cross_entropy

from .clients import examples, floral_net, net


CPU = torch.device("cpu")
POINTS, LABELS = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


class Pair(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left[:, :3] + right[:, :3]


class OwnLoss(nn.Module):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": x.sum() * 0 + 7.0, "logits": x} if labels is not None else {"logits": x}


class Forgetful(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


def test_a_plain_classifier_gets_its_one_column_and_cross_entropy() -> None:
    model = net()
    found = Forward(model)({"points": POINTS, "labels": LABELS})
    assert torch.equal(found.loss, nn.functional.cross_entropy(model(POINTS), LABELS))
    assert torch.equal(found.logits, model(POINTS))


def test_columns_that_forward_names_are_passed_by_name() -> None:
    batch = {"right": POINTS, "unused": POINTS, "left": 2 * POINTS, "labels": LABELS}
    assert torch.equal(Forward(Pair())(batch).logits, 3 * POINTS[:, :3])


def test_a_model_that_takes_labels_returns_its_own_loss() -> None:
    found = Forward(OwnLoss())({"x": POINTS, "unused": POINTS, "labels": LABELS})
    assert found.loss == 7.0
    assert torch.equal(found.logits, POINTS)


def test_a_given_loss_is_used_even_where_the_model_has_one() -> None:
    found = Forward(OwnLoss(), loss_fn=lambda outputs, labels: outputs["logits"].sum() + labels.sum())(
        {"x": POINTS, "labels": LABELS}
    )
    assert torch.equal(found.loss, POINTS.sum() + 4)


def test_regression_needs_a_loss_and_then_works() -> None:
    batch = {"points": POINTS, "labels": torch.randn(5, 3)}
    with pytest.raises(ValueError, match=r"Sequential returns no loss.*\(5, 3\) torch\.float32.*loss_fn"):
        Forward(net())(batch)
    assert Forward(net(), nn.functional.mse_loss)(batch).loss.ndim == 0


@pytest.mark.parametrize("wrong", [lambda outputs, labels: 3.0, lambda outputs, labels: outputs])
def test_a_loss_must_be_a_scalar(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"loss_fn returned .*, expected a scalar tensor"):
        Forward(net(), wrong)({"points": POINTS, "labels": LABELS})


def test_a_transformers_model_is_called_as_its_trainer_does() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 20, "num_labels": 3}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, 20, (5, 6)), "row": torch.arange(5), "labels": LABELS}
    found = Forward(model)(batch)
    expected = model(input_ids=batch["input_ids"], labels=LABELS)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)


def test_a_compiled_model_is_called_as_the_model_inside() -> None:
    batch = {"right": POINTS, "unused": POINTS, "left": 2 * POINTS, "labels": LABELS}
    compiled: Any = torch.compile(Pair(), backend="eager")
    assert torch.equal(Forward(compiled)(batch).logits, 3 * POINTS[:, :3])
    adapted = floral_net()
    assert Forward(torch.compile(adapted, backend="eager"))._names == Forward(adapted)._names == ["input"]  # type: ignore[arg-type]


MISTAKES: list[tuple[nn.Module, dict[str, Any], str]] = [
    (net(), {"points": POINTS}, r"no column \"labels\"; its columns: \['points'\]"),
    (net(), {"points": POINTS, "target": LABELS}, r"its columns: \['points', 'target'\]. Rename"),
    (net(), {"points": POINTS, "labels": ["x"]}, 'the batch\'s "labels" are a list, not a tensor'),
    (net(), {"a": POINTS, "b": POINTS, "labels": LABELS}, r"takes \['input'\].*\['a', 'b'\] match none"),
    (net(), {"labels": LABELS}, r"takes \['input'\].*\[\] match none"),
    (Pair(), {"left": POINTS, "labels": LABELS}, r"Pair needs \['right'\].*\['labels', 'left'\]"),
    (OwnLoss(), {"points": POINTS, "labels": LABELS}, r"OwnLoss takes \['x', 'labels'\].*\['points'\] match none"),
]


@pytest.mark.parametrize(("model", "batch", "message"), MISTAKES)
def test_columns_that_do_not_fit_are_named(model: nn.Module, batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forward(model)(batch)


def test_a_model_that_forgets_its_loss_is_named() -> None:
    with pytest.raises(ValueError, match="Forgetful takes labels but returned no loss"):
        Forward(Forgetful())({"x": POINTS, "labels": LABELS})


def collate_by_hand(rows: list[Any]) -> dict[str, Any]:
    return {
        "points": torch.tensor([row["points"] for row in rows]),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }


def grey(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (3, 2), dtype=np.uint8))


COLUMNS: list[tuple[list[Any], Any]] = [
    (np.arange(24.0).reshape(4, 3, 2).tolist(), None),
    (np.arange(24.0).reshape(4, 3, 2).tolist(), Array2D((3, 2), "float32")),
    (np.arange(24).reshape(4, 3, 2).tolist(), Array2D((3, 2), "uint8")),
    ([[0.5, 1.5]] * 4, List(Value("float16"), length=2)),
    ([True, False, True, True], Value("bool")),
    ([3, 1, 2, 0], Value("int8")),
    ([grey(k) for k in range(4)], Image()),
]


@pytest.mark.parametrize(("values", "feature"), COLUMNS)
def test_every_kind_of_column_becomes_the_tensor_that_datasets_makes_of_it(values: list[Any], feature: Any) -> None:
    data = Dataset.from_dict({"x": values}, features=Features(x=feature) if feature else None)
    data = concatenate_datasets([data, data]).select([5, 0, 3, 7])
    found = Examples(data, default_data_collator, CPU).batch(torch.tensor([2, 0]))["x"]
    expected = torch.stack([data.with_format("torch")[row]["x"] for row in (2, 0)])
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data,
        lambda data: data.with_format("torch"),
        lambda data: data.rename_column("labels", "label"),
        lambda data: data.select(range(5, 20)).select(range(10)),
        lambda data: data.add_column("text", ["x"] * len(data)),
        lambda data: data.with_transform(lambda rows: rows),
        lambda data: data.with_format("numpy"),
    ],
)
def test_a_batch_is_what_the_default_collator_makes(change: Callable[[Dataset], Dataset]) -> None:
    data = change(examples(20))
    rows = torch.tensor([3, 0, 7])
    found = Examples(data, default_data_collator, CPU).batch(rows)
    expected = default_data_collator([data[row] for row in rows.tolist()])
    assert found.keys() == expected.keys() == {"points", "labels"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(found[name].dtype == expected[name].dtype for name in found)


def test_a_format_that_hides_columns_is_respected() -> None:
    data = examples(4).with_format("torch", columns=["points"])
    assert Examples(data, default_data_collator, CPU).batch(torch.tensor([0])).keys() == {"points"}


def test_a_large_split_is_fetched_batch_by_batch() -> None:
    data = examples(20)
    whole = Examples(data, default_data_collator, CPU).batch(torch.tensor([5, 2]))
    piecewise = Examples(data, default_data_collator, CPU, resident=100)
    assert piecewise.arrays is None
    assert all(torch.equal(piecewise.batch(torch.tensor([5, 2]))[name], whole[name]) for name in whole)


def test_a_users_collator_is_called_with_rows() -> None:
    found = Examples(examples(6), collate_by_hand, CPU).batch(torch.tensor([5, 2]))
    assert found["points"].shape == (2, 4)


def test_a_collator_must_return_a_dictionary() -> None:
    with pytest.raises(TypeError, match="data_collator must return a dictionary of tensors, got list"):
        Examples(examples(6), lambda rows: rows, CPU).batch(torch.tensor([0]))


def test_examples_that_cannot_be_stacked_ask_for_a_collator() -> None:
    ragged = Dataset.from_dict({"words": [[1, 2], [3]], "labels": [0, 1]})
    with pytest.raises(ValueError, match=r"columns \['labels', 'words'\] cannot be stacked.*data_collator that pads"):
        Examples(ragged, default_data_collator, CPU).batch(torch.tensor([0, 1]))


def test_labels_that_are_text_are_said_to_be_and_how_to_encode_them() -> None:
    texts = Dataset.from_dict({"points": [[1.0], [2.0]], "label": ["cat", "dog"]})
    with pytest.raises(ValueError, match=r'column "label" is text.*class_encode_column\("label"\) or a ClassLabel'):
        Examples(texts, default_data_collator, CPU)
    encoded = Examples(texts.class_encode_column("label"), default_data_collator, CPU)
    assert encoded.batch(torch.tensor([1, 0]))["labels"].tolist() == [1, 0]


def test_of_two_columns_of_labels_none_is_preferred() -> None:
    both = examples(2).add_column("label", [5, 6])
    with pytest.raises(ValueError, match=r"columns \['labels', 'label'\] all hold labels"):
        Examples(both, default_data_collator, CPU)
    named = examples(2).add_column("label", ["cat", "dog"])
    assert Examples(named, default_data_collator, CPU).batch(torch.tensor([0])).keys() == {"points", "labels"}


def test_an_epoch_visits_every_row_once() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = list(shuffled_batches(10, 4, generator))
    assert [len(batch) for batch in rows] == [4, 4, 2]
    assert sorted(torch.cat(rows).tolist()) == list(range(10)) != torch.cat(rows).tolist()
    assert torch.cat(list(ordered_batches(10, 4))).tolist() == list(range(10))


def test_a_hook_on_the_peft_model_is_called_even_if_it_came_later() -> None:
    model = floral_net()
    forward = Forward(model)
    batch = {"input": POINTS, "labels": LABELS}
    expected = forward(batch).logits
    called: list[int] = []
    model.register_forward_hook(lambda *_: called.append(1))
    assert torch.equal(forward(batch).logits, expected)
    assert called == [1]


@pytest.mark.parametrize("outputs", [lambda logits: logits, lambda logits: (logits, "and more")])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_loss_is_known_as_the_cross_entropy_of_tokens_or_of_the_next_ones(
    ahead: int, outputs: Callable[[Tensor], Any]
) -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[1, 3:] = -100
    rows, words = logits[:, : 5 - ahead].flatten(0, 1), labels[:, ahead:].flatten()
    loss = nn.functional.cross_entropy(rows, words)
    found = as_cross_entropy(Prediction(loss, outputs(logits), labels))
    assert found is not None and torch.equal(found[0], rows) and torch.equal(found[1], words)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long)),  # the loss is another one
        (torch.zeros(2, 5, 7), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, 5, 7), torch.zeros(2, 5)),
        (torch.zeros(2, 5, 7), torch.zeros(2, 4, dtype=torch.long)),
        (torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.int32)),
        (torch.zeros(2, 5, 7), torch.full((2, 5), 7)),
        (torch.zeros(2, 0, 7), torch.zeros(2, 0, dtype=torch.long)),
        ("nothing", torch.zeros(2, dtype=torch.long)),
    ],
)
def test_no_other_loss_is_taken_for_a_cross_entropy(logits: Any, labels: Tensor) -> None:
    assert as_cross_entropy(Prediction(torch.tensor(0.5), logits, labels)) is None


@pytest.mark.parametrize("more", [{"label_smoothing": 0.1}, {"weight": torch.arange(1.0, 8)}, {"reduction": "sum"}])
def test_nor_is_one_that_weighs_or_smooths_the_labels(more: dict[str, Any]) -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **more)
    assert as_cross_entropy(Prediction(loss, logits, labels)) is None
