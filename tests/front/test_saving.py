"""What a trainer in Python leaves for reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from floral_peft.cli.main import main
from floral_peft.reports import read_run, save_run
from floral_peft.reports.style import size_unit

from ..federated.clients import floral_net, net, trainer


def trained(folder: Path, method: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = floral_net(num_adaptors=3) if method == "floral" else net()
    made = trainer(folder, method, model, rounds=4, eval_steps=2, seed=3, **settings)
    made.train()
    return made


def test_a_run_of_python_is_told_like_one_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trained(tmp_path / "own" / "floral", "floral", router_update="posterior")
    trained(tmp_path / "own" / "fedavg", "fedavg")
    assert main(["report", str(tmp_path / "own"), "--format", "markdown"])
    assert "save_run(trainer)" in capsys.readouterr().err
    written = save_run(made)
    save_run(trained(tmp_path / "own" / "fedavg 2", "fedavg"), label="fedavg")
    assert written["mixtures"].stat().st_size > 1000
    run = read_run(tmp_path / "own" / "floral")
    assert run.is_done and (run.task, run.method, run.seed) == ("own", "floral", 3)
    assert run.client_metrics == made.client_metrics
    torch.testing.assert_close(torch.tensor([row["mixture"] for row in run.mixtures]), made.mixtures()[1])
    assert run.result["base_parameters"] == sum(parameter.numel() for parameter in net().parameters())
    assert run.result["parameters"] > run.result["base_parameters"]
    assert run.search_ended == 2  # half of the run
    main(
        ["report", str(tmp_path / "own"), "--html", str(tmp_path / "page.html"), "--pictures", str(tmp_path / "drawn")]
    )
    told = capsys.readouterr().out
    assert "FLoRAL" in told and "FedAvg" in told
    assert {path.name for path in (tmp_path / "drawn").iterdir()} >= {"own-progress.png", "own-mixtures.png"}
    assert json.loads((tmp_path / "own" / "floral" / "result.json").read_text())["label"] is None


def test_sizes_are_told_in_a_unit_in_which_they_read_well() -> None:
    assert [size_unit(size)[0] for size in (12.0, 0.9, 2e-5, 0.0)] == ["GB", "MB", "kB", "kB"]
