"""How rows and columns are called: `floral+budget=0.01+optimal_routing` is "FLoRAL, ρ = 1 %, π*"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from floral_peft.reports.runs import Run


_METHODS = {
    "fedavg": "FedAvg",
    "fedavg_finetune": "FedAvg + fine-tuning",
    "fedprox": "FedProx",
    "ditto": "Ditto",
    "local_only": "Local only",
    "local_adaptor": "Local Adaptor",
    "ifca": "IFCA",
    "fedem": "FedEM",
    "ensemble": "Ensemble",
    "floral": "FLoRAL",
}
_WORDS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mlp": "MLP", "bn": "batch norm"}
_SYMBOLS = {"num_adaptors": "C", "r": "r", "precondition_epsilon": "ε", "init_bias": "β₀"}
_SWITCHES = {
    "optimal_routing": "π*",
    "optimal_routing=true": "π*",
    "alternating": "alternating",
    "alternating=true": "alternating",
    "stateless": "stateless",
    "adapt_bias=false": "no biases",
    "exclude_modules=conv.*": "no ConvLoRA",
    "router_update=gradient": "gradient router",
    "router_update=mirror": "mirror router",
    "router_update=posterior": "posterior router",
}
# Where they were made or shown, and what the seeds' rows have in common.
_NO_PART_OF_A_LABEL = ("task", "method", "baselines", "seed", "report_to", "disable_tqdm", "save_steps")


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Each run's label: the one it was given, or its method and the settings in which its task's runs of it differ."""
    named = [run.result.get("label") for run in runs]
    differing = {}
    for key in {(run.task, run.method) for run in runs}:
        alike = [
            run.settings for run, name in zip(runs, named, strict=True) if (run.task, run.method) == key and not name
        ]
        names = dict.fromkeys(name for settings in alike for name in settings)
        differing[key] = [
            name
            for name in names
            if name not in _NO_PART_OF_A_LABEL and len({repr(settings.get(name)) for settings in alike}) > 1
        ]
    return [
        str(name)
        if name
        else "".join([run.method, *(_setting(key, run.settings.get(key)) for key in differing[run.task, run.method])])
        for run, name in zip(runs, named, strict=True)
    ]


def is_told_the_truth(label: str) -> bool:
    """Whether a label's router is fixed at the true cluster: an upper reference, not a method to be ranked."""
    return family(label) != label


def family(label: str) -> str:
    """The label without what tells its router the truth: both are drawn in one colour."""
    method, *settings = _parts(label)
    return "+".join([method, *(one for one in settings if _SWITCHES.get(one) != "π*")])


def row_title(label: str) -> str:
    """A label in a reader's words."""
    method, *settings = _parts(label)
    return ", ".join([_METHODS.get(method, method), *map(_setting_title, settings)])


def task_title(task: str) -> str:
    """A task's name in a reader's words."""
    words = [_WORDS.get(word, word) for word in task.split("-")]
    title = " ".join(words)
    return title[:1].upper() + title[1:]


def sibling(label: str, others: Sequence[str]) -> str:
    """The family among others whose routers learn what this one's are told, however they learn; its own by default."""
    own = _without_update(family(label))
    found = [family(one) for one in others if not is_told_the_truth(one)]
    alike = [one for one in found if _without_update(one) == own]
    return family(label) if family(label) in alike or not alike else alike[-1]


def row_order(label: str) -> tuple[int, str, bool, str]:
    """Sorts labels: simple methods first, those that are not known last; what is told the truth after what learns."""
    method = _parts(label)[0]
    known = list(_METHODS)
    place = known.index(method) if method in known else len(known)
    return (place, _without_update(family(label)), is_told_the_truth(label), label)


def _without_update(label: str) -> str:
    return "+".join(part for part in _parts(label) if not part.startswith("router_update="))


def _parts(label: str) -> list[str]:
    return re.split(r"\+(?=[a-z_])", label)


def _setting(name: str, value: object) -> str:
    return f"+{name}" if value is True else f"+{name}={str(value).lower() if value is False else value}"


def _setting_title(part: str) -> str:
    name, _, value = part.partition("=")
    if part in _SWITCHES:
        return _SWITCHES[part]
    if name == "budget" and re.fullmatch(r"[\d.]+", value):
        return f"ρ = {100 * float(value):g} %"
    if name == "conv_split":
        return f"ConvLoRA {value.replace('_', ' ')}"
    if value.startswith("x"):
        return f"{_SYMBOLS.get(name, name)} × {value[1:]}"
    return f"{_SYMBOLS.get(name, name)} = {value}" if value else name.replace("_", " ")
