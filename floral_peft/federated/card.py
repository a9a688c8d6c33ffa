"""The model card of what clients trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from floral_peft.federated.records import Record
from floral_peft.tuner import FloralModel, adapter_data, base_name, write_card


_TAGS = ["federated-learning", "floral_peft"]
_COLUMNS = {"": "examples", "_client_mean": "clients", "_worst_decile": "worst tenth of the clients"}


def write_model_card(
    folder: Path, name: str, model: nn.Module, method: str, num_clients: int, records: Sequence[Record]
) -> None:
    """Write the README.md of a published model: what it is, how to use it, how good it is.

    Args:
        folder: The model's folder.
        name: What others load it by: a repository's name, or the folder's.
        model: The model.
        method: The method that trained it.
        num_clients: How many clients there were.
        records: The run's records; the last evaluation and the last round are told.
    """
    rounds = max((record["round"] for record in records if record["event"] == "round"), default=0)
    trained = f'Trained over {rounds} rounds by {num_clients} clients, method "{method}", with floral_peft.'
    parts = [f"# {name.rpartition('/')[2]}", _what(model), trained, "## Use", _use(name, model)]
    if figures := _figures(records):
        parts += ["## Figures", figures]
    write_card(folder, _data(model), "\n\n".join(parts))


def _data(model: Any) -> ModelCardData:
    if isinstance(model, PeftModel):
        return adapter_data(model, _TAGS)
    library = "transformers" if isinstance(model, PreTrainedModel) else None
    return ModelCardData(library_name=library, base_model=base_name(getattr(model, "name_or_path", None)), tags=_TAGS)


def _what(model: Any) -> str:
    if not _is_floral(model):
        return f"What many clients trained together: {_class_name(model)}. It holds nothing that is a single client's."
    config = model.active_peft_config
    base = base_name(config.base_model_name_or_path)
    where = (f"`{base}`" if base else _class_name(model)) + (", which was trained too" if config.train_base else "")
    rank = f"rank {config.r}" if config.budget is None else f"{config.budget:.3g} of each layer's parameters"
    return (
        f"A mixture of {config.num_adaptors} low-rank adaptors ({rank}) on {where}: FLoRAL "
        "([arXiv 2410.03497](https://arxiv.org/abs/2410.03497)). A client mixes the adaptors by its own router: a "
        "few numbers, fitted on a few of its examples. The routers of the clients that trained this are not here; the "
        "one that is mixes evenly."
    )


def _use(name: str, model: Any) -> str:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    known, kind = isinstance(inner, PreTrainedModel), type(inner).__name__
    lines = ["import floral_peft", "from peft import PeftModel"] if _is_floral(model) else []
    if isinstance(model, PeftModel):
        lines += [] if lines else ["from peft import PeftModel"]
        base = base_name(model.active_peft_config.base_model_name_or_path)
        lines += [f"from transformers import {kind}"] if known else []
        load = f'{kind}.from_pretrained("{base}")' if known and base else f"...  # the {kind} that was adapted"
        lines += ["", f"base = {load}", f'model = PeftModel.from_pretrained(base, "{name}")']
    elif known:
        lines += [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("{name}")']
    else:
        lines += ["from safetensors.torch import load_model", "", f"model = ...  # a {kind}"]
        lines += [f'load_model(model, "{name}/model.safetensors")']
    if _is_floral(model):
        loss = "" if known else ", loss=loss"  # loss(batch): a plain module returns none
        call = "    model(**batch)" if known else "    model(x)"
        lines += [f'model.fit_router(batches, client="me"{loss})', 'with model.client("me"):', call]
    return "\n".join(["```python", *lines, "```"])


def _figures(records: Sequence[Record]) -> str:
    """The last evaluation as a table: a row per metric, means over examples, over clients, over the worst of them."""
    evaluations = [record for record in records if record["event"] == "evaluate"]
    if not evaluations:
        return ""
    last: Mapping[str, Any] = evaluations[-1]
    endings = tuple(ending for ending in _COLUMNS if ending)
    metrics = [name for name in last if name.startswith("eval_") and not name.endswith(endings)]
    columns = [ending for ending in _COLUMNS if any(name + ending in last for name in metrics)]
    rows = [
        [name.removeprefix("eval_").replace("_", " "), *(_number(last.get(name + ending)) for ending in columns)]
        for name in metrics
    ]
    lines = [["", *(_COLUMNS[ending] for ending in columns)], ["---", *["---:"] * len(columns)], *rows]
    told = (
        f"After round {last['round']}, on the test examples of {last['clients_evaluated']} clients, each with its own "
        "model. Means over:"
    )
    return told + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"


def _is_floral(model: Any) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, FloralModel)


def _class_name(model: Any) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
