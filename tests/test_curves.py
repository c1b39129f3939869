"""tools/curves.py: what is read of a run, which pictures there are, and that recorded curves end at their figure."""

import json
import math
from pathlib import Path

import pytest

from tools import curves

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_epochs_go_on_over_stages_and_lines_break_between_them(tmp_path):
    rows = [{"stage": "pretrain", "epoch": k, "loss": 2.0 - k} for k in range(2)]
    rows += [{"stage": "train", "epoch": 0, "loss": 0.5, "test": {"overall": 0.75}}]
    path = write(tmp_path / "ssp_pretrain" / "set_ir10" / "ce+rotation" / "seed3", rows)
    ((label, points),) = curves.curves_of(path).items()
    assert label == "ce+rotation, seed3"
    assert [point[0] for point in points[:2]] == [1, 2] and points[3] == (3, 75.0, 0.5)
    assert [point[2] for point in points[:2]] == [2.0, 1.0] and math.isnan(points[0][1])
    assert all(math.isnan(value) for value in points[2])


def test_points_of_the_toy_are_lines_of_their_own(tmp_path):
    rows = [{"stage": f"sweep1_{k}", "loss": 1.0, "test": {"overall": k / 100}} for k in (8, 9)]
    path = write(tmp_path / "toy_similarity" / "set_ir10" / "sweep1" / "seed0", rows)
    assert curves.curves_of(path) == {
        "sweep1, sweep1_8, seed0": [(1, 8.0, 1.0)],
        "sweep1, sweep1_9, seed0": [(1, 9.0, 1.0)],
    }


def test_one_picture_a_script_and_set(tmp_path, capsys):
    row = {"stage": "train", "loss": -1.0, "test": {"overall": 0.5}}
    for place in ("a/x_ir1/one/seed0", "a/x_ir1/two/seed0", "a/y_ir1/one/seed0", "b/x_ir1/one/seed1"):
        write(tmp_path / "runs" / place, [row, row])
    words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "figures"), "--only", "x_ir1"]
    assert curves.main(words) == 0
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["a-x_ir1-learning-curves.png", "b-x_ir1-learning-curves.png"]
    assert curves.main([*words[:4], "--only", "nothing"]) == 2
    assert "no metrics.jsonl below" in capsys.readouterr().err


RECORDED = sorted(ROOT.glob("results/*/cifar*/*/seed*/metrics.jsonl"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: "/".join(path.parts[-5:-1]))
def test_a_recorded_curve_ends_at_the_recorded_figure(path):
    result = json.loads((path.parent / "result.json").read_text())
    stages = curves.read_stages(path)
    if result["headline"]:
        (*_, last) = stages
        assert stages[last][-1][0] == pytest.approx(100 * result["headline"]["overall"])
        best = max(accuracy for accuracy, _ in stages[last])
        assert best == pytest.approx(100 * result["best_on_test"]["overall"])
    else:
        ours = [100 * row["last"]["overall"] for row in result["rows"].values()]
        assert [rows[-1][0] for rows in stages.values()] == pytest.approx(ours)
