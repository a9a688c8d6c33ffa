"""The notebooks run from top to bottom, on small settings; their outputs are kept with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from .assets import write_assets


NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # a reader's warnings are no errors
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLORAL_FAST", "1")
    monkeypatch.setenv("FLORAL_ASSETS", str(assets))
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with plt.rc_context():
        names: dict[str, Any] = {"__name__": "__main__"}
        for number, cell in enumerate(cells(path)):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)  # noqa: S102


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path: Path) -> None:
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    assert "image/png" in {kind for output in cells(path)[-1]["outputs"] for kind in output.get("data", {})}  # the end
    assert not any(output["output_type"] == "error" for cell in cells(path) for output in cell["outputs"])
