"""What every method script shares: arguments, 1..N ranks, the run folder with its checkpoints, learning-rate schedules,
evaluation on a balanced test set, and `python common.py run|tables|figures|compare|export`.

A script reads

    args = parse_args()                                  # base_parser + its own flags, resolve() fills in the preset
    common.launch(main, args)                            # one process, --gpus N local ranks, or under torchrun

    run = common.Run(args, "tsc", fingerprint)           # folder, lock, logs, what was finished before
    stage = run.stage("pretrain", epochs, model=model, optimizer=optimizer)
    for epoch in stage.epochs():                         # continues where the last process stopped
        common.set_lr(optimizer, common.step_lr(args.lr, epoch, epochs))
        for views, labels, indices in stage.batches(loader):
            loss = ...
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.guard(loss, optimizer)                 # a non-finite loss never reaches the weights
            optimizer.step()
            stage.add(len(labels), loss=loss)            # running means, kept on the device
        stage.end_epoch(test=scores)                     # metrics.jsonl, TensorBoard, last.pt
    stage.finish()                                       # pretrain.pt

Randomness is counter-based: every draw comes from `generator(seed, purpose, epoch, step)`, so a run that continues
inside an epoch needs no saved sampler and sees the very next batch.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import shlex
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent


# --- errors, seeds, ranks -------------------------------------------------------------------------------------------


class UserError(Exception):
    """A user's mistake (flag, path, image, checkpoint, list, labels): one clear line, exit code 2, nothing lost."""


class RunError(Exception):
    """The run cannot go on (non-finite loss, full disk): one clear line, exit code 1, the last checkpoint is intact."""


def derive_seed(*key: int | str) -> int:
    """63-bit seed from a key of integers and strings; equal keys give equal seeds on every machine."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    return int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:8], "little") >> 1


def generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Random generator of its own for one purpose: `generator(seed, "augment", epoch, step)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def distribute(model: nn.Module) -> nn.Module:
    """DistributedDataParallel around the model under several ranks, the model itself otherwise."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, share: Tensor) -> Tensor:
        parts = [torch.empty_like(share) for _ in range(world_size())]
        dist.all_gather(parts, share.contiguous())
        context.rows = len(share)
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * context.rows : (rank() + 1) * context.rows]


def gather_with_gradient(share: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [b, d] of each rank -> [W b, d], with gradient to every rank's own rows.

    All ranks hold shares of one size. The gradient of a row is the sum of what the ranks' losses say of it: where every
    rank computes the loss of the whole batch, or each the mean over its own anchors, the average of
    DistributedDataParallel is the gradient that one rank would have.
    """
    return _Gather.apply(share) if world_size() > 1 else share


def batch_mean(values: Tensor, global_batch: int) -> Tensor:
    """Mean over the batch of all ranks, from this rank's share.

    values: per-sample losses [b] of this rank; global_batch: items of the batch over all ranks. Scaled so that the
    gradient average of DistributedDataParallel is the gradient of the global mean, equal shares or not.
    """
    return values.sum() * (world_size() / global_batch)


# --- arguments ------------------------------------------------------------------------------------------------------

# Flags that say where and how a run is done, not what it computes: they may differ when a run continues.
NEUTRAL = frozenset(
    "out data_root fresh resume_from eval quiet log workers device save_features recipe skip_broken".split()
    + ["command_line"]
)
KNOWN_SETS = "glyphs_lt cifar10_lt cifar100_lt svhn_lt mini_imagenet_lt imagenet_lt inat18".split()


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and `@file` lines read like a shell would."""

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(2)  # every rank of torchrun finds the same mistake: rank 0 tells it
            sys.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        try:
            if self.fromfile_prefix_chars:
                words = self._read_args_from_files(words)
            found, rest = super().parse_known_args(words, namespace)
            found.command_line = words  # for `resolve`, args.json and `export`
            return found, rest
        except UnicodeDecodeError:
            self.error("an @file of flags is not text in UTF-8")
        except argparse.ArgumentError as error:  # of a file that is not there, from Python 3.12 on
            self.error(str(error))

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"an @file of flags holds a line that cannot be read ({error}): {line.strip()}")


def number(kind: type, low: float = -math.inf, high: float = math.inf, open_low: bool = False):
    """argparse type: a finite int or float in [low, high] (or (low, high])."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"needs {wanted}, got {text[:40]!r}") from None
        if not low <= value <= high or (open_low and value == low) or value in (math.inf, -math.inf):
            bound = f"above {low:g}" if open_low else f"at least {low:g}"
            bound += f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text[:40]}")
        return value

    return parse


# --- one table of flags ---------------------------------------------------------------------------------------------

KINDS = ("letters", "small", "large")  # glyphs_lt; images up to 64 px; above
LARGE_SETS = ("mini_imagenet_lt", "imagenet_lt", "inat18")
# A row: name, its default (or the three of letters, small and large sets), what it is, and where needed a dictionary:
# "range": lowest and highest value (without it whole numbers start at 1, others lie above 0), "bare": a switch, and
# other flags with the values beside which alone it means something. A tuple lists choices, the default first; a type
# stands for no default.
SHARED = (
    ("dataset", "glyphs_lt", f"{', '.join(KNOWN_SETS)}, a folder of class folders, or an .npz"),
    ("data_root", "data", "folder of the data sets"),
    ("imb_ratio", 100.0, 100.0, float, "largest / smallest class", {"range": (1, math.inf)}),
    ("imb_type", ("exp", "step"), "profile of the class counts"),
    ("data_seed", 0, "which images form the subset", {"range": (0, 2**32 - 1)}),
    ("seed", 0, "everything else that is random", {"range": (0, 2**32 - 1)}),
    ("image_size", int, "side in pixels, where it is not the set's"),
    ("flip", 0.0, 0.5, 0.5, "probability of a horizontal flip", {"range": (0, 1)}),
    ("backbone", str, "network"),
    ("epochs", int, "of the first stage"),
    ("batch_size", int, "images over all ranks"),
    ("lr", float, "learning rate of the first stage"),
    ("init_from", str, "checkpoint to start from"),
    ("eval", str, "only evaluate this checkpoint"),
    ("eval_every", 1, "epochs between evaluations; the last is always one"),
    ("select", ("last", "val", "test"), "headline: last epoch, best on validation data, or, as released, best on test"),
    ("save_features", ("", "train", "val", "test"), "write features_<split>.npz at the end"),
    ("gpus", 1, "local ranks, one GPU each"),
    ("device", "auto", "auto, cpu, cuda, cuda:1 or mps"),
    ("workers", 4, "decoding processes a rank, for image files", {"range": (0, math.inf)}),
    ("cache", int, "image files: read what `python -m tools.prepare cache` wrote at this size"),
    ("precision", ("auto", "fp32", "bf16"), "auto: bf16 on GPUs that have it, else fp32"),
    ("compile", False, "torch.compile the network", {"bare": True}),
    ("out", "runs", "folder of all runs"),
    ("fresh", False, "start over and drop what the run folder holds", {"bare": True}),
    ("logger", ("tensorboard", "none"), "event files beside metrics.jsonl"),
    ("quiet", False, "print nothing but the result", {"bare": True}),
)  # fmt: skip


def read_rows(rows) -> dict[str, tuple[list, str, dict]]:
    """The rows of a table as {name: (three defaults, what it is, the dictionary)}."""
    table = {}
    for name, *defaults, last in rows:
        only = last if isinstance(last, dict) else {}
        text = defaults.pop() if only else last
        table[name] = (defaults * 3 if len(defaults) == 1 else defaults), text, only
    return table


def reader(like, only: dict) -> dict:
    """argparse's keywords for a flag whose default is `like`."""
    if "bare" in only:
        return {"action": "store_const", "const": True}
    if isinstance(like, tuple):
        return {"choices": [choice for choice in like if choice != ""]}
    kind = like if isinstance(like, type) else type(like)
    if kind is str:
        return {"type": str}
    low, high = only.get("range", (1, math.inf) if kind is int else (0, math.inf))
    return {"type": number(kind, low, high, open_low="range" not in only and kind is float)}


def default_of(value):
    """What a flag is when nobody says it: the first of its choices, None where only a type is given."""
    return value[0] or None if isinstance(value, tuple) else None if isinstance(value, type) else value


def parse(doc: str, flags, methods: dict[str, tuple[str, ...]], other: dict[str, dict], side, argv=None):
    """The arguments of a script, all decided here.

    doc: the script's docstring. flags: its rows, laid over SHARED. methods: {name: chain of stages}, the default first.
    other: {data set: {flag: default}}. side: (dataset, data_root, image_size) -> pixels, of a path. Sets `kind` (see
    KINDS), `stages` (a tuple) and `changed`, the flags that differ from their defaults and change the result.
    """
    chains = {"method": (tuple(methods), "row of the paper's table"), "stages": (str, "part of its chain, as a,b")}
    rows = [(name, *row) for name, row in chains.items()]
    table = read_rows(SHARED) | read_rows(rows) | read_rows(flags)
    parser = Parser(description=doc.split("\n\n")[0], allow_abbrev=False, fromfile_prefix_chars="@")
    for name, (defaults, text, only) in table.items():
        shown = " / ".join(dict.fromkeys("-" if default_of(d) is None else f"{default_of(d)}" for d in defaults))
        like = next((d for d in defaults if not isinstance(d, type)), defaults[0])
        text = f"{text} (default: {shown})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text, **reader(like, only))
    args = parser.parse_args(argv)
    said = {name for name in table if getattr(args, name) is not None}
    args.dataset = args.dataset or "glyphs_lt"
    try:
        args.kind = kind_of(args, side)
    except UserError as error:
        parser.error(str(error))
    column = KINDS.index(args.kind)
    standard = {name: default_of(defaults[column]) for name, (defaults, *_) in table.items()}
    if args.dataset not in KNOWN_SETS:
        standard["imb_ratio"] = None  # a user's own images stay as they are
    standard |= other.get(args.dataset, {})
    for name in table:
        if name not in said:
            setattr(args, name, standard[name])
    choose_stages(parser, args, methods)
    refuse(parser, args, table, said)
    neutral = NEUTRAL | {"dataset", "imb_ratio", "seed", "method", "stages"}
    args.changed = {n: getattr(args, n) for n in table if n not in neutral and getattr(args, n) != standard[n]}
    if args.stages != methods[args.method]:
        args.changed = {"stages": "-".join(args.stages)} | args.changed
    args.preset = args.kind
    return args


def kind_of(args, side) -> str:
    """letters, small or large: by the name of the set, else by the side of its images."""
    if args.dataset == "glyphs_lt" and args.image_size is None:
        return "letters"
    if args.dataset in LARGE_SETS:
        return "large"
    pixels = args.image_size or (32 if args.dataset in KNOWN_SETS else side(args.dataset, args.data_root, None))
    return "letters" if args.dataset == "glyphs_lt" and pixels <= 64 else "small" if pixels <= 64 else "large"


def choose_stages(parser, args, methods) -> None:
    """args.stages as the tuple of stages to run; what is left out before them comes from --init-from."""
    chain = methods[args.method]
    stages = tuple(args.stages.split(",")) if args.stages else chain
    if [stage for stage in chain if stage in stages] != list(stages):
        parser.error(f"--stages {args.stages}: --method {args.method} has {', '.join(chain)}, in this order")
    if stages[0] != chain[0] and not (args.init_from or args.eval):
        parser.error(f"--stages {args.stages} leaves out {chain[0]}: give its checkpoint with --init-from")
    args.stages = stages


def refuse(parser, args, table, said) -> None:
    """End the parsing where a flag was said beside others with which it means nothing."""
    for name, (_, _, only) in table.items():
        for needed, wanted in only.items():
            if name not in said or needed in ("range", "bare"):
                continue
            here, wanted = getattr(args, needed), (wanted,) if isinstance(wanted, str) else wanted
            if not set(here if isinstance(here, tuple) else (here,)) & set(wanted):
                flag, other = (word.replace("_", "-") for word in (name, needed))
                parser.error(f"--{flag} belongs to --{other} {' or '.join(map(str, wanted))}")
    for one, two in (("eval", "fresh"), ("eval", "init_from"), ("eval", "save_features")):
        if getattr(args, one) and getattr(args, two):
            parser.error(f"--{one} and --{two.replace('_', '-')} contradict each other")
    if args.save_features == "val" and args.select != "val":
        parser.error("--save-features val: there is a validation split only with --select val")


def base_parser(doc: str) -> argparse.ArgumentParser:
    """Parser with the flags that all scripts share. Flags left at None take the data set's preset in `resolve`."""
    parser = Parser(
        description=doc.strip().split("\n\n")[0], allow_abbrev=False, fromfile_prefix_chars="@",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="glyphs_lt", help=f"one of {', '.join(KNOWN_SETS)}, a folder of class folders, or an .npz")
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    add("--imb-ratio", type=number(float, 1), help="largest / smallest class, >= 1 (default: by data set)")
    add("--imb-type", choices=("exp", "step"), default="exp", help="profile of the class counts (default: exp)")
    add("--subset-rule", choices=("common", "fsgl"), default="common", help="how images are chosen (default: common)")
    add("--data-seed", type=number(int, 0, 2**32 - 1), default=0, help="which images form the subset (default: 0)")
    add("--image-size", type=number(int, 1), help="side in pixels (default: by data set)")
    add("--val-from", choices=("train", "test"), help="carve the validation split from train, or let test serve")
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="initialisation, order, augmentation (default: 0)")
    add("--epochs", type=number(int, 1), help="epochs of stage 1 (default: by data set)")
    add("--batch-size", type=number(int, 1), help="images of a batch over all ranks (default: by data set)")
    add("--lr", type=number(float, 0, open_low=True), help="base learning rate of stage 1 (default: by data set)")
    add("--backbone", help="network (default: by data set)")
    add(
        "--recipe",
        choices=("default", "released"),
        default="default",
        help="released: the settings of the released run",
    )
    add("--init-from", metavar="CKPT", help="checkpoint to start from (toy_similarity.py: to examine)")
    add("--eval-every", type=number(int, 1), help="epochs between evaluations, the last is always one (default: 1)")
    add("--select", choices=("last", "val"), default="last", help="headline: last epoch, or best on validation data")
    add = parser.add_argument_group("machine").add_argument
    add("--gpus", type=number(int, 1), default=1, help="local ranks to start, one GPU each (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--workers", type=number(int, 0), default=4, help="decoding processes a rank for large sets (default: 4)")
    add("--cache", type=number(int, 8), metavar="N", help="large sets: read what `prepare --cache N` wrote, N px")
    add("--skip-broken", action="store_true", help="large sets: replace unreadable images by others of their class")
    add(
        "--precision", choices=("auto", "fp32", "tf32", "bf16", "fp16"), default="auto", help="auto: fp32, bf16 on GPUs"
    )
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the network")
    add = parser.add_argument_group("run folder").add_argument
    add("--out", default="runs", help="folder of all runs (default: runs)")
    add("--fresh", action="store_true", help="start over, dropping what the run folder holds")
    add("--resume-from", metavar="CKPT", help="continue from this checkpoint instead of last.pt")
    add("--eval", metavar="CKPT", help="only evaluate this checkpoint")
    add("--save-features", choices=("train", "val", "test"), help="write features_<split>.npz at the end")
    add("--log", "--log-to", choices=("tensorboard", "none"), default="tensorboard",
        help="event files beside metrics.jsonl (under torchrun say --log-to: it takes --log for its own)")  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but the result")
    return parser


def resolve(parser, args, presets: dict[str, dict], image_size, released: dict[str, dict] | None = None):
    """Fill the flags left alone from the data set's preset and note what the user changed.

    presets: data set name (or "small" / "large": up to / above 64 px) -> {flag: value}; `released` likewise, laid over
    it by `--recipe released`. image_size: callable giving the side in pixels; a UserError in it ends the parsing.
    Sets args.preset (which one serves) and args.changed ({flag: value} that differ from it and change the result).
    """
    try:
        name = args.dataset if args.dataset in presets else ("small" if image_size() <= 64 else "large")
    except UserError as error:
        parser.error(str(error))
    if name not in presets:
        parser.error(f"--dataset {args.dataset} makes no sense here: there is no preset for images above 64 px")
    chosen = {"eval_every": 1} | presets[name]
    if args.dataset not in KNOWN_SETS:
        chosen["imb_ratio"] = None  # a user's own images stay as they are
    if args.recipe == "released":
        if name not in (released or {}):
            parser.error(f"--recipe released: nothing was released for --dataset {args.dataset} here")
        chosen |= released[name]
    standard = {key: parser.get_default(key) for key in vars(args)} | chosen
    words = {word.partition("=")[0] for word in args.command_line}
    said = {action.dest for action in parser._actions if words & set(action.option_strings)}  # even if the default
    for key, value in chosen.items():
        own = getattr(args, key)
        if own is None or (args.recipe == "released" and key not in said and own == parser.get_default(key)):
            setattr(args, key, value)
    if args.select != "val" and "val_from" not in said:  # the recipe's goes with the recipe's --select
        args.val_from = standard["val_from"] = None
    for one, other in (("fresh", "resume_from"), ("eval", "resume_from"), ("eval", "fresh"), ("eval", "init_from")):
        if getattr(args, one) and getattr(args, other):
            parser.error(f"--{one.replace('_', '-')} and --{other.replace('_', '-')} contradict each other")
    if args.val_from and args.select != "val":
        parser.error("--val-from says where validation data come from: it needs --select val")
    in_path = {"dataset", "imb_ratio", "seed", "changed", "preset", "precision"} | NEUTRAL
    args.changed = {key: value for key, value in vars(args).items() if key not in in_path and value != standard[key]}
    if args.precision != "auto":
        args.changed["precision"] = args.precision
    if args.recipe != "default":
        args.changed = {"recipe": args.recipe} | args.changed
    args.preset = name
    return args


def result_args(args) -> dict:
    """The arguments that decide the result, as plain values; a path as data set by its name and a hash."""
    kept = {key: value for key, value in sorted(vars(args).items()) if key not in NEUTRAL | {"changed"}}
    return kept | {"dataset": dataset_name(args.dataset)}


# --- launch ---------------------------------------------------------------------------------------------------------

_stop_signal = 0


def _on_signal(number_: int, frame) -> None:
    global _stop_signal
    if _stop_signal and number_ == signal.SIGINT:
        raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
    _stop_signal = number_


def launch(main, args) -> None:
    """Run `main(args)` here, in `--gpus N` local ranks, or as one rank of torchrun, and exit with the promised code.

    0 done; 1 the run failed (non-finite loss, full disk); 2 bad arguments or data; 130 / 143 stopped by a signal after
    saving. Sets args.device, args.precision and args.gpus to what is really used.
    """
    try:
        under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        _choose_device(args, under_torchrun)
        if args.gpus > 1 and not under_torchrun:
            sys.exit(_start_ranks(args.gpus))
        if under_torchrun:
            backend = "nccl" if args.device.startswith("cuda") else "gloo"
            dist.init_process_group(backend)
            args.gpus = world_size()
            if args.gpus > 1:
                args.changed["gpus"] = args.gpus
        signal.signal(signal.SIGTERM, _on_signal)
        signal.signal(signal.SIGINT, _on_signal)
        main(args)
    except (UserError, RunError) as error:
        _tell_and_exit(error)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        _tell_and_exit(UserError("a batch of one image cannot be batch-normalised here: choose another --batch-size"))
    except RuntimeError as error:
        if world_size() == 1 or not re.search("gloo|nccl|connection (reset|closed|refused)", str(error), re.IGNORECASE):
            raise
        _leave_after_lost_rank(error)
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _tell_and_exit(error: Exception) -> None:
    """One line on stderr and the exit code; a mistake that all ranks make is told by rank 0 alone."""
    code = 2 if isinstance(error, UserError) else 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not is_main():
        time.sleep(30)  # when rank 0 has left as well, the launcher ends us before this is over
    sys.stdout.flush()
    where = f" (rank {rank()})" if rank() else ""
    print(f"{Path(sys.argv[0]).name}: error{where}: {error}", file=sys.stderr, flush=True)
    if world_size() > 1:
        os._exit(code)  # at once: leaving a process group in good order would wait for the other ranks
    sys.exit(code)


def _leave_after_lost_rank(error: Exception) -> None:
    """Another rank is gone. The launcher sees that too, says which one, and ends us before this is over."""
    if not _stop_signal:  # it has not done so yet
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)
        line = f"error (rank {rank()}): lost the other ranks: {str(error).splitlines()[0][:200]}"
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def _choose_device(args, under_torchrun: bool) -> None:
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and args.gpus > 1:
            raise UserError(
                f"--gpus {args.gpus} needs {args.gpus} GPUs, this machine has none; CPU ranks: --device cpu"
            )
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda, cuda:N or mps")
    if name.startswith("cuda"):
        here = torch.cuda.device_count()
        local = int(os.environ.get("LOCAL_RANK", 0)) if under_torchrun else int(name.partition(":")[2] or 0)
        needed = max(args.gpus, local + 1)
        if here < needed:
            raise UserError(f"--gpus {args.gpus} --device {args.device} needs {needed} GPUs, this machine has {here}")
        name = f"cuda:{local}"
        torch.cuda.set_device(local)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Metal GPU; use --device cpu")
    args.device = name
    if args.precision == "auto":
        args.precision = "bf16" if name.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"
    if args.precision in ("tf32", "fp16") and not name.startswith("cuda"):
        raise UserError(f"--precision {args.precision} needs a CUDA device, got --device {name}")
    tf32 = args.precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def _start_ranks(count: int) -> int:
    """Start this same command as `count` local ranks under PyTorch's elastic launcher; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:  # the ranks say themselves what is wrong
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # a stop signal waits for the end of an evaluation
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-u", *sys.argv)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        number_, first = failed.get_first_failure()
        if first.exitcode not in (1, 2, 130, 143):  # those have said why themselves
            code = first.exitcode
            how = f"died with exit code {code}"
            if code < 0:
                hint = " (out of memory?)" if code == -signal.SIGKILL else ""
                how = f"was killed by {signal.Signals(-code).name}{hint}"
            print(
                f"error: rank {number_} {how}; all ranks were stopped, the same command continues from what was saved",
                file=sys.stderr,
            )
        return first.exitcode if first.exitcode > 0 else 1
    return 0


def grad_scaler(args) -> torch.amp.GradScaler:
    """Loss scaling for `--precision fp16`; does nothing otherwise. A part of the stage: its state belongs to it."""
    return torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")


def autocast(args):
    """Autocast context of `--precision`; losses belong in float32 outside of it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    return torch.autocast(args.device.split(":")[0], dtype=dtype) if dtype else contextlib.nullcontext()


# --- files ----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, write) -> None:
    """Call `write(file)` on a temporary neighbour of `path`, sync it, then put it in place: never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was saved before is intact") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Write a JSON file; a figure that is not finite becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_atomic(path, lambda file: file.write((json.dumps(plain(value), indent=1) + "\n").encode()))


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Write a checkpoint (plain dict of tensors, numbers, strings); `keep` receives the file that `path` was before."""

    def write(file) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch reports a failed write of its own zip writer this way
            raise OSError(str(error).splitlines()[0]) from None

    def keep_then_write(file) -> None:
        write(file)
        if keep is not None and path.exists():  # a second name for the old file: `path` is there at every moment
            link = keep.with_name(f".{keep.name}.{os.getpid()}.tmp")
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, keep)

    write_atomic(path, keep_then_write)


def load_checkpoint(path: str | Path, hint: str = "") -> dict:
    """Read one of our checkpoints without running any code in it; UserError when it is not one or is damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except Exception:  # unpickling raises many kinds; whichever it was, the file is of no use
        raise UserError(f"checkpoint {path} is damaged or not one of ours{hint}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != "long-tail-run":
        raise UserError(f"checkpoint {path} was not written by these scripts{hint}")
    return checkpoint


def check_same(path, saved: dict, now: dict, names, remedy: str = "give the saved value") -> None:
    """Refuse a checkpoint whose arguments differ from the present ones, naming the first that does."""
    for name in names:
        if saved.get(name) != now.get(name):
            flag = name.replace("_", "-")
            raise UserError(f"{path} was made with --{flag} {saved.get(name)}, this has {now.get(name)}; {remedy}")


def make_folder(path: Path) -> None:
    """Make a folder of results; UserError when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None


def load_weights(module: nn.Module, state: dict[str, Tensor], source) -> None:
    """Load weights that must fill `module` exactly; UserError naming the first tensor that does not fit."""
    own = module.state_dict()
    for name in [*own, *state]:
        if name not in state:
            raise UserError(f"{source} has no tensor {name}: it belongs to another network")
        if name not in own:
            raise UserError(f"{source} holds {name}, which this network does not have")
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{source}: {name} is {list(state[name].shape)}, this network needs {list(own[name].shape)}"
            )
    module.load_state_dict(state)


def load_backbone(backbone: nn.Module, path: str | Path, args, names=("dataset", "backbone"), data: str | None = None):
    """Fill a backbone, every tensor, from the network of a checkpoint of any script; returns the checkpoint.

    Scripts keep their network as the part `model`, its backbone as `backbone.*`; a head in it is left out. UserError
    when a tensor is missing or left over, when an argument in `names` differs from the saved one, or when `data`, the
    fingerprint of the training images here, is not that of the images there.
    """
    checkpoint = load_checkpoint(path)
    check_same(path, checkpoint["args"], result_args(args), names)
    if data not in (None, checkpoint["data"]):
        raise UserError(f"{path} was trained on other images or labels than --dataset {args.dataset} gives now")
    state = checkpoint["state"].get("model")
    if state is None:
        raise UserError(f"{path} holds no network under the name model")
    own = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    load_weights(backbone, own, path)
    return checkpoint


# --- run folder -----------------------------------------------------------------------------------------------------


def dataset_name(dataset: str) -> str:
    """A known set's name; for a path its last part and a hash of the whole, however it was written."""
    if dataset in KNOWN_SETS:
        return dataset
    path = Path(dataset).resolve()
    return re.sub(r"[^\w.+-]", "-", f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}")


def dataset_tag(args) -> str:
    """Folder name of the data set: `cifar10_lt_ir100`."""
    return dataset_name(args.dataset) + ("" if args.imb_ratio is None else f"_ir{args.imb_ratio:g}")


def variant_name(args, method: str) -> str:
    """Method and every result-changing flag that is not the preset's: `kcl_epochs100_queue4096`."""
    parts = [method]
    for key, value in sorted(args.changed.items(), key=lambda item: item[0] == "gpus"):  # torchrun says it last
        text = Path(value).stem if isinstance(value, str) and os.sep in value else value
        parts.append(
            key.replace("_", "-") + ("" if value is True else f"{text:g}" if isinstance(text, float) else f"{text}")
        )
    name = re.sub(r"[^\w.+-]", "-", "_".join(parts))
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Run:
    """One training run: its folder `<out>/<script>/<dataset>_ir<ratio>/<variant>/seed<k>/`, lock, logs, checkpoints.

    fingerprint: identity of the training images and labels; a checkpoint of other data is refused.
    """

    def __init__(self, args, method: str, fingerprint: str):
        self.args, self.fingerprint, self.method = args, fingerprint, method
        self.script = Path(sys.argv[0]).stem
        self.variant = variant_name(args, method)
        self.folder = Path(args.out) / self.script / dataset_tag(args) / self.variant / f"seed{args.seed}"
        self.rows: list[dict] = []
        self.saved: dict | None = None
        self.writer = None
        if is_main():
            self._open()
        barrier()
        torch.manual_seed(derive_seed(args.seed, "init"))  # networks built from here on
        if finished := self.result:
            self.check(self.folder / "result.json", finished)
        else:
            self._read_checkpoint()
            if is_main():
                self._start_logs()
        barrier()

    @property
    def result(self) -> dict | None:
        """The result of a finished run; None before, and when its file is damaged (it is then made again)."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _open(self) -> None:
        make_folder(self.folder)
        try:
            self.lock = open(self.folder / "lock", "a+")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process: never stale
        except BlockingIOError:
            self.lock.seek(0)
            raise UserError(f"{self.folder} is in use by another process ({self.lock.read().strip()})") from None
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()
        if self.args.fresh:
            for path in self.folder.iterdir():
                if path.is_file() and path.name != "lock":
                    path.unlink()
        for path in self.folder.glob(".*.tmp"):
            path.unlink()

    def _read_checkpoint(self) -> None:
        path, hint = self.folder / "last.pt", ""
        if self.args.resume_from:
            path = Path(self.args.resume_from)
        elif not path.exists():
            return
        elif (self.folder / "previous.pt").exists():
            hint = f"; continue from the one before with --resume-from {self.folder / 'previous.pt'}"
        self.saved = load_checkpoint(path, hint)
        self.check(path, self.saved)
        self.rows = self.saved["rows"]

    def check(self, path, checkpoint: dict) -> None:
        """Refuse a checkpoint of another script, other arguments or other data."""
        if checkpoint["script"] != self.script:
            raise UserError(f"{path} is a checkpoint of {checkpoint['script']}.py, this is {self.script}.py")
        now = result_args(self.args)
        names = ["dataset", "backbone", *now, *checkpoint["args"]]
        check_same(path, checkpoint["args"], now, names, "give the saved value, another --out, or --fresh")
        if checkpoint["data"] != self.fingerprint:
            raise UserError(
                f"{path} was trained on other images or labels than --dataset {self.args.dataset} gives now"
            )

    def _start_logs(self) -> None:
        write_json(self.folder / "args.json", {k: v for k, v in sorted(vars(self.args).items()) if k != "changed"})
        self._write_metrics()
        if self.args.log == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.say("tensorboard is not installed: writing metrics.jsonl only")
                return
            self.writer = SummaryWriter(str(self.folder), purge_step=len(self.rows))

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomic(self.folder / "metrics.jsonl", lambda file: file.write(lines.encode()))

    def say(self, text: str) -> None:
        if is_main() and not self.args.quiet:
            print(text, flush=True)

    def stage(self, name: str, epochs: int, info: dict | None = None, **parts) -> Stage:
        """A stage of training whose `parts` (anything with state_dict / load_state_dict) make up its checkpoints.

        info: plain values that whoever evaluates the checkpoint needs to know, such as the class counts.
        """
        return Stage(self, name, epochs, info or {}, parts)

    @property
    def passes(self) -> int:
        """Images that went forward and backward in all stages so far; a frozen backbone's forward passes count 0."""
        return sum({row["stage"]: row["passes"] for row in self.rows}.values())

    def outcome(self, stage: str, figures: dict, classes: list[str], counts: list[int]) -> dict:
        """What result.json says of a classifier trained in `stage`: `run.finish(**run.outcome(...), paper=...)`.

        figures: its `report` on the test set. The rows of the stage that were evaluated hold `test`.
        """
        rows = [row for row in self.rows if row["stage"] == stage]
        best = max((row for row in rows if "test" in row), key=lambda row: row["test"]["overall"])
        return {
            "headline": {k: v for k, v in figures.items() if k not in ("per_class", "confusion", "reliability")},
            "best_on_test": {"overall": best["test"]["overall"], "epoch": best["epoch"]},
            "classes": classes, "counts": counts, "per_class": figures["per_class"],
            "confusion": figures.get("confusion"), "reliability": figures["reliability"], "image_passes": self.passes,
            "epochs": rows[-1]["epoch"] + 1,
        }  # fmt: skip

    def finish(self, **result) -> dict:
        """Write result.json (atomic) and return it; clocked or machine-dependent figures go into timing / machine."""
        args = self.args
        machine = {
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine(),
            "ranks": world_size(), "threads": torch.get_num_threads(), "precision": args.precision,
            "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        head = {
            "kind": "long-tail-result", "data": self.fingerprint,
            "script": self.script, "dataset": dataset_tag(args), "variant": self.variant, "method": self.method,
            "seed": args.seed, "args": result_args(args), "headline": None, "best_on_test": None,
        }  # fmt: skip
        timing = {"seconds": round(sum(row["timing"]["seconds"] for row in self.rows), 2)}
        full = head | result | {"machine": machine, "timing": timing | result.get("timing", {})}
        if is_main():
            write_json(self.folder / "result.json", full)
            if self.writer:
                self.writer.close()
        self.show()
        return full

    def show(self) -> None:
        """Print the result of a finished run and draw its pictures where they are missing."""
        if is_main():
            import tables

            if not list(self.folder.glob("*.png")):
                tables.draw_result(self.result, self.folder)
            tables.print_result(self.result, self.folder)
        barrier()


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros as the momentum of fused SGD: where its very first step is skipped it would keep unwritten memory."""
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("momentum") else ():
            if p.requires_grad and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


LONG_EPOCH = 60  # seconds of training after which an epoch is saved before it is evaluated, too


class Stage:
    """The bookkeeping of one training stage; the loop itself stays in the script (see the top of this file)."""

    def __init__(self, run: Run, name: str, epochs: int, info: dict, parts: dict):
        self.run, self.name, self.total, self.info, self.parts = run, name, epochs, info, parts
        self.epoch, self.step, self.sums, self.best, self.seconds = 0, 0, {}, None, 0.0
        self.passes = 0  # images that went forward and backward, over all ranks
        self.finished = False
        self._pending, self._told_to_stop = None, False  # flags of the last step that the host has not read; see guard
        own = run.folder / f"{name}.pt"
        if own.exists():
            checkpoint = load_checkpoint(own, "; delete it (its stage is then trained again) or use --fresh")
            run.check(own, checkpoint)
            self._restore(checkpoint)
            self.finished = True
            if len(checkpoint["rows"]) > len(run.rows):  # last.pt was lost, or an older one was asked for
                run.rows = checkpoint["rows"]
                if is_main():
                    run._write_metrics()
        elif run.saved is not None and run.saved["stage"] == name:
            self._restore(run.saved)
            run.say(f"{name}: continuing at epoch {self.epoch + 1}, step {self.step + 1}")
        self.device = run.args.device

    def _restore(self, checkpoint: dict) -> None:
        for key, part in self.parts.items():
            part.load_state_dict(checkpoint["state"][key])
        self.epoch, self.step, self.passes = checkpoint["epoch"], checkpoint["step"], checkpoint["passes"]
        self.best, self.seconds = checkpoint["best"], checkpoint["seconds"]
        self.sums = checkpoint["sums"] if is_main() else {}  # they are of all ranks: one of them carries them on
        self.rng = checkpoint["rng"]

    def _checkpoint(self) -> dict:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.startswith("cuda"):
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        everyone = [rng]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, rng)
        self._reduce_sums()
        return {
            "kind": "long-tail-run", "script": self.run.script, "args": result_args(self.run.args),
            "data": self.run.fingerprint, "stage": self.name, "epoch": self.epoch, "step": self.step,
            "passes": self.passes, "info": self.info, "sums": self.sums, "best": self.best,
            "seconds": self.seconds, "rng": everyone,
            "rows": self.run.rows, "state": {key: part.state_dict() for key, part in self.parts.items()},
        }  # fmt: skip

    def _reduce_sums(self) -> None:
        """Sums of this process so far as floats over all ranks; what was summed before a pause is already there."""
        fresh = {key: pair for key, pair in self.sums.items() if isinstance(pair[0], Tensor)}
        if fresh:
            pairs = torch.stack([torch.stack([total, torch.full_like(total, n)]) for total, n in fresh.values()])
            if world_size() > 1:
                dist.all_reduce(pairs)
            self.sums |= dict(zip(fresh, map(tuple, pairs.tolist()), strict=True))

    def epochs(self):
        """Yield the 0-based epochs that are still to be done."""
        while self.epoch < self.total:
            if self.step == 0:
                torch.manual_seed(derive_seed(self.run.args.seed, self.name, self.epoch, rank()))
            else:
                torch.set_rng_state(self.rng[rank()]["cpu"])
                if "cuda" in self.rng[rank()]:
                    torch.cuda.set_rng_state(self.rng[rank()]["cuda"], self.device)
            self._clock = time.perf_counter()
            before = self.epoch
            yield self.epoch
            if self.epoch == before:
                raise RuntimeError(f"stage {self.name}: the loop over epochs must call end_epoch")

    def batches(self, loader, passes: int = 1):
        """Yield the batches of this epoch that are still to be done; a stop signal saves after the step and exits.

        passes: how often a step sends an item forward and backward (views, SAM; 0 where the backbone is frozen), for
        the count of image passes.
        """
        loader.set_epoch(self.epoch, self.step)
        self._images, self._steps, self._passes, self._first = 0, len(loader), self.passes, self.step
        self._wait, self._bar, begin = 0.0, 0.0, time.perf_counter()
        self._training = 0.0
        iterator = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._wait += time.perf_counter() - asked
            if batch is None:
                break
            yield batch
            self.step += 1
            self.passes += passes * loader.global_batch
            self._images += loader.global_batch
            self._progress(begin)
            if _stop_signal if world_size() == 1 else self._told_to_stop:  # all ranks at the same step
                self._save_and_exit()
        self._training = time.perf_counter() - begin
        if self._all_agree(self._training > LONG_EPOCH):  # a kill during the evaluation must not cost the training
            self._save()

    def guard(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Call between backward and optimizer.step: a non-finite loss ends the run and never reaches the weights.

        Without a host sync where it costs one: a fused optimiser on a GPU is told on the device to skip its update and
        the host reads the flag one step later; elsewhere the loss is looked at here. (A GradScaler overwrites the flag
        with its own, which skips the update as well.) Ranks tell each other of a stop signal on the same way.
        """
        bad = (~torch.isfinite(loss.detach())).float().reshape(())
        flags = torch.stack([bad, torch.full_like(bad, bool(_stop_signal))])
        if world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        now = self.step, optimizer.param_groups[0]["lr"]
        if not optimizer.defaults.get("fused"):
            self._read(flags, None, *now)
            return
        if self._pending is None:
            _start_momentum(optimizer)
        else:
            self._read(*self._pending)  # recorded a whole step ago: no wait
        optimizer.found_inf = flags[0]  # the fused kernels leave weights and momentum alone when this is 1
        if flags.is_cuda:
            copy, event = torch.empty(2, pin_memory=True), torch.cuda.Event()
            copy.copy_(flags, non_blocking=True)
            event.record()
        else:
            copy, event = flags.clone(), None
        self._pending = (copy, event, *now)

    def _read(self, flags: Tensor, event, step: int, lr: float) -> None:
        """Look at the flags of a step: RunError when its loss was not finite; whether a rank was told to stop."""
        if event is not None:
            event.synchronize()
        bad, stop = flags.tolist()
        if bad:
            raise RunError(f"the loss is not finite in stage {self.name}, epoch {self.epoch}, step {step}, lr {lr:g}")
        self._told_to_stop = bool(stop)

    def add(self, count: int, **values: Tensor) -> None:
        """Add means over `count` images of this rank to the running means of the epoch; nothing leaves the device."""
        for key, value in values.items():
            total, weight = self.sums.get(key, (0.0, 0.0))
            self.sums[key] = (value.detach().double() * count + total, weight + count)

    def due(self, every: int) -> bool:
        """Whether the epoch that just ran is one to evaluate: every `every` epochs and always the last."""
        return (self.epoch + 1) % every == 0 or self.epoch + 1 == self.total

    def end_epoch(self, score: float | None = None, **metrics) -> dict:
        """Close the epoch: one row in metrics.jsonl and TensorBoard, last.pt and previous.pt.

        metrics: plain numbers or dicts of them. score: validation figure; a strictly higher one than before also keeps
        the stage's state in `<stage>_best.pt` (`--select val`).
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(*pending)
        self._reduce_sums()
        seconds = time.perf_counter() - self._clock
        row = {"stage": self.name, "epoch": self.epoch, "steps": self.step, "passes": self.passes}
        if "optimizer" in self.parts:  # the rate of the last step, also where that was taken before a stop
            row["lr"] = float(self.parts["optimizer"].param_groups[0]["lr"])
        row |= {key: total / weight for key, (total, weight) in self.sums.items()} | metrics
        row["timing"] = {
            "seconds": round(seconds + self.seconds, 3),
            "images_per_second": round(self._images / max(self._training, 1e-9), 1),  # without the evaluation
            "passes_per_second": round((self.passes - self._passes) / max(self._training, 1e-9), 1),
            "data_wait_share": round(self._wait / max(self._training, 1e-9), 4),
        }
        self.run.rows.append(row)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, {}, 0.0
        better = score is not None and (self.best is None or score > self.best)
        if better:
            self.best = score
        checkpoint = self._checkpoint()
        if is_main():
            if better:
                save_checkpoint(self.run.folder / f"{self.name}_best.pt", checkpoint)
            save_checkpoint(self.run.folder / "last.pt", checkpoint, keep=self.run.folder / "previous.pt")
            with open(self.run.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self._tensorboard(row)
        self._say_epoch(row)
        if self._all_agree(bool(_stop_signal)) and self.epoch < self.total:
            raise SystemExit(128 + (_stop_signal or signal.SIGTERM))
        return row

    def finish(self) -> None:
        """Keep the finished stage as `<stage>.pt`."""
        checkpoint = self._checkpoint()
        if is_main() and not self.finished:
            save_checkpoint(self.run.folder / f"{self.name}.pt", checkpoint)
        barrier()
        self.finished = True

    def load_best(self) -> int:
        """Put the state of the best validation score back into the parts (`--select val`); returns its epoch."""
        checkpoint = load_checkpoint(self.run.folder / f"{self.name}_best.pt")
        self._restore(checkpoint)
        return self.epoch - 1

    def _all_agree(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if world_size() == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _save(self) -> None:
        """last.pt in the middle of an epoch."""
        if self._pending is not None:
            self._read(*self._pending)
        before = self.seconds
        self.seconds += time.perf_counter() - self._clock
        checkpoint = self._checkpoint()
        self.seconds = before
        if is_main():
            save_checkpoint(self.run.folder / "last.pt", checkpoint, keep=self.run.folder / "previous.pt")

    def _save_and_exit(self) -> None:
        self._save()
        self.run.say(
            f"\n{self.name}: stopped and saved at epoch {self.epoch + 1}, step {self.step}; same command continues"
        )
        raise SystemExit(128 + (_stop_signal or signal.SIGTERM))

    def _progress(self, begin: float) -> None:
        now = time.perf_counter()
        if not is_main() or self.run.args.quiet or not sys.stdout.isatty() or now - self._bar < 0.2:
            return
        self._bar = now
        speed = self._images / max(now - begin, 1e-9)
        left = (self._steps - self.step + (self.total - self.epoch - 1) * self._steps) * (now - begin)
        left /= max(self.step - self._first, 1)
        filled = 20 * self.step // max(self._steps, 1)
        bar = "#" * filled + "." * (20 - filled)
        text = f"{self.name} {self.epoch + 1}/{self.total} [{bar}] {speed:,.0f} images/s, {left:,.0f} s left"
        print(f"\r{text:<100}", end="", flush=True)

    def _say_epoch(self, row: dict) -> None:
        start = "\r" if sys.stdout.isatty() else ""
        figures = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
        for key, value in row.items():
            if isinstance(value, dict) and isinstance(value.get("overall"), float):
                figures.append(f"{key} {100 * value['overall']:.1f}%")
        left = row["timing"]["seconds"] * (self.total - self.epoch)
        speed = f"{row['timing']['images_per_second']:,.0f} images/s, {left:,.0f} s left"
        self.run.say(f"{start}{self.name} {self.epoch}/{self.total}  {'  '.join(figures)}  ({speed})".ljust(100))

    def _tensorboard(self, row: dict) -> None:
        if self.run.writer is None:
            return
        step = len(self.run.rows)
        for key, value in row.items():
            for name, number_ in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number_, (int, float)):
                    self.run.writer.add_scalar(f"{self.name}/{key}{'/' if name else ''}{name}", number_, step)


# --- schedules ------------------------------------------------------------------------------------------------------


def scale_milestones(published: Sequence[float], published_epochs: int, epochs: int) -> list[int]:
    """Milestones of a recipe of `published_epochs` epochs as epochs of a run of `epochs`, at the same fractions.

    Rounded down (160 of 200 is 160 of 201 too) but never before epoch 1; the published ones at the published length.
    """
    return [max(1, math.floor(m * epochs / published_epochs)) if m > 0 else 0 for m in published]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Give every parameter group the rate `lr` (in place where it is a tensor: captured steps) and return it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


def milestone_lr(base_lr: float, epoch: float, milestones: Sequence[float], factor: float = 0.1) -> float:
    """base_lr, times `factor` from each epoch in `milestones` on."""
    return base_lr * factor ** sum(epoch >= m for m in milestones)


def step_lr(base_lr: float, epoch: float, epochs: int, *, lr_bug: bool = False) -> float:
    """The CIFAR schedule of LDAM-DRW and its descendants, published at 200 epochs; constant inside an epoch.

    Linear warm-up over 5 epochs, (epoch + 1) / 5; x 0.01 from epoch 160; again x 0.01 from epoch 180 on.
    `lr_bug`: the order of branches in one released code, which never reaches the last drop.
    """
    warmup, first, second = scale_milestones((5, 160, 180), 200, epochs)
    second = max(second, first + 1)  # in very short runs the two drops would fall together
    if epoch < warmup:
        return base_lr * (math.floor(epoch) + 1) / warmup
    return milestone_lr(base_lr, epoch, (first,) if lr_bug else (first, second), 0.01)


def cosine_lr(base_lr: float, epoch: float, epochs: int, *, shift: bool = False) -> float:
    """Half cosine from base_lr to 0: base_lr / 2 (1 + cos(pi e / epochs)) with e the whole epoch.

    `shift`: e + 1 in place of e, as codes that step the scheduler at the start of an epoch: the last epoch has lr 0.
    """
    return warmup_cosine_lr(base_lr, math.floor(epoch) + shift, epochs)


def warmup_cosine_lr(base_lr: float, epoch: float, epochs: float, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Per-iteration schedule at fractional epoch t: base_lr t / warmup, then a half cosine to `floor` at `epochs`."""
    if epoch < warmup:
        return base_lr * epoch / warmup
    done = (epoch - warmup) / (epochs - warmup) if epochs > warmup else 1.0
    return floor + (base_lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def supcon_lr(
    base_lr: float, epoch: float, epochs: int, *, decay_rate: float = 0.1, warmup: int = 0, warmup_from: float = 0.01
) -> float:
    """SupCon's CIFAR schedule: per epoch e = 1..epochs a half cosine that ends at the floor base_lr decay_rate^3.

    In the first `warmup` epochs it is linear per step, from `warmup_from` to the cosine's value at epoch `warmup`.
    """
    floor = base_lr * decay_rate**3
    if epoch < warmup:
        return warmup_from + (warmup_cosine_lr(base_lr, warmup, epochs, floor=floor) - warmup_from) * epoch / warmup
    return warmup_cosine_lr(base_lr, math.floor(epoch) + 1, epochs, floor=floor)


def fsgl_lr(base_lr: float, epoch: float, epochs: int, *, warmup: int = 10, timing: str = "start") -> float:
    """FSGL's ImageNet-LT schedule h(e): base_lr (e + 1) / warmup up to e = warmup (an overshoot), then a half cosine.

    timing "start": epoch e trains with h(e). "legacy": with h(e - 1), epoch 0 with base_lr, as the released code does.
    """
    if timing not in ("start", "legacy"):
        raise ValueError(f"timing is {timing!r}: start or legacy")
    e = math.floor(epoch) - (timing == "legacy")
    if e < 0 or warmup < 1:
        return base_lr if e < 0 else cosine_lr(base_lr, e, epochs)
    if e <= warmup:
        return base_lr * (e + 1) / warmup
    return warmup_cosine_lr(base_lr, e - (warmup - 1), epochs - (warmup - 1))


# --- evaluation -----------------------------------------------------------------------------------------------------


GROUPS = ("many", "medium", "few")


def _array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def group_of(counts: Sequence[int], many: int = 100, few: int = 20, few_inclusive: bool = False) -> np.ndarray:
    """Group of each class by its training count: int64 [C]; 0 is many (> many), 2 few (< few, or <= few), 1 medium."""
    counts = _array(counts)
    if few > many:
        raise ValueError(f"few {few} is above many {many}: the groups overlap")
    is_few = counts <= few if few_inclusive else counts < few
    return np.where(counts > many, 0, np.where(is_few, 2, 1)).astype(np.int64)


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def report(
    labels, predictions, counts: Sequence[int], *, many: int = 100, few: int = 20, few_inclusive: bool = False,
    weighting: str = "class", confidence=None, nll=None, topk_hits=None,
) -> dict:  # fmt: skip
    """Figures of a classifier on a test set, as plain Python fractions in [0, 1]; None where nothing is to average.

    labels, predictions: [N] class ids (a prediction of -1 is no class: always wrong); counts: training images of each
    class [C]; confidence, nll, topk_hits: [N], optional. O(N + C); numpy, torch or lists.
    many, medium, few: mean recall of the group's classes that have test images (weighting "image": correct / all of the
    group's images). macro_f1: over the classes that occur in labels or predictions. worst_class: lowest recall.
    ece: 15 equal bins of confidence (Guo et al. 2017), which `reliability` lists. confusion (up to 200 classes): rows
    are the true class.
    """
    labels, predictions, counts = (_array(a).astype(np.int64, copy=False) for a in (labels, predictions, counts))
    size, items = len(counts), len(labels)
    if predictions.shape != labels.shape:
        raise ValueError(f"{len(labels)} labels but {len(predictions)} predictions")
    if items and (labels.min() < 0 or labels.max() >= size or predictions.min() < -1 or predictions.max() >= size):
        raise ValueError(f"labels and predictions must lie in 0..{size - 1} (predictions may be -1)")
    hit = labels == predictions
    support = np.bincount(labels, minlength=size)
    correct = np.bincount(labels[hit], minlength=size)
    predicted = np.bincount(predictions[predictions >= 0], minlength=size)
    tested = support > 0
    recall = correct[tested] / support[tested]
    f1 = 2.0 * correct / np.maximum(support + predicted, 1)

    group = group_of(counts, many, few, few_inclusive)
    if weighting not in ("class", "image"):
        raise ValueError(f"weighting is {weighting!r}: class or image")
    if weighting == "class":
        part, whole = np.bincount(group[tested], recall, minlength=3), np.bincount(group[tested], minlength=3)
    else:
        part, whole = np.bincount(group, correct, minlength=3), np.bincount(group, support, minlength=3)
    per_class = np.full(size, None, dtype=object)
    per_class[tested] = recall.tolist()

    figures = {"overall": _ratio(hit.sum(), items)}
    figures |= {name: _ratio(part[g], whole[g]) for g, name in enumerate(GROUPS)}
    figures["macro_f1"] = _ratio(f1.sum(), np.count_nonzero(support + predicted))
    figures["harmonic_mean"] = _ratio(recall.size, (1.0 / recall).sum()) if recall.all() else 0.0
    figures["worst_class"] = float(recall.min()) if recall.size else None
    bins = None if confidence is None else _reliability(_array(confidence), hit)
    figures |= {"ece": bins and _calibration_error(bins), "reliability": bins}
    figures["top5"] = None if topk_hits is None else _ratio(_array(topk_hits).sum(), items)
    loss = None if nll is None or not items else float(_array(nll).astype(np.float64, copy=False).mean())
    figures["loss"] = loss if loss is not None and np.isfinite(loss) else None
    figures["per_class"] = per_class.tolist()
    if size <= 200:
        pairs = np.bincount((labels * size + predictions)[predictions >= 0], minlength=size * size)
        figures["confusion"] = pairs.reshape(size, size).tolist()
    return figures


def _reliability(confidence: np.ndarray, hit: np.ndarray, bins: int = 15) -> dict[str, list] | None:
    """Bins ((b - 1) / bins, b / bins]: count of predictions, their mean confidence and accuracy (0 in an empty bin)."""
    if not confidence.size or not np.isfinite(confidence).all():
        return None
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = {"confidence": np.bincount(index, confidence, minlength=bins), "accuracy": np.bincount(index, hit, bins)}
    return {"count": count.tolist()} | {key: (total / np.maximum(count, 1)).tolist() for key, total in sums.items()}


def _calibration_error(bins: dict[str, list]) -> float:
    """Expected calibration error: |accuracy - mean confidence| of the bins, weighted by their size."""
    count, confidence, accuracy = (np.array(bins[key]) for key in ("count", "confidence", "accuracy"))
    return float((count * np.abs(accuracy - confidence)).sum() / count.sum())


def topk_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the true class is among the k largest logits: bool [N] from logits [N, C] and labels [N].

    Of equal logits the lower class id comes first, as in argmax; a row with a NaN never hits.
    """
    true = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank_ = ((logits > true) | ((logits == true) & before)).sum(1)
    return (rank_ < k) & ~logits.isnan().any(1)


def topk_accuracy(logits, labels, ks: Sequence[int] = (1, 5)) -> list[float | None]:
    """Top-k accuracies as fractions, one for each k."""
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    return [_ratio(topk_hits(logits, labels, k).sum().item(), len(labels)) for k in ks]


@dataclass
class Scores:
    """What a network said about every item of a set, in the set's order: CPU tensors [N]."""

    labels: Tensor  # int64
    predictions: Tensor  # int64; -1 where the logits were not finite
    confidence: Tensor  # float32, softmax of the predicted class
    nll: Tensor  # float32, cross-entropy in nats
    top5: Tensor  # bool, true class among the five largest logits
    features: Tensor | None = None  # float32 [N, d]

    def report(self, counts: Sequence[int], **options) -> dict:
        """`report` of these scores; options: group boundaries and weighting."""
        options |= {"confidence": self.confidence, "nll": self.nll, "topk_hits": self.top5}
        return report(self.labels, self.predictions, counts, **options)


def save_features(scores: Scores, indices: Tensor, path: Path) -> None:
    """Write `features` [N, d] (float32, before the head), `labels` [N] and `indices` [N] of an evaluation as .npz.

    indices: positions of the images in the source set (`ImageSet.indices`).
    """
    arrays = {"features": scores.features.numpy(), "labels": scores.labels.numpy(), "indices": indices.cpu().numpy()}
    if is_main():
        write_atomic(path, lambda file: np.savez(file, **arrays))
    barrier()


def evaluate(
    model: nn.Module,
    loader,
    num_items: int | None = None,
    device: str | torch.device | None = None,
    autocast: Callable | None = None,
    features: Callable | None = None,
) -> Scores:
    """Scores of `model` on the `num_items` items of an evaluation loader, every item exactly once over all ranks.

    loader yields (views [V, b, 3, H, W], labels [b], indices [b]) on `device`; the first view counts. num_items and
    device are the loader's own by default. autocast: makes the context of a forward pass, `lambda: autocast(args)`;
    features: a second function of the images whose output [b, d] is kept, `net.features`. Eval and inference mode
    inside, the modes of all modules are restored; results stay on the device until the end: no host sync per batch.
    RuntimeError when an item is missing or comes twice.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its forward would synchronise buffers: ranks may have different numbers of batches
    if dist.is_initialized():
        for buffer in model.buffers():  # batch norm: the statistics that rank 0 has and its checkpoints hold
            dist.broadcast(buffer, 0)
    size = len(loader.dataset) if num_items is None else num_items
    device = loader.device if device is None else device
    # One row for each field of Scores and one that counts visits; the last column collects indices out of range.
    # Class ids are exact in float32 (below 2^24). A rank leaves 0 where another fills in, so a sum merges the tables.
    table, kept = torch.zeros(6, size + 1, device=device), None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            for views, labels, indices in loader:
                with autocast() if autocast else contextlib.nullcontext():
                    logits, extra = model(views[0]), features(views[0]) if features else None
                logits = logits.float()
                log_p = logits.log_softmax(1)
                valid = ~log_p.isnan().any(1)
                predictions = logits.argmax(1)
                rows = [
                    labels,
                    torch.where(valid, predictions, -1),
                    log_p.gather(1, predictions[:, None])[:, 0].exp(),
                    -log_p.gather(1, labels[:, None])[:, 0],
                    topk_hits(logits, labels, 5) & valid,
                ]
                slots = torch.where((indices >= 0) & (indices < size), indices, size)
                table[:5, slots] = torch.stack([row.float() for row in rows])
                table[5].index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32))
                if extra is not None:
                    if kept is None:
                        with torch.inference_mode(False):  # so that it can be trained on later
                            kept = torch.zeros(size + 1, extra.shape[1], device=device)
                    kept[slots] = extra.float()
    finally:
        for module, mode in modes:
            module.training = mode
    if dist.is_initialized():
        dist.all_reduce(table)
        if features:
            width = torch.tensor(0 if kept is None else kept.shape[1], device=device)
            dist.all_reduce(width, op=dist.ReduceOp.MAX)  # a rank without a batch does not know it
            kept = torch.zeros(size + 1, int(width), device=device) if kept is None else kept
            dist.all_reduce(kept)
    table = table.cpu()
    visits, outside = table[5, :-1], int(table[5, -1])
    if outside or (visits != 1).any():
        raise RuntimeError(
            f"evaluation must see each of {size} items once: {int((visits == 0).sum())} missing, "
            f"{int((visits > 1).sum())} more than once, {outside} indices out of range"
        )
    labels, predictions, confidence, nll, top5 = table[:5, :-1]
    kept = None if kept is None else kept[:-1].cpu()
    return Scores(labels.long(), predictions.long(), confidence, nll, top5 > 0, kept)


def figures(args, net: nn.Module, loader, counts: Sequence[int], **options) -> dict:
    """`report` of a network on an evaluation loader; RunError when its outputs are not finite.

    options: group boundaries and weighting.
    """
    full = evaluate(net, loader, autocast=lambda: autocast(args)).report(counts, **options)
    if full["loss"] is None and len(loader.dataset):
        raise RunError("the network has diverged: its outputs are not finite; a smaller --lr may help")
    return full


def logged(full: dict) -> dict:
    """What metrics.jsonl keeps of a report: no confusion matrix, recalls of up to 200 classes."""
    left_out = {"confusion", "reliability"} | ({"per_class"} if len(full["per_class"]) > 200 else set())
    return {key: value for key, value in full.items() if key not in left_out}


def pair_cosines(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean cosine of the pairs of one label and of two labels, over unit rows z [N, d] with labels [N]."""
    same = labels[:, None] == labels
    cosine, pairs = z @ z.T, same.sum()
    own = (cosine * same).sum()
    alike = (own - cosine.diagonal().sum()) / (pairs - len(z)).clamp(min=1)
    return {"same_label": alike, "other_label": (cosine.sum() - own) / (same.numel() - pairs).clamp(min=1)}


def class_similarity(features: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
    """How close the classes lie in feature space.

    features [N, d], labels [N] -> cosine [C, C] of class means; distance [C, C] of class means in units of the pooled
    standard deviation sqrt((tr S_a + tr S_b) / 2). Classes without a sample give nan.
    """
    features = features.double()
    count = torch.bincount(labels, minlength=num_classes).double()[:, None]  # [C, 1]
    total = torch.zeros(num_classes, features.shape[1], dtype=torch.double).index_add_(0, labels, features)
    mean = total / count  # [C, d]
    spread = (features - mean[labels]).square().sum(1)  # [N]
    variance = torch.zeros(num_classes, dtype=torch.double).index_add_(0, labels, spread) / count[:, 0]  # tr S_c
    unit = F.normalize(mean, dim=1)
    pooled = ((variance[:, None] + variance[None, :]) / 2).sqrt()
    apart = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")  # without a [C, C, d] in between
    return {"cosine": unit @ unit.T, "distance": apart / pooled}


if __name__ == "__main__":
    from tables import main_cli  # run, tables, figures, compare, export

    sys.exit(main_cli(sys.argv[1:]))
