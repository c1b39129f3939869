"""How fast each method trains against a bare step of its network: `benchmarks.py --gpu`.

Every method runs as its user starts it, at its CIFAR-10-LT settings, on random images of that set's
size for a few epochs, eager and with --compile; its metrics.jsonl tells of the last epoch of each
stage. The bare step is forward, backward and optimiser of the same network on one fixed batch of
the same size. One JSON line a stage that trains the network:

  passes_per_second   images forward and backward a second, all views (without gradient: 0)
  data_wait           share of the training time spent waiting for the next batch
  of_bare             passes_per_second / those of the eager bare step
  utilisation         operations (2 a multiply-add) of the network / the peak of the GPU
  compiled            passes_per_second with --compile
  bare, bare_compiled, bare_graphed   passes a second of the bare step, graphed on a GPU only
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import commands  # noqa: E402

import common  # noqa: E402
import models  # noqa: E402
from data_lt import long_tail_counts  # noqa: E402

METHODS = {
    "CE": "ssp_pretrain.py --ssp none --train-epochs {e}",
    "SSP, rotation": "ssp_pretrain.py --epochs {e} --train-epochs {e}",
    "SSP, MoCo": "ssp_pretrain.py --ssp moco --epochs {e} --train-epochs {e}",
    "KCL": "tsc.py --method kcl --epochs {e} --classifier-epochs {e}",
    "TSC": "tsc.py --epochs {e} --classifier-epochs {e}",
    "BNS + IP-DPP": "bns_ipdpp.py --epochs {e} --finetune-epochs {e}",
    "GLMC": "fsgl.py --method glmc --epochs {e}",
    "FSGL": "fsgl.py --epochs {e}",
    "TailCalibX": "tailcalibx.py --epochs {e} --classifier-epochs {e}",
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # operations a second, bf16, data sheets


def cifar_like(path: Path, n_max: int, n_test: int, side: int) -> None:
    """Random images in the numbers of CIFAR-10-LT (ratio 100): n_max in the first class."""
    rng, counts = np.random.default_rng(0), long_tail_counts(10, n_max, 100)
    arrays = {}
    for split, each in (("train", counts), ("test", n_test)):
        labels = np.repeat(np.arange(10), each)
        arrays[f"y_{split}"] = labels
        arrays[f"x_{split}"] = rng.integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8)
    np.savez(path, **arrays)


def run_method(words: Sequence[str], data: Path, out: Path, device: str) -> tuple[dict, list[dict]]:
    """Arguments of a finished run and the last row of each of its stages."""
    more = ["--dataset", data, "--device", device, "--quiet", "--eval-every", 1000]
    commands.run(*words, *more, out=out, timeout=3600)
    folder = commands.folder(out)
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {row["stage"]: row for row in rows}
    return json.loads((folder / "args.json").read_text()), list(last.values())


def batch_of(row: dict) -> int:
    """Images of a step: its passes by those of one image."""
    per_image = row["timing"]["passes_per_second"] / row["timing"]["images_per_second"]
    return round(row["passes"] / ((row["epoch"] + 1) * row["steps"]) / per_image)


def seconds_of(step: Callable, device: str) -> float:
    """Median seconds of 30 steps, after ten that are not counted."""
    spent = []
    for _ in range(40):
        begin = time.perf_counter()
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent[10:])


@functools.cache
def bare_steps(name: str, batch: int, side: int, device: str, precision: str, compiled: bool):
    """Passes a second of bare steps of a backbone with ten classes, and operations of one pass."""
    args = argparse.Namespace(device=device, precision=precision)
    images = torch.randn(batch, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    modes = {"bare": None, "bare_compiled": "default", "bare_graphed": "reduce-overhead"}
    found = dict.fromkeys(modes)
    if not device.startswith("cuda"):
        del modes["bare_graphed"]
    for kind, mode in modes.items() if compiled else [("bare", None)]:
        backbone = models.backbone(name)
        net = models.Net(backbone, torch.nn.Linear(backbone.feature_dim, 10))
        net = net.to(device, memory_format=torch.channels_last)
        optimizer = common.sgd(net.parameters(), 0.01)
        network = torch.compile(net, mode=mode) if mode else net

        def step(network=network, optimizer=optimizer) -> None:
            with common.autocast(args):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        if not mode:
            with FlopCounterMode(display=False) as counter:
                step()
            found["operations"] = counter.get_total_flops() / batch
        found[kind] = batch / seconds_of(step, device)
    return found


def measure(name: str, words: Sequence[str], data: Path, device: str, compiled: bool):
    """Yield one row a stage of a method."""
    with tempfile.TemporaryDirectory() as folder:
        said, rows = run_method(words, data, Path(folder) / "eager", device)
        faster = {}
        if compiled:
            again = run_method([*words, "--compile"], data, Path(folder) / "compiled", device)[1]
            faster = {row["stage"]: round(row["timing"]["passes_per_second"]) for row in again}
    card = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    peak = next((PEAK[key] for key in PEAK if key in card), None)
    side, kinds = np.load(data)["x_test"].shape[1], ("bare", "bare_compiled", "bare_graphed")
    for row in rows:
        if not row["passes"]:
            continue  # a classifier on a frozen network: nothing to compare with its whole step
        batch, passes = batch_of(row), row["timing"]["passes_per_second"]
        floor = bare_steps(said["backbone"], batch, side, device, said["precision"], compiled)
        yield {
            "name": name, "stage": row["stage"], "backbone": said["backbone"], "batch": batch,
            "precision": said["precision"], "passes_per_second": round(passes),
            "data_wait": row["timing"]["data_wait_share"],
            "of_bare": round(passes / floor["bare"], 3),
            "utilisation": round(passes * floor["operations"] / peak, 4) if peak else None,
            "compiled": faster.get(row["stage"]),
            **{key: floor[key] and round(floor[key]) for key in kinds},
        }  # fmt: skip


def main(device: str = "cuda") -> None:
    """Print one JSON line for each stage of each method."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "random.npz"
        cifar_like(data, n_max=5000, n_test=100, side=32)
        for name, words in METHODS.items():
            for row in measure(name, words.format(e=4).split(), data, device, compiled=True):
                print(json.dumps(row | {"device": torch.cuda.get_device_name()}), flush=True)
