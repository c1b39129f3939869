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

PLAIN = argparse.Namespace(compile=False)
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def entry(rank: int, world: int, folder: str, function, args) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        torch.save(function(*args), f"{folder}/rank{rank}.pt")
    finally:
        if dist.is_initialized():  # a script's own launch has ended it
            dist.destroy_process_group()


def on_ranks(function, args, world: int, folder: Path) -> list:
    """What `function(*args)` returns on each of `world` ranks."""
    mp.spawn(entry, (world, str(folder), function, args), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def compare(function, args, world: int, folder: Path, tolerance: float) -> None:
    """(losses, gradients) of a function are on every rank those of one process."""
    found = on_ranks(function, args, world, folder)
    losses, gradients = function(*args)
    assert losses
    for theirs, their_gradients in found:
        assert theirs == pytest.approx(losses, rel=tolerance)
        for ours, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(other, ours, rtol=tolerance, atol=1e-10)


def small_problem(batch: int):
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8"), torch.nn.Linear(64, 10)).double().eval()
    for module in net.modules():  # statistics that are not the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(40)
    dataset = data_lt.Set(images, labels % 10, labels, list("abcdefghij"))
    normal = (0.5,) * 3, (0.2,) * 3
    augment = data_lt.Augment(16, *normal, crop="pad", pad=2, flip=0.5)
    loader = data_lt.Loader(dataset, batch, augment=augment, seed=3)
    loader.set_epoch(1)
    return net, loader


def losses_and_gradients(batch: int):
    """An epoch on the small problem."""
    return epoch_of_gradients(*small_problem(batch))


def epoch_of_gradients(net, loader):
    """Loss of each batch, summed gradients; no update in between, batch norm is frozen."""
    replica, losses = common.replicate(PLAIN, net), []
    for views, labels, _ in loader:
        values = F.cross_entropy(replica(views[0].double()), labels, reduction="none")
        loss = values.mean()
        loss.backward()
        loss = loss.detach() / common.world_size()
        if common.world_size() > 1:
            dist.all_reduce(loss)
        losses.append(float(loss))
    return losses, [p.grad.clone() for p in net.parameters()]


def contrastive_gradients():
    """InfoNCE over the gathered embeddings, mean over a rank's own anchors, and its gradients."""
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(5, 3).double(), torch.randn(8, 5, dtype=torch.float64)
    mine = x.tensor_split(common.world_size())[common.rank()]
    replica = common.replicate(PLAIN, layer)
    own = F.normalize(replica(mine), dim=1)
    every = common.gather_with_gradient(own)
    targets = (
        torch.arange(8).tensor_split(common.world_size())[common.rank()] ^ 1
    )  # neighbours are positives
    loss = F.cross_entropy(own @ every.T / 0.1, targets)
    loss.backward()
    value = loss.detach() / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(value)
    return [float(value)], [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("world", [2, 4])
def test_gathered_embeddings_carry_the_gradient(tmp_path, world):
    compare(contrastive_gradients, (), world, tmp_path, 1e-10)


def fake_tree_gradients(root: str):
    """One epoch of ResNet-10 on decoded JPEGs at 64 px."""
    train = data_lt.load_pool("imagenet_lt", root, 64, files=True).train
    torch.manual_seed(2)
    net = (
        models.Net(models.backbone("resnet10"), torch.nn.Linear(512, len(train.classes)))
        .double()
        .eval()
    )
    augment = data_lt.Augment(
        64, (0.5,) * 3, (0.2,) * 3, crop="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0)
    )
    loader = data_lt.Loader(
        train, 6, augment=augment, seed=1, workers=1, sampler="class_aware", epoch_length=18
    )
    loader.set_epoch(1)
    return epoch_of_gradients(net, loader)


def test_two_ranks_equal_one_on_a_tree_of_jpegs(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path)
    compare(fake_tree_gradients, (str(tmp_path),), 2, tmp_path, 1e-7)


@pytest.mark.parametrize(("world", "batch"), [(2, 16), (4, 20)])
def test_n_ranks_equal_one_in_loss_and_gradients(tmp_path, world, batch):
    compare(losses_and_gradients, (batch,), world, tmp_path, 1e-9)


def weighted():
    world, rank = common.world_size(), common.rank()
    losses = torch.arange(1.0, 9.0, dtype=torch.float64)[rank::world].requires_grad_()
    weights = torch.tensor([1, 0, 2, 0.5, 3, 1, 0, 4], dtype=torch.float64)[rank::world]
    loss = common.weighted_mean(losses, weights)
    loss.backward()
    return loss.detach() / world, losses.grad / world


def test_a_weighted_mean_is_that_of_the_whole_batch(tmp_path):
    parts = on_ranks(weighted, (), 2, tmp_path)
    loss, gradient = weighted()
    assert loss == pytest.approx((1 + 6 + 2 + 15 + 6 + 32) / 11.5)
    assert sum(part[0] for part in parts) == pytest.approx(loss.item())
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part[1], gradient[rank::2])
    with torch.no_grad():
        assert common.weighted_mean(torch.ones(3), torch.zeros(3)) == 0


def steps_until_known() -> str:
    """The loss of the second rank is not finite in step 3: what each rank ends with."""
    layer = torch.nn.Linear(3, 2)
    stage = object.__new__(common.Stage)
    stage.name, stage.epoch, stage.total = "train", 0, 2
    stage.bad = torch.full((), torch.inf)
    stage.parts = {"optimizer": common.sgd(layer.parameters(), 0.1)}
    for stage.step in range(9):
        loss = layer(torch.ones(4, 3)).square().mean()
        bad = common.rank() == 1 and stage.step == 3
        try:
            stage.guard(loss * (float("nan") if bad else 1))
        except common.RunError as error:
            return str(error)


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_in_the_same_step(tmp_path):
    said = set(on_ranks(steps_until_known, (), 2, tmp_path))
    assert len(said) == 1 and "stage train, epoch 1 of 2, step 4, lr 0.1" in said.pop()


# --- whole commands on a tree of JPEGs: launchers, a mistake, a dead rank, a signal --------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    fake_tree.make_imagenet_lt(root, n_max=12)
    return root


def on_tree(tree: Path, out: Path, *flags) -> list[str]:
    small = "--dataset imagenet_lt --epochs 3 --workers 1 --batch-size 8".split()
    return commands.command("tests/plain_ce.py", *small, "--data-root", tree, *flags, out=out)


@pytest.fixture(scope="module")
def two_ranks(tree, tmp_path_factory) -> list[dict]:
    """What two local ranks log when nothing happens to them."""
    out = tmp_path_factory.mktemp("two")
    finish(on_tree(tree, out, "--gpus", 2))
    return commands.rows(out)


def finish(line: list[str]) -> None:
    done = subprocess.run(line, **PIPES, env=commands.environment(), timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def ranks_of(launcher: subprocess.Popen) -> dict[str, int]:
    """Process of each rank of a `--gpus N` command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == str(launcher.pid):
                found |= {
                    part[5:].decode(): int(entry.name)
                    for part in environ
                    if part.startswith(b"RANK=")
                }
    return found


HOLD = """
import time
end_epoch = common.Stage.end_epoch

def held(stage, judge):
    end_epoch(stage, judge)
    Path(sys.argv[0]).with_name(f"held{common.rank()}").touch()
    time.sleep(600)

common.Stage.end_epoch = held
"""


def started(line: list[str], out: Path) -> subprocess.Popen:
    """The running command; both ranks wait once an epoch is saved."""
    head, main, tail = Path(line[1]).read_text().partition("if __name__")
    script = out / "held" / "plain_ce.py"
    script.parent.mkdir()
    script.write_text(head + HOLD + main + tail)
    line = [line[0], str(script), *line[2:]]
    process = subprocess.Popen(line, **PIPES, env=commands.environment())
    deadline = time.time() + 200
    while len(list(script.parent.glob("held[01]"))) < 2:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def test_two_launchers_with_a_rendezvous_equal_one(tree, two_ranks, tmp_path):
    """A dry run of two nodes: each its own torchrun, one rank each, on the loopback device."""
    port = 20_000 + os.getpid() % 10_000  # below those that a system hands out
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    node += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "dry"]
    line = node + on_tree(tree, tmp_path)[1:]
    nodes = [subprocess.Popen(line, **PIPES, env=commands.environment()) for _ in range(2)]
    for process in nodes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    assert commands.rows(tmp_path) == two_ranks
    assert sum(map(sum, commands.result(tmp_path)["confusion"])) == 10, "each test image once"


def test_a_mistake_under_two_ranks_is_told_once(tree, tmp_path):
    wrong = ("--dataset", "glyphs_lt", "--imb-ratio", "1e5")
    line = on_tree(tree, tmp_path, "--gpus", 2, *wrong)
    done = subprocess.run(line, **PIPES, env=commands.environment(), timeout=200)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0 and "with 0 of its" in done.stderr, done.stderr


def test_a_rank_that_dies_ends_all_with_one_line_and_costs_an_epoch_at_most(
    tree, two_ranks, tmp_path
):
    line = on_tree(tree, tmp_path, "--gpus", 2)
    process = started(line, tmp_path)
    ranks = ranks_of(process)
    assert sorted(ranks) == ["0", "1"]
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert errors.strip().count("\n") == 0 and "rank 1 was killed by SIGKILL" in errors, errors
    assert not ranks_of(process) and not Path(f"/proc/{ranks['0']}").exists()
    common.load_checkpoint(commands.folder(tmp_path) / "last.pt")
    finish(line)
    assert commands.rows(tmp_path) == two_ranks


def test_sigterm_ends_both_ranks_and_another_number_continues(tree, two_ranks, tmp_path):
    process = started(on_tree(tree, tmp_path, "--gpus", 2), tmp_path)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143 and not errors.strip(), errors
    done = common.load_checkpoint(commands.folder(tmp_path) / "last.pt")["epoch"]
    assert done == 1
    finish(on_tree(tree, tmp_path))  # one rank: in the same folder, with the same batches
    full = json.loads((commands.folder(tmp_path) / "result.json").read_text())
    stretches = [{"ranks": 2, "epochs": done}, {"ranks": 1, "epochs": 3 - done}]
    assert full["machine"]["stretches"] == stretches
    assert commands.rows(tmp_path)[:done] == two_ranks[:done]
