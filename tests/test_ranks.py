"""Several ranks against one: loss and gradients in float64, evaluation, and the command line's own launcher."""

import json
import os
import signal
import socket
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

ROOT = Path(common.__file__).resolve().parent


def small_problem(batch: int):
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8"), torch.nn.Linear(64, 10)).double().eval()
    for module in net.modules():  # statistics that are not the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    dataset = data_lt.Set(images, torch.arange(40) % 10, torch.arange(40), list("abcdefghij"))
    augment = data_lt.Augment(16, (0.5,) * 3, (0.2,) * 3, crop="pad", pad=2, flip=0.5)
    loader = data_lt.Loader(dataset, batch, augment=augment, seed=3)
    loader.set_epoch(1)
    return net, loader


def losses_and_gradients(batch: int):
    """An epoch on the small problem."""
    return epoch_of_gradients(*small_problem(batch))


def epoch_of_gradients(net, loader):
    """Loss of each batch, summed gradients (no update in between: BN is frozen, the loss is linear in the batches)."""
    replica, losses = common.distribute(net), []
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
    """InfoNCE-like loss over the gathered embeddings, mean over a rank's own anchors, and its gradients."""
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(5, 3).double(), torch.randn(8, 5, dtype=torch.float64)
    mine = x.tensor_split(common.world_size())[common.rank()]
    replica = common.distribute(layer)
    own = F.normalize(replica(mine), dim=1)
    every = common.gather_with_gradient(own)
    targets = torch.arange(8).tensor_split(common.world_size())[common.rank()] ^ 1  # neighbours are positives
    loss = F.cross_entropy(own @ every.T / 0.1, targets)
    loss.backward()
    value = loss.detach() / common.world_size()
    if common.world_size() > 1:
        dist.all_reduce(value)
    return [float(value)], [p.grad.clone() for p in layer.parameters()]


def contrastive_entry(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(contrastive_gradients(), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_gathered_embeddings_carry_the_gradient(tmp_path, world):
    mp.spawn(contrastive_entry, (world, str(tmp_path)), nprocs=world)
    loss, gradients = contrastive_gradients()
    for rank in range(world):
        theirs, their_gradients = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert theirs == pytest.approx(loss, rel=1e-12)
        for ours, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-10, atol=1e-14)


def fake_tree_gradients(root: str):
    """One epoch of ResNet-10 cross-entropy over decoded JPEGs at 64 px: loss of each batch, summed gradients."""
    train = data_lt.load_pool("imagenet_lt", root, 64, files=True).train
    torch.manual_seed(2)
    net = models.Net(models.backbone("resnet10"), torch.nn.Linear(512, len(train.classes))).double().eval()
    augment = data_lt.Augment(64, (0.5,) * 3, (0.2,) * 3, crop="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0))
    loader = data_lt.Loader(train, 6, augment=augment, seed=1, workers=1, sampler="class_aware", epoch_length=18)
    loader.set_epoch(1)
    return epoch_of_gradients(net, loader)


def fake_tree_entry(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(fake_tree_gradients(folder), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_on_a_tree_of_jpegs(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path)
    mp.spawn(fake_tree_entry, (2, str(tmp_path)), nprocs=2)
    losses, gradients = fake_tree_gradients(str(tmp_path))
    assert len(losses) == 3
    for rank in range(2):
        theirs, their_gradients = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert theirs == pytest.approx(losses, rel=1e-9)
        for ours, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-7, atol=1e-10)


def rank_entry(rank: int, world: int, folder: str, batch: int):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(losses_and_gradients(batch), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world", "batch"), [(2, 16), (4, 20)])
def test_n_ranks_equal_one_in_loss_and_gradients(tmp_path, world, batch):
    mp.spawn(rank_entry, (world, str(tmp_path), batch), nprocs=world)
    losses, gradients = losses_and_gradients(batch)
    for rank in range(world):
        theirs, their_gradients = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert theirs == pytest.approx(losses, rel=1e-12)
        for ours, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-9, atol=1e-12)


def test_training_shares_are_equal_and_what_is_left_over_is_dropped():
    images = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    dataset = data_lt.Set(images, torch.arange(40) % 10, torch.arange(40), list("abcdefghij"))
    augment = data_lt.Augment(4, (0.5,) * 3, (0.2,) * 3)
    for batch, sizes in ((13, [4, 4, 4]), (12, [4, 4, 4]), (18, [6, 6])):
        shares = []
        for rank in range(3):
            loader = data_lt.Loader(dataset, batch, augment=augment, seed=3, shard=(rank, 3))
            shares.append([rows for _, _, rows in loader])
        assert [[len(rows) for rows in share] for share in shares] == [sizes] * 3
        assert len(torch.cat([rows for share in shares for rows in share]).unique()) == 3 * sum(sizes)


def weighted(world: int, rank: int):
    losses = torch.arange(1.0, 9.0, dtype=torch.float64)[rank::world].requires_grad_()
    weights = torch.tensor([1, 0, 2, 0.5, 3, 1, 0, 4], dtype=torch.float64)[rank::world]
    loss = common.weighted_mean(losses, weights)
    loss.backward()
    return loss.detach() / world, losses.grad / world


def weighted_entry(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(weighted(world, rank), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_a_weighted_mean_is_that_of_the_whole_batch(tmp_path):
    mp.spawn(weighted_entry, (2, str(tmp_path)), nprocs=2)
    loss, gradient = weighted(1, 0)
    assert loss == pytest.approx((1 + 6 + 2 + 15 + 6 + 32) / 11.5)
    parts = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert sum(part[0] for part in parts) == pytest.approx(loss.item())
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part[1], gradient[rank::2])
    with torch.no_grad():
        assert common.weighted_mean(torch.ones(3), torch.zeros(3)) == 0


FLAGS = "--method sweep2 --epochs 1 --device cpu --logger none".split()


def test_two_local_ranks_end_to_end_and_torchrun_gives_the_same(tmp_path):
    script = str(ROOT / "toy_similarity.py")
    own = [sys.executable, script, *FLAGS, "--gpus", "2", "--out", str(tmp_path / "own")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    foreign = [*launcher, script, *FLAGS, "--out", str(tmp_path / "run")]
    results = []
    for line in (own, foreign):
        done = subprocess.run(line, capture_output=True, text=True, env=commands.environment(), timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        (path,) = Path(line[-1]).glob("toy_similarity/*/*/seed0/result.json")
        assert "gpus2" in path.parent.parent.name, "two ranks are another variant: BatchNorm sees half the batch"
        results.append(json.loads(path.read_text()))
    one, other = results
    assert one["rows"] == other["rows"] and one["machine"]["ranks"] == 2
    for row in one["rows"].values():
        assert sum(map(sum, row["last"]["confusion"])) == 2500, "every test image counts once"


def test_a_usage_error_under_two_ranks_is_told_once(tmp_path):
    line = [sys.executable, str(ROOT / "toy_similarity.py"), *FLAGS, "--gpus", "2", "--points", "777"]
    done = subprocess.run(
        [*line, "--out", str(tmp_path)], capture_output=True, text=True, env=commands.environment(), timeout=200
    )
    assert done.returncode == 2
    assert done.stderr.count("777 images asked for") == 1 and "Traceback" not in done.stderr, done.stderr


def test_sigterm_reaches_both_ranks_and_the_run_continues(tmp_path):
    line = [sys.executable, str(ROOT / "toy_similarity.py"), *FLAGS, "--gpus", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=commands.environment()
    )
    deadline = time.time() + 150
    while not list(tmp_path.glob("**/last.pt")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors[-2000:]
    (last,) = tmp_path.glob("**/last.pt")
    common.load_checkpoint(last)
    done = subprocess.run(line, capture_output=True, text=True, env=commands.environment(), timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def steps_until_known(rank: int, world: int, folder: str):
    """The loss of the second rank is not finite in step 3; each rank writes the step in which it ends."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        layer = torch.nn.Linear(3, 2)
        stage = object.__new__(common.Stage)
        stage.name, stage.epoch, stage.total, stage.bad = "train", 0, 2, None
        stage.parts = {"optimizer": common.sgd(layer.parameters(), 0.1)}
        for stage.step in range(9):
            loss = layer(torch.ones(4, 3)).square().mean()
            try:
                stage.guard(loss * (float("nan") if rank == 1 and stage.step == 3 else 1))
            except common.RunError as error:
                Path(folder, f"{rank}.txt").write_text(str(error))
                break
    finally:
        dist.destroy_process_group()


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_in_the_same_step(tmp_path):
    mp.spawn(steps_until_known, (2, str(tmp_path)), nprocs=2)
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)}
    assert len(said) == 1 and "stage train, epoch 1 of 2, step 4, lr 0.1" in said.pop()


# --- ranks on a tree of JPEGs: launchers, a dead rank, a stop signal


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    fake_tree.make_imagenet_lt(root, n_max=12)
    return root


def on_tree(tree: Path, out: Path, *flags) -> list[str]:
    flags = ("--dataset", "imagenet_lt", "--data-root", tree, "--epochs", 3, "--workers", 1, "--batch-size", 8, *flags)
    return commands.command("tests/plain_ce.py", *flags, out=out)


@pytest.fixture(scope="module")
def two_ranks(tree, tmp_path_factory) -> list[dict]:
    """What two local ranks log when nothing happens to them."""
    out = tmp_path_factory.mktemp("two")
    finish(on_tree(tree, out, "--gpus", 2))
    return commands.rows(out)


def finish(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, env=commands.environment(), timeout=200)
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
                found |= {part[5:].decode(): int(entry.name) for part in environ if part.startswith(b"RANK=")}
    return found


def started(line: list[str], out: Path) -> subprocess.Popen:
    """The running command, once it has saved a checkpoint."""
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=commands.environment()
    )
    deadline = time.time() + 150
    while not list(out.glob("**/last.pt")):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def test_two_launchers_with_a_rendezvous_equal_one(tree, two_ranks, tmp_path):
    """A dry run of two nodes: each its own torchrun, one rank each, meeting on the loopback device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    node += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "dry"]
    line = node + on_tree(tree, tmp_path)[1:]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": commands.environment()}
    nodes = [subprocess.Popen(line, **pipes) for _ in range(2)]
    for process in nodes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    assert commands.rows(tmp_path) == two_ranks


def test_a_rank_that_dies_ends_all_with_one_line_and_costs_an_epoch_at_most(tree, two_ranks, tmp_path):
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


def test_sigterm_ends_both_ranks_and_they_continue_to_the_same(tree, two_ranks, tmp_path):
    line = on_tree(tree, tmp_path, "--gpus", 2)
    process = started(line, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143 and not errors.strip(), errors
    assert common.load_checkpoint(commands.folder(tmp_path) / "last.pt")["epoch"] < 3
    finish(line)
    assert commands.rows(tmp_path) == two_ranks
