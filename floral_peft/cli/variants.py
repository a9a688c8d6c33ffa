"""A variant: a method and the settings that make it a row of a table, as in `floral+budget=0.01+optimal_routing`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from floral_peft.cli.errors import UsageError
from floral_peft.federated import method_names
from floral_peft.nearest import did_you_mean


# The authors' router, and their damping of preconditioned steps.
_FLORAL = "floral+budget=0.01+precondition_epsilon=1e-5"
_FLORAL_10 = "floral+budget=0.1+precondition_epsilon=1e-5"
_LEARNED = "+router_update=gradient"

#: Names for several variants at once.
GROUPS: dict[str, tuple[str, ...]] = {
    "paper": (
        "fedavg",
        "local_adaptor",
        "ensemble",
        "ensemble+optimal_routing",
        f"{_FLORAL}{_LEARNED}",
        f"{_FLORAL}+optimal_routing",
        f"{_FLORAL_10}{_LEARNED}",
        f"{_FLORAL_10}+optimal_routing",
    ),
    "ablations": (
        "fedavg",
        f"{_FLORAL}{_LEARNED}",
        f"{_FLORAL_10}{_LEARNED}",
        f"{_FLORAL}{_LEARNED}+conv_split=balanced",
        f"{_FLORAL}{_LEARNED}+conv_split=in",
        f"{_FLORAL}{_LEARNED}+conv_split=out",
        f"{_FLORAL}{_LEARNED}+exclude_modules=conv.*",
        f"{_FLORAL}{_LEARNED}+num_adaptors=x0.5",
        f"{_FLORAL}{_LEARNED}+num_adaptors=x2",
        f"{_FLORAL}{_LEARNED}+adapt_bias=false",
    ),
}

_PART = re.compile(r"\+(?=[a-z_])")  # not the + of 1e+3
_TIMES = re.compile(r"x(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        label: As it was written.
        method: The method's name.
        settings: Setting → its value as written; `""` for a switch that is on, `"x2"` for twice the task's own value.
    """

    label: str
    method: str
    settings: dict[str, str]

    @property
    def multiplies(self) -> bool:
        """Whether it needs the task's own values."""
        return any(_TIMES.fullmatch(value) for value in self.settings.values())

    def words(self, values: dict[str, object] | None = None) -> list[str]:
        """The flags of the variant.

        Args:
            values: The settings without it, for those that it multiplies, which are left out if there are none.

        Raises:
            UsageError: One that is to be multiplied is no number.
        """
        words = ["--method", self.method]
        for name, value in self.settings.items():
            times = _TIMES.fullmatch(value)
            if times is None:
                words += [f"--{name}", *([value] if value else [])]
            elif values is not None:
                words += [f"--{name}", self._product(name, float(times[1]), values.get(name))]
        return words

    def _product(self, name: str, factor: float, value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{self.label}: {name}={value!r} is no number that could be multiplied by {factor:g}.")
        return str(max(1, round(factor * value)) if isinstance(value, int) else factor * value)


def read_variant(label: str) -> Variant:
    """A variant as it is written: a method, then settings, each after a plus.

    Raises:
        UsageError: There is no such method, or a setting is given twice.
    """
    method, *parts = _PART.split(label)
    if method not in method_names():
        raise UsageError(
            f"there is no method {method!r}{did_you_mean(method, [*method_names(), *GROUPS])} "
            f"The methods are {', '.join(method_names())}; {' and '.join(GROUPS)} stand for several."
        )
    settings: dict[str, str] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name in settings:
            raise UsageError(f"{label!r} gives {name} twice: keep one.")
        settings[name] = value
    return Variant(label, method, settings)


def read_variants(labels: list[str]) -> list[Variant]:
    """The variants of a list in which groups may stand for their members; each once, in order.

    Raises:
        UsageError: As of [`read_variant`].
    """
    members = [member for label in labels for member in GROUPS.get(label, (label,))]
    return [read_variant(label) for label in dict.fromkeys(members)]
