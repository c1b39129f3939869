"""BNS, KCL and TSC find the labels of one batch of letters that never changes."""

import commands
import pytest
import torch

import bns_ipdpp
import common
import data_lt
import tsc

STEPS = 100


def frozen_batch(args, augment: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views [2, b, 3, H, W] of each of some letters, and their labels [b]."""
    data = data_lt.load(args)
    options = {"augment": augment, "views": 2}
    views, labels, _ = next(iter(data_lt.loader(args, data.train, args.batch_size, **options)))
    return views, labels


def bns_steps(args):
    """Embeddings [2b, d] and labels [2b] of each step."""
    data, net = data_lt.load(args), bns_ipdpp.build(args)
    views, labels = frozen_batch(args, bns_ipdpp.views_of(args, "pretrain", data))
    optimizer, encode = bns_ipdpp.adamw(args, net, "pretrain"), bns_ipdpp.Encoder(net, args)
    for _ in range(STEPS + 1):
        z, y = encode(views).flatten(0, 1), labels.repeat(2)
        yield z.detach(), y
        optimizer.zero_grad()
        bns_ipdpp.bns_loss(z, y, args.temperature).mean().backward()
        optimizer.step()


def tsc_steps(args, targeted: bool):
    """Embeddings [2b, d] and labels [2b] of each step; with targets from the first one on."""
    data, net = data_lt.load(args), tsc.build(args)
    views, labels = frozen_batch(args, tsc.VIEWS["letters"])
    carried, encode = tsc.carry(args, data, net), tsc.Encoder(net, args)
    optimizer = common.sgd(net.parameters(), args.lr, args.weight_decay)
    for step in range(STEPS + 1):
        rng = common.generator(args.seed, step)
        z, y, logits, columns, used = carried["contrast"](encode, views, labels, rng)
        yield carried["contrast"].seen
        weight = torch.ones(columns.shape[1] + targeted)
        if targeted:
            matching = carried["matching"]
            matching.update(*carried["contrast"].seen)
            matching.solve()
            weight[-1] = args.target_weight
            logits, columns, used = matching.add(z, y, logits, columns, used, args.temperature)
        optimizer.zero_grad()
        tsc.contrast(logits, columns, used, weight).sum(1).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["bns", "kcl", "tsc"])
def test_cosines_of_one_label_and_of_two_part_by_half_within_100_steps(name):
    """KCL and TSC at a tenth of their rate, whose cosine a constant stands for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "bns":
        steps = bns_steps(commands.parse("bns_ipdpp", ["--device", "cpu"]))
    else:
        args = commands.parse("tsc", ["--device", "cpu", "--lr", "0.02"])
        steps = tsc_steps(args, name == "tsc")
    for z, y in steps:
        cosines = common.pair_cosines(z, y, views=2)
        if cosines["same_label"] - cosines["other_label"] > 0.5:
            return
    pytest.fail(f"mean cosines after {STEPS} steps: {cosines}")
