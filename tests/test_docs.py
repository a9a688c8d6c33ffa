"""The examples in docs/ run, their links lead somewhere, and the reference has every public name."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest


DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*target_modules")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def reference() -> tuple[Any, dict[str, str]]:
    spec: Any = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker, maker.pages()


def test_every_public_name_has_a_docstring_and_an_entry_in_the_reference() -> None:
    maker, made = reference()
    for name in maker.MODULES:
        for one in importlib.import_module(name).__all__:
            assert f"\n## `{one}`\n" in made[f"{name}.md"]


@pytest.mark.slow  # not slow, but a new docstring should not fail who tries things out
def test_the_reference_is_what_the_docstrings_say() -> None:
    _, made = reference()
    for name, text in made.items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == text, f"{name}: run `make docs`"
