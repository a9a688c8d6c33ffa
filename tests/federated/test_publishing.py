"""What a run gives away: a client's model to the client, what clients have in common to everybody."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from floral_peft.federated import FederatedDataset, publishing
from floral_peft.tuner import export_client

from .clients import examples, floral_net, net, population, tensors, trainer


POINTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def outputs(run: Any, client: str) -> Tensor:
    """What the model that is evaluated for a client says."""
    with run._visit(), run._evaluated_as(client), torch.no_grad():
        return run.method.deployed(run.model).eval()(POINTS)


def as_plain(folder: Path) -> nn.Module:
    model = net()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


# Export


@pytest.mark.parametrize(
    "method", ["floral", "local_adaptor", "fedavg", "fedavg_finetune", "ditto", "local_only", "ifca"]
)
def test_a_clients_export_is_the_model_that_is_evaluated_for_it(tmp_path: Path, method: str) -> None:
    run = trainer(tmp_path / "run", method, router_learning_rate=1.0)
    run.train()
    before = tensors(run.model)
    expected = outputs(run, "client 1")
    exported = run.export("client 1", tmp_path / "one")
    assert exported.kind == "merged"
    with torch.no_grad():
        assert torch.allclose(as_plain(tmp_path / "one")(POINTS), expected, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in tensors(run.model).items())


def test_the_router_makes_the_difference(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", router_learning_rate=2.0, rounds=6, learning_rate=0.3, optimal_routing=True)
    run.train()
    for client in ("client 0", "client 1"):
        run.export(client, tmp_path / client)
    with torch.no_grad():
        one, other = as_plain(tmp_path / "client 0")(POINTS), as_plain(tmp_path / "client 1")(POINTS)
    assert not torch.allclose(one, other, atol=0.01)


def test_a_frozen_bases_client_is_exported_as_a_lora(tmp_path: Path) -> None:
    model = floral_net(train_base=False)
    run = trainer(tmp_path / "run", model=model, router_learning_rate=1.0, learning_rate=0.3)
    run.train()
    exported = run.export("client 2", tmp_path / "lora")
    assert exported.kind == "lora"
    assert exported.errors == {"0": 0.0, "2": 0.0}
    loaded = peft.PeftModel.from_pretrained(net(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(POINTS), outputs(run, "client 2"), atol=1e-6)


def test_a_lora_of_a_trained_base_comes_with_that_base(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", learning_rate=0.3)
    run.train()
    run.export("client 2", tmp_path / "lora", kind="lora")
    loaded = peft.PeftModel.from_pretrained(as_plain(tmp_path / "lora" / "base_model"), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(POINTS), outputs(run, "client 2"), atol=1e-6)


def test_one_shared_lora_of_peft_is_exported_as_it_is(tmp_path: Path) -> None:
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0", "2"]))
    run = trainer(tmp_path / "run", "fedavg", model=model)
    run.train()
    run.export("client 0", tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(net(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(POINTS), outputs(run, "client 0"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        run.export("client 0", tmp_path / "merged", kind="merged")


def test_a_client_outside_the_dataset_needs_a_router_in_the_model(tmp_path: Path) -> None:
    model = floral_net(num_clients=2, client_names=["guest", "client 1"])
    model.load_router_state_dict({"logits": torch.tensor([[3.0, 0.0]])}, client="guest")
    run = trainer(tmp_path / "run", model=model)
    run.train()
    run.export("guest", tmp_path / "guest")
    run.model.eval()
    with torch.no_grad(), run.model.client("guest"):
        assert torch.allclose(as_plain(tmp_path / "guest")(POINTS), run.model(POINTS), atol=1e-6)
    with pytest.raises(ValueError, match="'nobody' is unknown"):
        run.export("nobody", tmp_path / "nobody")


def test_what_holds_no_lora_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", "fedavg")
    with pytest.raises(ValueError, match="no adaptors"):
        run.export("client 0", tmp_path / "lora", kind="lora")
    mixing = trainer(tmp_path / "other", "ensemble")
    with pytest.raises(ValueError, match="mixes the outputs of 2 models"):
        mixing.export("client 0", tmp_path / "mixed")


# Publish


def head_and_body(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_published_adapter_has_a_card_with_figures(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", rounds=2)
    run.train()
    summary = run.evaluate()
    run.publish(tmp_path / "published")
    head, body = head_and_body(tmp_path / "published")
    assert head == {"library_name": "peft", "tags": ["federated-learning", "floral_peft"]}
    assert "A mixture of 2 low-rank adaptors (rank 2) on Sequential, which was trained too" in body
    assert 'over 2 rounds by 4 clients, method "floral"' in body
    assert 'PeftModel.from_pretrained(base, "published")' in body
    assert 'model.fit_router(batches, client="me", loss=loss)' in body
    row = [f"{summary[f'eval_accuracy{ending}']:.4g}" for ending in ("", "_client_mean", "_worst_decile")]
    assert f"| accuracy | {' | '.join(row)} |" in body
    assert "| loss |" in body
    assert f"- PEFT {peft.__version__}" in body
    assert str(tmp_path) not in body


def test_a_card_is_written_anew(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", rounds=1)
    run.publish(tmp_path / "published")
    first = (tmp_path / "published" / "README.md").read_text()
    assert "Figures" not in first
    run.train()
    run.evaluate()
    run.publish(tmp_path / "published")
    second = (tmp_path / "published" / "README.md").read_text()
    assert second.count("# published") == 1
    assert "over 1 rounds" in second
    assert "Figures" in second


def test_a_models_card_is_of_its_library(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    tokens = Dataset.from_dict({"input_ids": [[4, 5, 6]] * 4, "labels": [0, 1, 0, 1]})
    data = FederatedDataset({"one": tokens, "other": tokens})
    run = trainer(tmp_path / "run", "fedavg", model=BertForSequenceClassification(config), dataset=data)
    run.publish(tmp_path / "bert")
    head, body = head_and_body(tmp_path / "bert")
    assert head["library_name"] == "transformers"
    assert 'BertForSequenceClassification.from_pretrained("bert")' in body
    BertForSequenceClassification.from_pretrained(tmp_path / "bert")


# The Hub


class Hub:
    """A stand-in for huggingface_hub's `HfApi` that notes what it is asked for."""

    calls: list[tuple[str, dict[str, Any]]]
    files: dict[str, bytes]

    def __init__(self, token: Any = None) -> None:
        self.note("token", token=token)

    @classmethod
    def note(cls, name: str, **given: Any) -> None:
        cls.calls.append((name, given))

    def create_repo(self, repo_id: str, **given: Any) -> Any:
        self.note("create_repo", repo_id=repo_id, **given)
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def create_branch(self, repo_id: str, **given: Any) -> None:
        self.note("create_branch", repo_id=repo_id, **given)

    def upload_folder(self, *, folder_path: str, **given: Any) -> Any:
        self.note("upload_folder", **given)
        type(self).files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return type("Commit", (), {"commit_url": "https://hub/me/roles/commit/1"})


def test_what_is_pushed_is_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.calls, Hub.files = [], {}
    monkeypatch.setattr(publishing, "HfApi", Hub)
    run = trainer(tmp_path / "run", router_learning_rate=1.0)
    run.train()
    url = run.push_to_hub("roles", private=True, token="secret", revision="v1", commit_message="Two rounds")  # noqa: S106
    assert url == "https://hub/me/roles/commit/1"
    assert Hub.calls == [
        ("token", {"token": "secret"}),
        ("create_repo", {"repo_id": "roles", "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": "me/roles", "branch": "v1", "exist_ok": True}),
        (
            "upload_folder",
            {
                "repo_id": "me/roles",
                "commit_message": "Two rounds",
                "commit_description": None,
                "revision": "v1",
                "create_pr": False,
            },
        ),
    ]
    assert Hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b'PeftModel.from_pretrained(base, "me/roles")' in Hub.files["README.md"]
    run.publish(tmp_path / "published")
    assert Hub.files["adapter_model.safetensors"] == (tmp_path / "published/adapter_model.safetensors").read_bytes()


def test_a_published_adapter_takes_a_new_clients_router(tmp_path: Path) -> None:
    """The card's three lines; and what they give can be exported again."""
    run = trainer(tmp_path / "run", optimal_routing=True, rounds=30, learning_rate=0.3)
    run.train()
    run.publish(tmp_path / "published")
    model: Any = peft.PeftModel.from_pretrained(net(), str(tmp_path / "published")).eval()

    def loss(batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["points"]), batch["labels"])

    batch = examples(20, seed=77, cluster=1).with_format("torch")[:]
    mixture = model.fit_router([batch], client="me", loss=loss)
    assert float(mixture[1]) > 0.9  # adaptor 1 was trained by the clients of cluster 1
    export_client(copy.deepcopy(model), tmp_path / "mine", "me", kind="merged")
    with torch.no_grad(), model.client("me"):
        assert torch.allclose(as_plain(tmp_path / "mine")(POINTS), model(POINTS), atol=1e-6)


def test_a_personalised_client_is_exported(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", optimal_routing=True, rounds=6, learning_rate=0.3)
    run.train()
    run.personalize(examples(20, seed=77, cluster=1), "me")
    run.export("me", tmp_path / "mine")
    run.model.eval()
    with torch.no_grad(), run.model.client("me"):
        assert torch.allclose(as_plain(tmp_path / "mine")(POINTS), run.model(POINTS), atol=1e-6)


def test_several_clients_are_exported_from_one_run(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", dataset=population(3), model=floral_net(train_base=False))
    run.train()
    for client in run.dataset:
        run.export(client, tmp_path / client)
    assert all((tmp_path / client / "adapter_config.json").is_file() for client in run.dataset)
