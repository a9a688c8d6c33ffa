"""Writes docs/reference/ from the docstrings of all public names: `make docs`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


FOLDER = Path(__file__).parent / "reference"
MODULES = (
    "floral_peft",
    "floral_peft.tuner",
    "floral_peft.federated",
    "floral_peft.methods",
    "floral_peft.tasks",
    "floral_peft.reports",
)
_SECTION = re.compile(r"^(Args|Attributes|\*\*Attributes\*\*|Returns|Raises|Yields):\s*(.*)$")
_ENTRY = re.compile(r"^(\*{0,2}[\w.`]+)(?: \((.+)\))?:(?: (.*))?$")


def pages() -> dict[str, str]:
    """File name → its Markdown."""
    made: dict[str, str] = {}
    where: dict[int, str] = {}  # a value that several modules name is told by the first
    for name in MODULES:
        module = importlib.import_module(name)
        made[f"{name}.md"] = page(module, where)
        where |= {id(getattr(module, one)): name for one in module.__all__ if id(getattr(module, one)) not in where}
    lines = ["# Reference", "", "Made from the docstrings by `make docs`.", ""]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += [f"- [`{name}`]({name}.md): {_first_line(module)}"]
    return {"README.md": "\n".join(lines) + "\n", **made}


def page(module: ModuleType, where: Mapping[int, str]) -> str:
    """A module's page: all that its `__all__` names, except what another page tells (`where`, by identity)."""
    parts = [f"# `{module.__name__}`", markdown(inspect.getdoc(module) or "")]
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        if (other := where.get(id(value))) is not None:
            parts.append(f"## `{name}`\n\nSee [`{other}.{name}`]({other}.md#{name.lower()}).")
        else:
            parts.append(entry(name, value, level=2))
    return "\n\n".join(part for part in parts if part) + "\n"


def entry(name: str, value: Any, level: int) -> str:
    """A name, what it is called with, what it says of itself; of a class its own public methods, too."""
    if not (inspect.isclass(value) or callable(value) or isinstance(value, property)):
        return f"{'#' * level} `{name}`\n\nA constant."
    parts = [f"{'#' * level} `{name}`"]
    if (signature := _signature(name, value)) is not None:
        parts.append(f"```\n{signature}\n```")
    parts.append(markdown(inspect.getdoc(value.fget if isinstance(value, property) else value) or ""))
    if dataclasses.is_dataclass(value) and "**Args**" not in parts[-1]:
        told = [f"- `{one.name}`: {one.metadata['help']}" for one in _told_fields(value)]
        parts.append("\n".join(["**Fields**", "", *told]) if told else "")
    if inspect.isclass(value):
        parts += [entry(f"{name}.{member}", held, level + 1) for member, held in _members(value)]
    return "\n\n".join(part for part in parts if part)


def _told_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """A dataclass's fields that say in their metadata what they are."""
    return [one for one in dataclasses.fields(kind) if "help" in one.metadata]


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class and of those bases that have no entry of their own."""
    public = {id(getattr(module, name)) for module in map(importlib.import_module, MODULES) for name in module.__all__}
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith("floral_peft") and id(base) not in public]
    ours = [kind, *bases]
    seen = set()
    for base in ours:
        for name, value in vars(base).items():
            plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            is_shown = inspect.isfunction(plain) or isinstance(plain, property)
            if name.startswith("_") or name in seen or not is_shown or not inspect.getdoc(plain):
                continue
            seen.add(name)
            yield name, plain


def _signature(name: str, value: Any) -> str | None:
    if isinstance(value, property):
        return None
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    kept = [p.replace(annotation=_short(p.annotation)) for p in signature.parameters.values() if p.name != "self"]
    if dataclasses.is_dataclass(value):  # defaults that a factory makes have no text
        kept = [p.replace(default=_Dots()) if "factory" in repr(p.default) else p for p in kept]
    shown = signature.replace(parameters=kept, return_annotation=_short(signature.return_annotation))
    text = f"{name}{shown}"
    return text if len(text) < 100 else _wrapped(name, shown)


def _wrapped(name: str, signature: inspect.Signature) -> str:
    arguments = [f"    {parameter}," for parameter in signature.parameters.values()]
    gives = signature.return_annotation
    arrow = "" if gives is inspect.Signature.empty else f" -> {gives}"
    return "\n".join([f"{name}(", *arguments, f"){arrow}"])


class _Text(str):
    """An annotation that prints as it was written."""

    def __repr__(self) -> str:
        return str(self)


class _Dots:
    def __repr__(self) -> str:
        return "..."


def _short(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _Text(re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text))


def markdown(doc: str) -> str:
    """A docstring of Google's form as Markdown: its sections become lists. Code blocks stay as they are."""
    lines: list[str] = []
    section = code = False
    for line in doc.splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and (found := _SECTION.match(line)):
            section = True
            lines += ["", f"**{found[1].strip('*')}**", "", *([found[2]] if found[2] else [])]
            continue
        elif section and line and not line.startswith(" "):
            section = False
            lines.append("")
        if section and not code:
            held = re.match(r"^ {4}(\S.*)$", line)
            if held and (item := _ENTRY.match(held[1])):
                kind = f" ({item[2]})" if item[2] else ""
                lines.append(f"- `{item[1].strip('`')}`{kind}: {item[3] or ''}".rstrip())
                continue
            line = f"  {line.strip()}" if line.strip() else ""
        lines.append(line)
    text = "\n".join(lines)
    return re.sub(r"\[`([^`]+)`\](?:\[[^\]]+\])?(?!\()", r"`\1`", re.sub(r"\n{3,}", "\n\n", text)).strip()


def _first_line(module: ModuleType) -> str:
    return textwrap.shorten((inspect.getdoc(module) or "").split("\n")[0], 200)


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
