"""The figures of Almansoori, Horváth and Takáč (CPAL 2025, arXiv 2410.03497): test accuracy in percent."""

from __future__ import annotations

from typing import NamedTuple

from floral_peft.reports.runs import Run


class Figure(NamedTuple):
    """A published mean over seeds, and its standard deviation where it is given, both as shares of 1."""

    mean: float
    std: float | None


_TASKS = (
    "mnist-rotate",
    "mnist-label-shift",
    "mnist-rotate-reduced",
    "mnist-label-shift-reduced",
    "cifar10-rotate",
    "cifar10-label-shift",
    "cifar10-rotate-reduced",
    "cifar10-label-shift-reduced",
    "cifar100",
    "cifar100-reduced",
)
# Table 1: (method, π* given, ρ) → "mean ± std" by task, in the order above.
_TABLE_1 = {
    # MNIST, MNIST reduced, CIFAR-10, CIFAR-10 reduced: rotate and label shift each; CIFAR-100, CIFAR-100 reduced
    ("fedavg", False, None): "91.5 .6|25.8 2.4|78.2 .6|23.2 .9|64.4 .3|21.9 .4|45.6 .3|18.7 .4|29.2 1.8|20.7 1.4",
    ("local_adaptor", False, None):
        "86.6 .3|84.5 1.8|47.4 5.4|32.0 2.3|66.3 .5|68.8 .5|33.5 .5|30.8 .8|85.1 .8|39.5 2.8",
    ("ensemble", False, None): "92.0 .1|93.8 .5|66.7 5.3|86.4 .4|71.0 2.8|46.4 9.2|42.4 .9|41.7 4.6|86.2 .0|43.7 3.2",
    ("ensemble", True, None): "95.8 .3|95.6 .3|88.2 1.4|87.6 1.3|73.7 .2|73.3 .1|45.0 .9|45.1 .8|92.8 .3|55.0 .4",
    ("floral", False, 0.01): "91.3 .6|89.7 3.2|73.1 3.7|46.0 9.9|65.5 .4|62.8 8.8|45.2 .3|44.2 .9|81.3 .5|52.2 .5",
    ("floral", True, 0.01): "93.9 .8|93.7 .2|87.5 2.1|87.6 .5|68.9 .2|72.2 .2|47.8 .9|44.1 .6|82.4 .2|53.1 .4",
    ("floral", False, 0.1): "91.8 1.0|93.1 .9|75.7 2.3|70.8 7.1|65.1 .3|56.2 5.5|44.5 .4|42.1 .2|87.3 .3|51.2 1.0",
    ("floral", True, 0.1): "94.5 .6|94.2 .2|87.0 .7|86.9 .5|69.3 .5|72.1 .5|47.2 .3|42.7 .3|86.6 .5|53.9 .9",
}  # fmt: skip
# With these in its label, a row is still one of the table's.
_ITS_OWN = {"router_update", "precondition_epsilon", "init_bias"}
_OF_THE_PAPER = {"budget", "optimal_routing", *_ITS_OWN}
# The ablations, without deviations: a label → mean on these tasks. Its CIFAR-100 is not Table 1's, and is left out.
_ABLATION_TASKS = ("cifar10-rotate", "cifar10-label-shift")
_ABLATIONS = {
    "floral+budget=0.01+conv_split=in": (67.6, 73.5),
    "floral+budget=0.01+conv_split=out": (68.5, 74.0),
    "floral+budget=0.01+exclude_modules=conv.*": (67.6, 73.9),
    "floral+budget=0.01+num_adaptors=x0.5": (66.5, 36.3),
    "floral+budget=0.01+num_adaptors=x2": (69.0, 73.8),
}


def paper_figure(run: Run, label: str) -> Figure | None:
    """What the paper reports for a run's task and method, if it does.

    Args:
        run: The run; a row of Table 1 is known by its method, its budget and whether its routers are the true ones.
        label: Its label, by which a row of the ablations is known.
    """
    of_ablations = "+".join(part for part in label.split("+") if part.partition("=")[0] not in _ITS_OWN)
    if of_ablations in _ABLATIONS:
        means = dict(zip(_ABLATION_TASKS, _ABLATIONS[of_ablations], strict=True))
        return Figure(means[run.task] / 100, None) if run.task in means else None
    method, optimal = run.method, bool(run.settings.get("optimal_routing"))
    # Label settings of other names make another method of it.
    others = {part.partition("=")[0] for part in label.split("+")[1:]} - _OF_THE_PAPER
    as_there = run.settings.get("init_bias", 0.0) in (0.0, 1.0)  # as the text says, or as the code does
    row = _TABLE_1.get((method, optimal, run.settings.get("budget") if method == "floral" else None))
    if row is None or others or not as_there or run.task not in _TASKS:
        return None
    mean, std = map(float, row.split("|")[_TASKS.index(run.task)].split())
    return Figure(mean / 100, std / 100)


def paper_rounds(task: str) -> int:
    """How many rounds the paper trains one of its tasks."""
    return 1500 if task.endswith("-reduced") else 500


def paper_order(task: str) -> tuple[int, str]:
    """Sorts tasks: the paper's in its order, then the others by name."""
    return (_TASKS.index(task) if task in _TASKS else len(_TASKS), task)
