"""One client's model without this package: merged, or as a LoRA that PEFT loads alone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.utils import hub

from floral_peft import FloralConfig
from floral_peft.tuner import Ensemble, export_client

from .models import TOKENS, floral_llama, get_peft_model, tiny_llama
from .reference import randomize


FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")
IMAGES = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def conv_net() -> Any:
    """Convolutions of several kinds with and without bias, norms, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, (3, 1), padding=(1, 0)), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 12, 3, groups=2, padding=1), nn.Conv2d(12, 6, 2, dilation=2)),
        nn.Sequential(nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(64, 5)),
    ).eval()


def linear_net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).eval()


def adapted(base: nn.Module, **config: Any) -> Any:
    """A copy of a base model with adaptors, of which client 1 is chosen."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
    targets = [name for name, module in base.named_modules() if isinstance(module, kinds)]
    settings: dict[str, Any] = {"num_adaptors": 3, "r": 2, "num_clients": 3, "target_modules": targets} | config
    model = get_peft_model(copy.deepcopy(base), FloralConfig(**settings)).eval()
    randomize(model)
    model.set_client(1)
    return model


def as_lora(base: nn.Module, folder: Path) -> Any:
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    assert loaded.active_peft_config.peft_type == "LORA"
    return loaded


def as_plain(base: nn.Module, folder: Path) -> Any:
    model = copy.deepcopy(base)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


# Plain modules


@pytest.mark.parametrize("kind", ["merged", "lora"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shared_r": 1},
        {"alpha": 0.5, "router_top_k": 2},
        {"adapt_bias": False},
        {"adapt_norms": True},
        {"adapt_norms": "reparametrized"},
        {"conv_split": "out"},
        {"conv_split": "in", "r": 1},
        {"router_per_layer": True},
        {"modules_to_save": ["3.2"], "target_modules": ["0.0", "1.0"]},
    ],
    ids=str,
)
@torch.no_grad()
def test_what_is_exported_computes_what_the_client_computes(tmp_path: Path, kind: Any, config: Any) -> None:
    base = conv_net()
    model = adapted(base, **config)
    if "modules_to_save" in config:
        nn.init.normal_(model.get_base_model()[3][2].modules_to_save["default"].weight)
    model.set_client(0)
    expected = model(IMAGES, client_ids=torch.tensor([1]))
    export_client(model, tmp_path, 1, kind)
    assert int(model.router.client) == 0
    loaded = as_plain(base, tmp_path) if kind == "merged" else as_lora(base, tmp_path)
    assert same(loaded(IMAGES), expected)
    assert not same(base(IMAGES), expected)


@torch.no_grad()
def test_a_merged_model_keeps_its_bits_where_nothing_was_adapted(tmp_path: Path) -> None:
    base = conv_net()
    export_client(adapted(base, target_modules=["0.0"]), tmp_path, kind="merged")
    written, own = load_file(tmp_path / "model.safetensors"), base.state_dict()
    assert written.keys() == own.keys()
    assert [name for name in own if not torch.equal(written[name], own[name])] == ["0.0.weight"]


def test_a_lora_has_the_rank_of_the_mixture(tmp_path: Path) -> None:
    model = adapted(nn.Sequential(nn.Linear(20, 30)), shared_r=1)
    export_client(model, tmp_path / "mixed")
    assert peft.LoraConfig.from_pretrained(str(tmp_path / "mixed")).r == 3 * 2 + 1
    never = -1e4
    model.load_router_state_dict({"logits": torch.tensor([[never, 0.0, never]])}, client=1)
    export_client(model, tmp_path / "alone")
    assert peft.LoraConfig.from_pretrained(str(tmp_path / "alone")).r == 2 + 1


@torch.no_grad()
def test_a_lora_may_be_cut_off_at_a_rank_and_says_what_that_costs(tmp_path: Path) -> None:
    base = linear_net()
    model = adapted(base)
    delta = model.get_base_model()[0].get_delta_weight("default")
    exported = export_client(model, tmp_path, rank=2)
    sigma = torch.linalg.svdvals(delta.double())
    lost = float(sigma[2:].square().sum().sqrt() / sigma.norm())
    assert exported.errors["0"] == pytest.approx(lost, rel=1e-4)
    assert exported.errors["0"] > 0.1
    assert as_lora(base, tmp_path).active_peft_config.r == 2


@torch.no_grad()
def test_a_fresh_adapter_is_exported_as_the_base(tmp_path: Path) -> None:
    base = linear_net()
    model = get_peft_model(copy.deepcopy(base), FloralConfig(target_modules=["0", "2"]))
    export_client(model, tmp_path)
    x = torch.randn(2, 6)
    assert torch.equal(as_lora(base, tmp_path)(x), base(x))


@torch.no_grad()
def test_several_active_adapters_are_exported_together(tmp_path: Path) -> None:
    base, x = linear_net(), torch.randn(4, 6)
    model = adapted(base)
    model.add_adapter("second", FloralConfig(num_adaptors=2, r=1, num_clients=3, target_modules=["2"]))
    model.base_model.set_adapter(["default", "second"])
    randomize(model)
    model.set_client(1)
    expected = model(x)
    for kind in ("merged", "lora"):
        export_client(model, tmp_path / kind, kind=kind)
    assert same(as_plain(base, tmp_path / "merged")(x), expected)
    assert same(as_lora(base, tmp_path / "lora")(x), expected)


@torch.no_grad()
def test_only_active_adapters_are_exported(tmp_path: Path) -> None:
    base, x = linear_net(), torch.randn(4, 6)
    model = adapted(base, target_modules=["0"])
    model.add_adapter("second", FloralConfig(num_adaptors=2, r=1, num_clients=3, target_modules=["2"]))
    randomize(model)
    expected = model(x)
    for kind in ("merged", "lora"):
        export_client(model, tmp_path / kind, 1, kind)
    assert same(as_plain(base, tmp_path / "merged")(x), expected)
    assert same(as_lora(base, tmp_path / "lora")(x), expected)
    assert as_lora(base, tmp_path / "lora").active_peft_config.target_modules == {"0"}


@torch.no_grad()
def test_a_trained_base_goes_along(tmp_path: Path) -> None:
    base, x = linear_net(), torch.randn(4, 6)
    model = adapted(base, train_base=True)
    for parameter in model.get_base_model()[0].base_layer.parameters():
        parameter.add_(0.3)
    expected = model(x)
    assert export_client(model, tmp_path / "auto").kind == "merged"
    assert same(as_plain(base, tmp_path / "auto")(x), expected)
    assert export_client(model, tmp_path / "cut", rank=1).kind == "lora"
    assert export_client(model, tmp_path / "lora", kind="lora").kind == "lora"
    trained = as_plain(base, tmp_path / "lora" / "base_model")
    assert not same(trained(x), expected)
    assert same(as_lora(trained, tmp_path / "lora")(x), expected)
    assert "base_model" in (tmp_path / "lora" / "README.md").read_text()


@torch.no_grad()
def test_a_layer_is_found_by_its_whole_name_where_its_last_part_is_not_enough(tmp_path: Path) -> None:
    base = nn.Sequential(linear_net(), nn.Linear(4, 6), linear_net()).eval()
    x = torch.randn(4, 6)
    for targets, ranks in ((["0.0", "2.2"], {"2.2": 1}), ("1", {}), (r"0\.0|1", {"1": 1})):
        model = adapted(base, target_modules=targets, rank_pattern=ranks)
        export_client(model, tmp_path)
        assert same(as_lora(base, tmp_path)(x), model(x))


def test_an_ensembles_client_gets_the_member_that_it_uses(tmp_path: Path) -> None:
    members = [linear_net(), linear_net()]
    nn.init.zeros_(members[1][2].weight)
    model = Ensemble(members, FloralConfig(num_clients=2))
    model.load_router_state_dict({"logits": torch.tensor([[-1e4, 0.0]])}, client=1)
    export_client(model, tmp_path, client=1)
    assert torch.equal(as_plain(linear_net(), tmp_path)[2].weight, members[1][2].weight)
    with pytest.raises(ValueError, match="mixes the outputs of 2 models"):
        export_client(model, tmp_path, client=0)


# Models of transformers


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
        (bert, {"target_modules": ["word_embeddings", "query"], "task_type": "SEQ_CLS", "adapt_norms": True}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}),
        (gpt2, {"target_modules": ["wpe", "c_fc"], "task_type": "CAUSAL_LM"}),
    ],
    ids=["bert", "bert with embeddings and norms", "gpt2", "gpt2 with positions"],
)
@torch.no_grad()
def test_transformers_models_are_exported(tmp_path: Path, build: Any, config: Any) -> None:
    base = build()
    model = adapted(base, **config)
    if config["task_type"] == "SEQ_CLS":
        nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight)
    expected = model(input_ids=TOKENS).logits
    export_client(model, tmp_path / "lora")
    assert same(as_lora(base, tmp_path / "lora")(input_ids=TOKENS).logits, expected)
    export_client(model, tmp_path / "merged", kind="merged")
    loaded = type(base).from_pretrained(tmp_path / "merged").eval()
    assert same(loaded(input_ids=TOKENS).logits, expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@torch.no_grad()
def test_tied_embeddings_can_be_a_lora_but_not_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_llama(tie_word_embeddings=True).eval()
    model = adapted(base, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    expected = model(input_ids=TOKENS).logits
    with pytest.raises(ValueError, match=r"embed_tokens.*lm_head.*lora"):
        export_client(model, tmp_path, kind="merged")
    export_client(model, tmp_path)
    assert same(as_lora(base, tmp_path)(input_ids=TOKENS).logits, expected)


# Without this package

ALONE = """
import sys
from pathlib import Path

sys.modules["floral_peft"] = None
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder = Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")
outputs = {}
with torch.no_grad():
    lora = AutoPeftModelForCausalLM.from_pretrained(folder / "llama-lora").eval()
    outputs["lora"] = lora(input_ids=inputs["tokens"]).logits
    merged = AutoModelForCausalLM.from_pretrained(folder / "llama-merged").eval()
    outputs["merged"] = merged(input_ids=inputs["tokens"]).logits
    net = torch.load(folder / "net.pt", weights_only=False)
    outputs["net"] = PeftModel.from_pretrained(net, folder / "net-lora").eval()(inputs["images"])
save_file(outputs, folder / "outputs.safetensors")
"""


@pytest.mark.slow
@torch.no_grad()
def test_exports_load_where_this_package_is_not_installed(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = FloralConfig(num_adaptors=3, r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    llama = get_peft_model(base, config).eval()
    randomize(llama)
    net = conv_net()
    model = adapted(net, adapt_norms=True)
    torch.save(net, tmp_path / "net.pt")
    save_file({"tokens": TOKENS, "images": IMAGES}, tmp_path / "inputs.safetensors")
    expected = {"lora": llama(input_ids=TOKENS).logits, "merged": llama(input_ids=TOKENS).logits, "net": model(IMAGES)}
    export_client(llama, tmp_path / "llama-lora")
    export_client(llama, tmp_path / "llama-merged", kind="merged")
    export_client(model, tmp_path / "net-lora")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True, capture_output=True)  # noqa: S603
    outputs = load_file(tmp_path / "outputs.safetensors")
    assert all(same(outputs[name], value) for name, value in expected.items())


# The Hub


def test_a_model_is_pushed_as_any_of_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, bytes] = {}

    class Hub:
        """A stand-in for huggingface_hub's `HfApi`."""

        def create_repo(self, repo_id: str, **given: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_commit(self, repo_id: str, operations: list[Any], **given: Any) -> str:
            for operation in operations:
                pushed[f"{repo_id}/{operation.path_in_repo}"] = Path(operation.path_or_fileobj).read_bytes()
            return "commit"

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# Roles"))
    model = adapted(linear_net())
    assert model.push_to_hub("roles", private=True) == "commit"
    assert pushed.keys() == {f"me/roles/{name}" for name in FILES}
    for name in FILES:
        (tmp_path / name).write_bytes(pushed[f"me/roles/{name}"])
    loaded = peft.PeftModel.from_pretrained(linear_net(), str(tmp_path))
    for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


# Refusals


def test_what_cannot_be_exported_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = adapted(linear_net())
    with pytest.raises(ValueError, match="must be one of 'auto', 'merged', 'lora'"):
        export_client(model, tmp_path, kind="whole")  # type: ignore[arg-type]
    for kind, rank in (("auto", 0), ("merged", 2)):
        with pytest.raises(ValueError, match=r"a LoRA's rank is at least 1.*a merged model has none"):
            export_client(model, tmp_path, kind=kind, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range"):
        export_client(model, tmp_path, client=7)
    with pytest.raises(ValueError, match="no FLORAL adaptors"):
        export_client(linear_net(), tmp_path)
    model.set_client([0, 1])
    with pytest.raises(ValueError, match="2 clients are selected"):
        export_client(model, tmp_path)
    model.set_client(0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        export_client(model, tmp_path)
    norms = adapted(conv_net(), target_modules=["0.1"])
    with pytest.raises(ValueError, match=r"No adapted layer is of a kind that LoRA knows.*merged"):
        export_client(norms, tmp_path)


@pytest.mark.parametrize("first, second", [("merged", "lora"), ("lora", "merged")])
def test_two_kinds_of_export_do_not_share_a_folder(tmp_path: Path, first: Any, second: Any) -> None:
    model = adapted(conv_net())
    export_client(model, tmp_path, client=1, kind=first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds an export of the other kind.*choose another folder"):
        export_client(model, tmp_path, client=1, kind=second)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    export_client(model, tmp_path, client=2, kind=first)  # one of the same kind takes its place


def test_a_lora_does_not_go_beside_a_plain_model_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an export of the other kind"):
        export_client(adapted(conv_net()), tmp_path, client=1, kind="lora")


@torch.no_grad()
def test_a_quantised_layer_can_be_a_lora_but_not_merged(tmp_path: Path) -> None:
    base, x = linear_net(), torch.randn(4, 6)
    model = adapted(base)
    expected = model(x)
    model.get_base_model()[0].quantization_backend = object()  # all that is asked of it here
    with pytest.raises(ValueError, match=r"Layer 0 is quantised.*lora"):
        export_client(model, tmp_path, kind="merged")
    export_client(model, tmp_path)
    assert same(as_lora(base, tmp_path)(x), expected)


def test_a_lora_that_pefts_names_would_confuse_is_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model = adapted(base, target_modules=["0", "1", "2.1"])
    with pytest.raises(ValueError, match=r"hold 1 whole.*find 2\.1 too.*merged"):
        export_client(model, tmp_path, kind="lora")


def test_the_card_names_the_base_only_if_others_can_find_it(tmp_path: Path) -> None:
    model = floral_llama()
    for name, shown in (("someone/llama", True), (str(tmp_path), False)):
        model.peft_config["default"].base_model_name_or_path = name
        export_client(model, tmp_path, client=1)
        card = (tmp_path / "README.md").read_text()
        assert card.startswith("---\n")
        assert ("base_model: someone/llama" in card) == shown
        assert str(tmp_path) not in card
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == name
