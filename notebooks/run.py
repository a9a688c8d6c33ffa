"""Runs notebooks from top to bottom and keeps their outputs: `make notebooks`.

    python notebooks/run.py [1_quickstart.ipynb ...]

FLORAL_ASSETS names a folder with models and datasets (`resnet50`, `smollm2`, `cifar10`, `shakespeare`); without it
they come from the hub. FLORAL_FAST=1 makes everything small, to see that it runs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent


def run(path: Path) -> None:
    """Execute a notebook in an empty folder, and write it back with its outputs, free of what differs by machine."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=7200, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = re.sub(r"\x1b\[[0-9;]*m", "", output.text)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, path)


def main() -> None:
    """Run those that are named, or all."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for path in [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        print(f"{path.name} ...", flush=True)
        run(path)


if __name__ == "__main__":
    main()
