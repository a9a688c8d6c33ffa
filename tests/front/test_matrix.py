from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from floral_peft.cli import main
from floral_peft.reports import (
    Matrix,
    matrix,
    paper_figure,
    read_run,
    read_runs,
    task_figures,
    to_csv,
    to_html,
    to_json,
    to_latex,
    to_markdown,
)
from floral_peft.reports.labels import row_order, row_title, task_title
from floral_peft.reports.series import Series
from floral_peft.reports.style import looks
from tests.front.made_up import write_run


@pytest.fixture
def two_by_two(tmp_path: Path) -> Path:
    """Three methods with two seeds on MNIST, two of them on a task of losses that nobody knows."""
    for seed, change in ((1, -0.01), (2, 0.01)):
        at = f"seed-{seed}"
        write_run(tmp_path / "m/fedavg" / at, "fedavg", seed=seed, accuracy=0.9 + change)
        told = "ensemble+optimal_routing"
        write_run(tmp_path / "m" / told / at, told, seed=seed, accuracy=0.95 + change, adaptors=4)
        write_run(
            tmp_path / "m/f" / at,
            "floral+budget=0.01",
            seed=seed,
            accuracy=0.92 + change,
            adaptors=4,
            found=0.5,
            budget=0.01,
        )
        for method, loss in (("fedavg", 0.5), ("mine", 0.25)):
            folder = tmp_path / "n" / method / at
            write_run(folder, method, task="nobodys-task", seed=seed, accuracy=loss, metric="loss")
    return tmp_path


@pytest.fixture
def found(two_by_two: Path) -> Matrix:
    return matrix(read_runs([two_by_two]))


def test_a_cell_is_the_mean_over_seeds_and_their_standard_deviation(found: Matrix) -> None:
    spread = found.cells["fedavg", "mnist-rotate"].spread()
    assert spread is not None
    assert spread.mean == pytest.approx(0.9)
    assert spread.std == pytest.approx(0.01 * 2**0.5)  # n − 1


def test_the_table_marks_the_best_but_not_those_told_the_truth_and_shows_the_papers_figures(found: Matrix) -> None:
    head, _, *rows = (line.strip("| ").split("|") for line in to_markdown(found).splitlines()[:6])
    assert [cell.strip() for cell in head] == ["method", "MNIST rotate (%)", "paper", "Nobodys task (loss)"]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["FedAvg", "*90.0 ± 1.4*", "91.5 ± 0.6", "*0.5 ± 0*"],
        ["Ensemble, π*", "95.0 ± 1.4", "95.8 ± 0.3", "–"],
        ["FLoRAL, ρ = 1 %", "**92.0 ± 1.4**", "91.3 ± 0.6", "–"],
        ["mine", "–", "–", "**0.25 ± 0**"],
    ]


def test_the_caption_tells_where_the_paper_trained_longer(found: Matrix) -> None:
    assert "MNIST rotate: rounds 20 here, 500 in the paper." in to_markdown(found)


def test_latex_escapes_what_it_must(found: Matrix) -> None:
    lines = to_latex(found).splitlines()
    assert lines[2] == r"method & MNIST rotate (\%) & paper & Nobodys task (loss) \\"
    assert lines[6] == r"FLoRAL, $\rho$ = 1\,\% & \textbf{92.0 $\pm$ 1.4} & 91.3 $\pm$ 0.6 & -- \\"


def test_csv_and_json_tell_the_same_in_full(found: Matrix) -> None:
    rows = {(row["task"], row["method"]): row for row in json.loads(to_json(found))}
    told = {(row["task"], row["method"]): row for row in csv.DictReader(io.StringIO(to_csv(found)))}
    assert rows.keys() == told.keys()
    row = rows["mnist-rotate", "floral+budget=0.01"]
    assert row["values"] == pytest.approx([0.91, 0.93])
    assert (row["seeds"], row["paper_mean"], row["adjusted_rand_index_mean"]) == ([1, 2], pytest.approx(0.913), 0.5)
    assert row["gained_against_fedavg"] + row["lost_against_fedavg"] == pytest.approx(1)
    assert told["mnist-rotate", "floral+budget=0.01"]["seeds"] == "1 2"
    assert told["nobodys-task", "mine"]["paper_mean"] == ""


def test_a_cell_with_fewer_seeds_says_so_and_an_unfinished_run_is_in_none(two_by_two: Path) -> None:
    folder = two_by_two / "m" / "fedavg" / "seed-2"
    (folder / "result.json").unlink()
    (folder / "client_metrics.jsonl").unlink()
    text = to_markdown(matrix(read_runs([two_by_two])))
    assert "89.0 (n = 1)" in text
    assert "1 run is not done" in text


def test_runs_without_a_label_are_called_by_what_they_differ_in(tmp_path: Path) -> None:
    for number, (rate, alternating) in enumerate(((0.1, True), (0.2, False))):
        folder = write_run(tmp_path / str(number), "floral", accuracy=0.9, learning_rate=rate, alternating=alternating)
        (folder / "result.json").unlink()
    assert matrix(read_runs([tmp_path])).labels == [
        "floral+alternating+learning_rate=0.1",
        "floral+alternating=false+learning_rate=0.2",
    ]


def test_the_same_run_twice_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, "fedavg")
    with pytest.raises(ValueError, match=r"one and .*two are both fedavg on mnist-rotate with seed 1"):
        matrix(read_runs([tmp_path]))


def test_the_papers_figure_is_for_its_own_settings_only(tmp_path: Path) -> None:
    def figure(label: str, task: str, **settings: object) -> tuple[float, float | None] | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return paper_figure(read_run(write_run(folder, label, task=task, **settings)), label)  # type: ignore[arg-type]

    assert figure("ensemble", "cifar10-label-shift") == pytest.approx((0.464, 0.092))
    assert figure("floral+optimal_routing+budget=0.1", "cifar100-reduced", budget=0.1) == pytest.approx((0.539, 0.009))
    assert figure("floral", "mnist-rotate") is None  # neither 1 % nor 10 %
    assert figure("floral+budget=0.01+alternating", "mnist-rotate", budget=0.01) is None
    assert figure("floral+budget=0.01+router_update=gradient", "mnist-rotate", budget=0.01) == pytest.approx(
        (0.913, 0.006)
    )
    assert figure("floral+budget=0.01+num_adaptors=x0.5", "cifar10-label-shift", budget=0.01) == (0.363, None)
    without = figure("floral+budget=0.01+exclude_modules=conv.*", "cifar10-rotate", budget=0.01)
    assert without is not None and without[0] == pytest.approx(0.676) and without[1] is None
    assert figure("fedavg", "digits") is None
    told = "floral+budget=0.01+optimal_routing"
    for start, expected in ((1.0, (0.939, 0.008)), (0.5, None)):  # as their code has it, and as nobody does
        found = figure(
            f"{told}+init_bias={start:g}", "mnist-rotate", budget=0.01, init_bias=start, optimal_routing=True
        )
        assert found == (None if expected is None else pytest.approx(expected))


def test_titles_are_a_readers_words() -> None:
    assert row_title("floral+budget=0.01+num_adaptors=x2+optimal_routing") == "FLoRAL, ρ = 1 %, C × 2, π*"
    assert row_title("floral+router_update=gradient") == "FLoRAL, gradient router"
    assert row_title("floral+precondition_epsilon=1e-5") == "FLoRAL, ε = 1e-5"
    assert row_title("floral+init_bias=1") == "FLoRAL, β₀ = 1"
    assert row_title("somebodys+step_size=1e+3") == "somebodys, step_size = 1e+3"
    assert task_title("cifar10-label-shift-reduced") == "CIFAR-10 label shift reduced"


def test_what_is_told_the_truth_stands_behind_what_learns_and_has_its_colour() -> None:
    labels = ["floral+router_update=gradient", "floral", "floral+optimal_routing", "fedavg", "floral+budget=0.1"]
    ordered = sorted(reversed(labels), key=row_order)
    assert ordered == ["fedavg", "floral", "floral+router_update=gradient", "floral+optimal_routing", labels[-1]]
    style = looks(ordered)
    assert style["floral+optimal_routing"]["color"] == style["floral"]["color"]
    assert len({style[label]["color"] for label in ordered}) == 4
    pair = looks(["floral+router_update=gradient", "floral+optimal_routing"])
    assert len({look["color"] for look in pair.values()}) == 1


def test_a_band_of_losses_stays_above_zero() -> None:
    band = Series(np.array([1]), np.array([[1e-3], [1.0], [0.1]])).band
    assert band is not None
    assert band[0][0] == pytest.approx(1e-3)


def test_pictures_of_all_kinds_are_drawn_where_there_is_the_data(found: Matrix) -> None:
    mnist = ["progress", "clients", "cost", "mixtures", "usage", "routers"]
    assert list(task_figures(found, "mnist-rotate")) == mnist
    assert list(task_figures(found, "nobodys-task")) == ["progress", "clients", "cost"]


def test_runs_that_recorded_next_to_nothing_still_have_a_page(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"event": "evaluate", "round": 0, "eval_loss": 1.5}\n')
    (tmp_path / "client_metrics.jsonl").write_text('{"client": "a<b", "eval_loss": null}\n')
    found = matrix(read_runs([tmp_path]))
    assert task_figures(found, found.tasks[0]) == {}
    assert "1.5" in to_html(found, {})


def test_the_page_stands_alone_and_tells_where_each_number_is_from(
    two_by_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, pictures = tmp_path / "page.html", tmp_path / "pictures"
    assert main(["report", str(two_by_two), "--html", str(page), "--pictures", str(pictures)]) == 0
    written = capsys.readouterr()
    assert "| FLoRAL, ρ = 1 % |" in written.out
    assert str(page) in written.err
    text = page.read_text()
    assert not re.search(r'(src|href)=(?!"data:)', text)
    assert text.count("data:image/png;base64,") == len(list(pictures.iterdir())) == 9
    assert str(two_by_two / "m" / "f" / "seed-2") in text
    assert "<b>92.0 ± 1.4</b>" in text
    for picture in pictures.iterdir():
        pixels = imread(picture)
        assert min(pixels.shape[:2]) > 150
        assert pixels.std() > 0.01


def test_a_baseline_is_not_for_a_table_over_seeds(two_by_two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(two_by_two), "--format", "csv", "--baseline", "x"]) == 2
    assert "--baseline is for single runs" in capsys.readouterr().err
