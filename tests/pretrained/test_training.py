"""transformers' models train over clients on their own losses, their base frozen or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import EvalPrediction

from floral_peft.federated import FederatedArguments, FederatedTrainer

from .models import CLASSES, KINDS, VOCABULARY, clients, floral, llama, pad, resnet, texts, trainer, vit


CONFIGS: list[dict[str, Any]] = [
    {},
    {"train_base": True},
    {"target_modules": "all-linear", "shared_r": 2},
    {"adapt_norms": True},
    {"router_per_layer": True},
]


def frozen(model: Any) -> dict[str, torch.Tensor]:
    adaptors = ("floral_", "modules_to_save")
    return {n: v.clone() for n, v in model.state_dict().items() if not any(part in n for part in adaptors)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "+".join(config) or "default")
def test_a_pretrained_model_trains_and_its_frozen_base_stays_as_it_was(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    model = floral(kind, **config)
    before = frozen(model)
    run = trainer(tmp_path, kind, model, learning_rate=0.05)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first
    assert not any(record.get("clients_dropped") for record in run.records)
    changed = {name for name, value in frozen(model).items() if not torch.equal(value, before[name])}
    assert bool(changed) == bool(config.get("train_base"))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_and_gradient_checkpointing_change_the_result_by_rounding_at_most(tmp_path: Path, kind: str) -> None:
    settings: list[dict[str, Any]] = [{}, {"bf16": True}, {"gradient_checkpointing": True}]
    losses = []
    for number, more in enumerate(settings):
        if kind == "resnet" and "gradient_checkpointing" in more:
            with pytest.raises(ValueError, match="ResNetForImageClassification cannot recompute"):
                trainer(tmp_path / str(number), kind, floral(kind), **more)
            continue
        run = trainer(tmp_path / str(number), kind, floral(kind), rounds=1, learning_rate=0.05, **more)
        run.train()
        losses.append(run.records[0]["train_loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02)
    if kind != "resnet":
        assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("method", ["fedavg", "local_only"])
@pytest.mark.parametrize("kind", ["resnet", "llama"])
def test_the_methods_without_routers_train_a_plain_lora_of_pefts(tmp_path: Path, kind: str, method: str) -> None:
    targets = {"resnet": ["convolution"], "llama": None}[kind]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type=KINDS[kind][2])
    model: Any = peft.get_peft_model(KINDS[kind][0](), config)
    run = trainer(tmp_path, kind, model, method=method, learning_rate=0.3)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first


def test_in_bf16_the_search_for_adaptors_does_not_blow_rounding_up_in_layers_smaller_than_its_rank(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"router_update": "posterior", "search_r": 16, "learning_rate": 0.05}
    run = trainer(tmp_path, "resnet", floral("resnet"), bf16=True, **settings)
    run.train()
    assert run.evaluate()["eval_loss"] < 1.2  # with ε = 1e-5 it was 1e10


def test_a_new_head_is_trained_by_all_clients_together(tmp_path: Path) -> None:
    model = floral("vit", modules_to_save=["classifier"])
    run = trainer(tmp_path, "vit", model)
    run.train()
    head = model.base_model.model.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    run.publish(tmp_path / "published")
    again: Any = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "published"))
    assert torch.equal(again.base_model.model.classifier.modules_to_save["default"].weight, head.weight)


def test_metrics_get_the_predictions_of_sentences_of_different_lengths(tmp_path: Path) -> None:
    def next_word(prediction: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)[:, 1:]
        right = np.asarray(prediction.predictions).argmax(-1)[:, :-1] == labels
        return {"next_word": float(right[labels != -100].mean())}

    args = FederatedArguments(
        str(tmp_path), rounds=1, per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True, cohort="loop"
    )
    run = FederatedTrainer(floral("llama"), args, clients(texts), data_collator=pad, compute_metrics=next_word)
    assert 0 <= run.evaluate()["eval_next_word_worst_decile"] <= 1


def test_a_router_finds_who_counts_upwards_and_generates_as_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = floral("llama", target_modules="all-linear", r=4, init_std=0.3)
    settings: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.02, "router_learning_rate": 0.3}
    run = trainer(tmp_path, "llama", model, rounds=15, precondition=False, **settings)
    run.train()
    prompts = torch.tensor([[20, 21], [20, 19]])
    lone = []
    for name, prompt in (("client 1", prompts[:1]), ("client 0", prompts[1:])):
        with model.client(name):
            lone.append(model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False))
    with model.client(["client 1", "client 0"]):
        both = model.generate(input_ids=prompts, max_new_tokens=3, do_sample=False)
    assert torch.equal(both, torch.cat(lone))
    assert not torch.equal(*(rows[:, 2:] for rows in lone))


def test_frozen_batch_norms_keep_their_statistics_and_send_nothing(tmp_path: Path) -> None:
    model = floral("resnet", modules_to_save=["classifier"], adapt_norms=True)
    run = trainer(tmp_path, "resnet", model, rounds=1)
    run.train()
    assert not any("running" in name for name in run._groups.public)
    assert all(bool((v == 0).all()) for name, v in model.state_dict().items() if name.endswith("running_mean"))


def test_batch_norms_that_train_still_move(tmp_path: Path) -> None:
    run = trainer(tmp_path, "resnet", resnet(), method="fedavg", rounds=1)
    run.train()
    assert any("running_mean" in name for name in run._groups.statistics)
    assert any(bool(v.abs().sum()) for name, v in run.model.state_dict().items() if name.endswith("running_mean"))


def test_frozen_batch_norms_rest_in_one_pass_too(tmp_path: Path) -> None:
    found = []
    for cohort in ("loop", "vectorized"):
        run = trainer(tmp_path / cohort, "resnet", floral("resnet"), rounds=1, cohort=cohort)
        run.train()
        found.append(run.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_attention_masks_train_in_a_loop_where_they_cannot_in_one_pass(tmp_path: Path) -> None:
    run = trainer(tmp_path, "llama", peft.get_peft_model(llama(), peft.LoraConfig()), method="fedavg", cohort="auto")
    run.train()
    assert not run.records[0]["clients_dropped"]


def test_the_last_states_of_a_prompt_reach_the_head_in_one_piece() -> None:
    """A slice of the hidden states makes torch copy a frozen head's weight for every row of the batch."""
    model, pieces = floral("llama"), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda head, args, output: pieces.append(args[0]))
    prompts = torch.tensor([[20, 21, 22], [20, 19, 18]])
    with torch.no_grad():
        last = model(input_ids=prompts, logits_to_keep=1).logits
        assert pieces[0].is_contiguous() and pieces[0].shape[1] == 1
        torch.testing.assert_close(last, model(input_ids=prompts).logits[:, -1:])
    model.unload()
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_clients_know_their_loss_at_any_temperature_whether_it_is_of_tokens_or_of_examples(
    tmp_path: Path, kind: str
) -> None:
    run = trainer(tmp_path, kind, floral(kind), router_update="posterior")
    temperatures, rows, router = torch.tensor([1.0, 1e6]), torch.arange(4), torch.zeros(1, 1, 2)
    with run._visit():
        turn = run._clients.turn("client 1", run._clients.private("client 1"), 0)
        found = turn.losses_at(temperatures, rows, router)
        loss = run.model(**turn.examples.batch(rows)).loss
    assert found is not None and float(found[0]) == pytest.approx(float(loss.detach()), rel=1e-3)
    assert float(found[1]) == pytest.approx(math.log(VOCABULARY if kind == "llama" else CLASSES), rel=1e-3)
