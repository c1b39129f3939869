"""Several ranks against one: loss and gradients in float64, whole commands and launchers."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import fake_tree
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import common
import data_lt
import models

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def entry(rank: int, world: int, folder: str, function, args) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        torch.save(function(*args), f"{folder}/rank{rank}.pt")
    finally:
        if dist.is_initialized():  # a script's own launch has ended it
            dist.destroy_process_group()


def on_ranks(function, args, world: int, folder: Path) -> list:
    """What `function(*args)` returns on each of `world` ranks."""
    mp.spawn(entry, (world, str(folder), function, args), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


# --- loss and gradients ---------------------------------------------------------------------------


def of_all_ranks(loss: torch.Tensor) -> float:
    """The mean of a loss over the ranks."""
    mean = loss.detach() / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(mean)
    return float(mean)


def share(rows: torch.Tensor) -> torch.Tensor:
    return rows.tensor_split(common.world_size())[common.rank()]


def replicate(net: torch.nn.Module) -> torch.nn.Module:
    return common.replicate(argparse.Namespace(compile=False), net)


def epoch_of_gradients(net, loader):
    """Loss of each batch, summed gradients; no update in between, batch norm is frozen."""
    replica, losses = replicate(net), []
    loader.set_epoch(1)
    for views, labels, _ in loader:
        loss = F.cross_entropy(replica(views[0].double()), labels)
        loss.backward()
        losses.append(of_all_ranks(loss))
    return losses, [p.grad.clone() for p in net.parameters()]


def of_letters(batch: int):
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8"), torch.nn.Linear(64, 10)).double().eval()
    for module in net.modules():  # statistics that are not the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    dataset = data_lt.Set(images, torch.arange(40) % 10, torch.arange(40), list("abcdefghij"))
    augment = data_lt.Augment(16, (0.5,) * 3, (0.2,) * 3, crop="pad", pad=2, flip=0.5)
    return epoch_of_gradients(net, data_lt.Loader(dataset, batch, augment=augment, seed=3))


def of_jpegs(root: str):
    """ResNet-10 on decoded images at 64 px."""
    train = data_lt.load_pool("imagenet_lt", root, 64, files=True).train
    torch.manual_seed(2)
    head = torch.nn.Linear(512, len(train.classes))
    net = models.Net(models.backbone("resnet10"), head).double().eval()
    colour = {"flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0)}
    augment = data_lt.Augment(64, (0.5,) * 3, (0.2,) * 3, crop="resized", **colour)
    options = {"seed": 1, "workers": 1, "sampler": "class_aware", "epoch_length": 16}
    return epoch_of_gradients(net, data_lt.Loader(train, 8, augment=augment, **options))


def contrastive():
    """InfoNCE over the gathered embeddings, mean over own anchors; neighbours are positives."""
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(5, 3).double(), torch.randn(8, 5, dtype=torch.float64)
    replica = replicate(layer)
    own = F.normalize(replica(share(x)), dim=1)
    every = common.gather_with_gradient(own)
    loss = F.cross_entropy(own @ every.T / 0.1, share(torch.arange(8) ^ 1))
    loss.backward()
    return [of_all_ranks(loss)], [p.grad.clone() for p in layer.parameters()]


def weighted():
    losses = torch.arange(1.0, 9.0, dtype=torch.float64).requires_grad_()
    weights = torch.tensor([1, 0, 2, 0.5, 3, 1, 0, 4], dtype=torch.float64)
    loss = common.weighted_mean(share(losses), share(weights))
    loss.backward()
    gradient = losses.grad / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(gradient)
    return [of_all_ranks(loss)], [gradient]


def not_finite_on_one_rank() -> str:
    """The loss of the last rank is no number in step 3: what each rank ends with."""
    layer = torch.nn.Linear(3, 2)
    stage = object.__new__(common.Stage)
    stage.name, stage.epoch, stage.total = "train", 0, 2
    stage.bad = torch.full((), torch.inf)
    stage.parts = {"optimizer": common.sgd(layer.parameters(), 0.1)}
    for stage.step in range(9):
        loss = layer(torch.ones(4, 3)).square().mean()
        bad = common.rank() == common.world_size() - 1 and stage.step == 3
        try:
            stage.guard(loss * (float("nan") if bad else 1))
        except common.RunError as error:
            return str(error)


def everything(root: str) -> dict:
    epochs = {"letters": of_letters(16), "uneven letters": of_letters(20), "jpegs": of_jpegs(root)}
    losses = {"contrastive": contrastive(), "weighted": weighted()}
    return epochs | losses | {"not finite": not_finite_on_one_rank()}


@pytest.mark.parametrize("world", [2, 4])
def test_n_ranks_equal_one_in_loss_and_gradients_and_end_together(tree, tmp_path, world):
    alone = everything(str(tree))
    assert alone["weighted"][0] == pytest.approx([(1 + 6 + 2 + 15 + 6 + 32) / 11.5])
    for found in on_ranks(everything, (str(tree),), world, tmp_path):
        said = found.pop("not finite")
        assert said == alone["not finite"] and "stage train, epoch 1 of 2, step 4, lr 0.1" in said
        for name, (losses, gradients) in found.items():
            tolerance = 1e-7 if name == "jpegs" else 1e-9
            assert losses and losses == pytest.approx(alone[name][0], rel=tolerance), name
            for ours, other in zip(gradients, alone[name][1], strict=True):
                torch.testing.assert_close(ours, other, rtol=tolerance, atol=1e-10)
    assert common.weighted_mean(torch.ones(3), torch.zeros(3)) == 0


# --- whole commands on a tree of JPEGs: launchers, a mistake, a dead rank, a signal --------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    fake_tree.make_imagenet_lt(root, n_max=12)
    return root


def on_tree(tree: Path, out: Path, *flags) -> list[str]:
    small = "--dataset imagenet_lt --epochs 3 --workers 1 --batch-size 8".split()
    return commands.command("tests/plain_ce.py", *small, "--data-root", tree, *flags, out=out)


def begin(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, **PIPES, env=commands.environment())


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a command said on stderr until it ended with this exit code."""
    _, errors = process.communicate(timeout=200)
    assert process.returncode == code, errors[-2000:]
    return errors


@pytest.fixture(scope="module")
def two_ranks(tree, tmp_path_factory) -> list[dict]:
    """What two local ranks log when nothing happens to them."""
    out = tmp_path_factory.mktemp("two")
    finish(begin(on_tree(tree, out, "--gpus", 2)))
    return commands.rows(out)


HOLD = """
import os, time
end_epoch = common.Stage.end_epoch

def held(stage, judge):
    end_epoch(stage, judge)
    Path(sys.argv[0]).with_name(f"rank{common.rank()}-{os.getpid()}").touch()
    time.sleep(600)

common.Stage.end_epoch = held
"""


def held(line: list[str], out: Path) -> tuple[subprocess.Popen, list[int]]:
    """The running command, both ranks waiting since an epoch was saved, and their processes."""
    head, main, tail = Path(line[1]).read_text().partition("if __name__")
    script = out / "held" / "plain_ce.py"
    script.parent.mkdir()
    script.write_text(head + HOLD + main + tail)
    process, deadline = begin([line[0], str(script), *line[2:]]), time.time() + 200
    while len(ranks := sorted(script.parent.glob("rank*"))) < 2:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    return process, [int(path.name.partition("-")[2]) for path in ranks]


def test_two_launchers_with_a_rendezvous_equal_one(tree, two_ranks, tmp_path):
    """A dry run of two nodes: each its own torchrun, one rank each, on the loopback device."""
    port = 20_000 + os.getpid() % 10_000  # below those that a system hands out
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    node += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "dry"]
    nodes = [begin(node + on_tree(tree, tmp_path)[1:]) for _ in range(2)]
    for process in nodes:
        finish(process)
    assert commands.rows(tmp_path) == two_ranks
    assert sum(map(sum, commands.result(tmp_path)["confusion"])) == 10, "each test image once"


def test_a_mistake_under_two_ranks_is_told_once(tree, tmp_path):
    wrong = ("--dataset", "glyphs_lt", "--imb-ratio", "1e5")
    errors = finish(begin(on_tree(tree, tmp_path, "--gpus", 2, *wrong)), 2)
    assert errors.strip().count("\n") == 0 and "with 0 of its" in errors, errors


def test_a_rank_that_dies_ends_all_with_one_line_and_costs_an_epoch_at_most(
    tree, two_ranks, tmp_path
):
    line = on_tree(tree, tmp_path, "--gpus", 2)
    process, ranks = held(line, tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    errors = finish(process, 1)
    assert errors.strip().count("\n") == 0 and "rank 1 was killed by SIGKILL" in errors, errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    common.load_checkpoint(commands.folder(tmp_path) / "last.pt")
    finish(begin(line))
    assert commands.rows(tmp_path) == two_ranks


def test_sigterm_ends_both_ranks_and_another_number_continues(tree, two_ranks, tmp_path):
    process, _ = held(on_tree(tree, tmp_path, "--gpus", 2), tmp_path)
    process.send_signal(signal.SIGTERM)
    assert not finish(process, 143).strip()
    assert common.load_checkpoint(commands.folder(tmp_path) / "last.pt")["epoch"] == 1
    finish(begin(on_tree(tree, tmp_path)))  # one rank: in the same folder, with the same batches
    full = json.loads((commands.folder(tmp_path) / "result.json").read_text())
    assert full["machine"]["stretches"] == [{"ranks": 2, "epochs": 1}, {"ranks": 1, "epochs": 2}]
    assert commands.rows(tmp_path)[:1] == two_ranks[:1]
