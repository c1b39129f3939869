"""`python -m tools.curves`: learning curves of finished runs, one picture a script and data set.

Left: overall accuracy on the test set after every epoch. Right: mean training loss of every epoch.
Epochs are counted over all stages of a run, a line breaks where a stage ends. In toy_similarity.py
a stage is a point of the experiment, trained from scratch: each has a line of its own.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

NAN = float("nan")


def read_stages(path: Path) -> dict[str, list[tuple[float, float]]]:
    """{stage: [(accuracy in percent, loss) of each epoch]} of a metrics.jsonl; NaN where none."""
    stages: dict[str, list[tuple[float, float]]] = {}
    for text in path.read_text().splitlines():
        row = json.loads(text)
        accuracy = 100 * row["test"]["overall"] if "test" in row else NAN
        stages.setdefault(row["stage"], []).append((accuracy, row["loss"]))
    return stages


def curves_of(path: Path) -> dict[str, list[tuple[float, float, float]]]:
    """{label: [(epoch, accuracy, loss)]} of <script>/<data set>/<variant>/seed<k>/metrics.jsonl."""
    script, _, variant, seed = path.parts[-5:-1]
    stages = read_stages(path)
    if script == "toy_similarity":
        return {
            f"{variant}, {stage}, {seed}": [(k, *row) for k, row in enumerate(rows, 1)]
            for stage, rows in stages.items()
        }
    points, epoch = [], 0
    for rows in stages.values():
        points += [(epoch + k, *row) for k, row in enumerate(rows, 1)]
        points.append((NAN, NAN, NAN))
        epoch += len(rows)
    return {f"{variant}, {seed}": points}


def draw(curves: dict[str, list[tuple[float, float, float]]], title: str, out: Path) -> None:
    """Both panels of one picture; the loss is on a logarithmic axis where all of it is positive."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for label, points in curves.items():
        epochs, accuracy, loss = zip(*points, strict=True)
        left.plot(epochs, accuracy, linewidth=1.0, label=textwrap.fill(label, 40))
        right.plot(epochs, loss, linewidth=1.0)
    if all(not loss <= 0 for points in curves.values() for _, _, loss in points):
        right.set_yscale("log")
    left.set(xlabel="epoch", ylabel="overall accuracy, test (%)")
    right.set(xlabel="epoch", ylabel="training loss")
    for axes in (left, right):
        axes.grid(alpha=0.3, linewidth=0.6)
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(out, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.curves", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the pictures")
    parser.add_argument("--only", default="", help="runs in whose path this expression is found")
    args = parser.parse_args(words)
    pictures: dict[tuple[str, str], dict] = {}
    for path in sorted(args.runs.glob("*/*/*/seed*/metrics.jsonl")):
        if re.search(args.only, path.parent.as_posix()):
            pictures.setdefault(path.parts[-5:-3], {}).update(curves_of(path))
    if not pictures:
        print(f"curves: error: no metrics.jsonl below {args.runs} that fits", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for names, curves in pictures.items():
        draw(curves, ", ".join(names), args.out / f"{'-'.join(names)}-learning-curves.png")
    print(f"wrote {len(pictures)} pictures to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
