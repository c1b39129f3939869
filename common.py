"""What every method script shares: arguments, ranks, run folder, schedules, evaluation.

A script reads

    args = common.parse(__doc__, FLAGS, METHODS, OTHER, side)
    common.launch(main, args)                      # 1 process, --gpus N ranks, or torchrun

    run = common.Run(args, "tsc", fingerprint)     # folder, lock, what was finished before
    stage = run.stage("kcl", epochs, model=model, optimizer=optimizer)
    judge = common.Judge(args, model, counts, test_loader)
    for epoch in stage.epochs():                   # those still to be done
        for views, labels, indices in stage.batches(loader):
            ...                                    # loss, zero_grad, backward
            stage.guard(loss)                      # not finite: ends before it is kept
            optimizer.step()
            stage.add(len(labels), loss=loss)      # running means, kept on the device
        stage.end_epoch(judge)                     # figures, logs, last.pt, kcl.pt

The unit of resume is the epoch: a checkpoint is written at its end, and what was begun is begun
again. Every draw comes from `generator(seed, purpose, epoch, step)`, so it sees the same batches.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import stat
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import models

ROOT = Path(__file__).resolve().parent


# --- errors, seeds, ranks -------------------------------------------------------------------------


class UserError(Exception):
    """A user's mistake (flag, path, image, checkpoint): one clear line, exit code 2."""


class RunError(Exception):
    """The run cannot go on (loss, disk): one clear line, exit code 1, nothing saved is lost."""


def derive_seed(*key: int | str) -> int:
    """63-bit seed from a key of integers and strings, the same on every machine."""
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


def replicate(args, module: nn.Module) -> nn.Module:
    """What a loop calls: compiled if `--compile`, averaging gradients under several ranks."""
    module = torch.compile(module) if args.compile else module
    return nn.parallel.DistributedDataParallel(module) if world_size() > 1 else module


def sgd(params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9) -> torch.optim.SGD:
    """SGD of these parameters, fused on GPUs."""
    params = list(params)
    fused = params[0].device.type == "cuda"
    return torch.optim.SGD(params, lr, momentum, weight_decay=weight_decay, fused=fused)


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
        dist.all_reduce(gradient)  # of all ranks' losses; DistributedDataParallel averages
        return gradient[rank() * context.rows : (rank() + 1) * context.rows]


def gather_with_gradient(share: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [b, d] of each -> [W b, d], with gradient to one's own."""
    return _Gather.apply(share) if world_size() > 1 else share


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(weights losses) / sum(weights), [b] each, over all ranks; 0 where all weights are 0."""
    total = weights.detach().sum()
    if world_size() > 1:
        dist.all_reduce(total)
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return world_size() * (weights * losses).sum() / total


# --- arguments ------------------------------------------------------------------------------------

# How and where a run is done, not what it computes: may differ when a run continues.
NEUTRAL = frozenset(
    "out data_root cache_dir fresh eval predict quiet logger workers device gpus".split()
    + ["save_features", "command_line", "changed"]
)
KNOWN_SETS = "glyphs_lt cifar10_lt cifar100_lt svhn_lt mini_imagenet_lt imagenet_lt inat18".split()
LARGE_SETS = KNOWN_SETS[4:]
KINDS = ("letters", "small", "large")  # glyphs_lt; images up to 64 px; above
file_path = os.path.expanduser  # argparse type of a flag that names a file or folder


def home_path(text: str) -> Path:
    return Path(file_path(text))


@contextlib.contextmanager
def printing():
    """Around what prints: any terminal will do, or none; a closed pipe (`| head`) ends quietly."""
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what it has no letter for
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not stat.S_ISFIFO(os.fstat(1).st_mode):
            raise  # it was another pipe
        os._exit(128 + signal.SIGPIPE)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and `@file` lines read like a shell would."""

    named = "method"  # how the flag is called that chooses the method

    def flag(self, name: str) -> str:
        """A flag as it is typed."""
        return "--" + (self.named if name == "method" else name).replace("_", "-")

    def _print_message(self, message: str, file=None) -> None:
        with printing():
            super()._print_message(message, file)

    def error(self, message: str):
        told = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
        if told.isdecimal() and int(told) > 0:
            time.sleep(2)  # every rank of torchrun finds the same mistake: rank 0 tells it
            sys.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _read_args_from_files(self, words: list[str]) -> list[str]:
        try:
            self.words = super()._read_args_from_files(words)
        except UnicodeDecodeError:
            self.error("an @file of flags is not text in UTF-8")
        return self.words

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"an @file of flags holds a line that cannot be read ({error}): {line}")


def number(kind: type, low: float = -math.inf, high: float = math.inf, open_low: bool = False):
    """argparse type: a finite int or float in [low, high] (or (low, high])."""
    bound = "an integer" if kind is int else "a number"
    bound += f" above {low:g}" if open_low else f", at least {low:g}"
    bound += f" and at most {high if kind is int else f'{high:g}'}" if high < math.inf else ""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
                return value
        raise argparse.ArgumentTypeError(f"must be {bound}, got {text[:40]}")

    return parse


# A row: name, its default (or the three of letters, small and large sets), what it is, and where
# needed a dictionary: "range": lowest and highest value (without it whole numbers start at 1, other
# ones lie above 0), "bare": a switch, and other flags with the values beside which alone it means
# something, (False,) if not beside it. A tuple lists choices, the default first; a type stands for
# no default.
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
    ("init_from", str, "checkpoint to start from", {"eval": (False,)}),
    ("eval", str, "only evaluate this checkpoint"),
    ("predict", str, "with --eval: name the classes of the images of this folder"),
    ("eval_every", 1, "epochs between evaluations; the last is always one"),
    ("select", ("last", "val", "test"), "headline: last epoch, or best on validation or test data"),
    ("save_features", ("", "train", "val", "test"), "write features_<split>.npz at the end",
                      {"eval": (False,)}),
    ("gpus", 1, "local ranks, one GPU each"),
    ("device", "auto", "auto, cpu, cuda, cuda:1 or mps"),
    ("workers", 4, "decoding processes a rank, for image files", {"range": (0, math.inf)}),
    ("cache", int, "image files: read what `python -m tools.prepare cache` wrote at this size"),
    ("cache_dir", str, "where caches lie, if not in the data root"),
    ("precision", ("auto", "fp32", "bf16"), "auto: bf16 on GPUs that have it, else fp32"),
    ("compile", False, "torch.compile the network", {"bare": True}),
    ("out", "runs", "folder of all runs"),
    ("fresh", False, "start over and drop what the run folder holds",
                     {"bare": True, "eval": (False,)}),
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


def reader(name: str, like, only: dict) -> dict:
    """argparse's keywords for a flag whose default is `like`."""
    if name == "backbone":
        return {"type": models.backbone_name}
    if "bare" in only:
        return {"action": "store_const", "const": True}
    if isinstance(like, tuple):
        return {"choices": [choice for choice in like if choice != ""]}
    kind = like if isinstance(like, type) else type(like)
    if kind is str:
        return {"type": file_path}
    low, high = only.get("range", (1, math.inf) if kind is int else (0, math.inf))
    return {"type": number(kind, low, high, open_low="range" not in only and kind is float)}


def default_of(value):
    """What a flag is when nobody says it: the first of its choices; of a type None."""
    if isinstance(value, tuple):
        return value[0] or None
    return None if isinstance(value, type) else value


def make_parser(doc: str, table: dict, named: str) -> Parser:
    """The parser of a table; a flag that nobody says is None."""
    columns = "Three defaults are those of letters / images up to 64 px / larger ones."
    about = f"{doc.partition('.')[0].strip()}. {columns}"
    parser = Parser(description=about, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.named = named
    for name, (defaults, text, only) in table.items():
        shown = ["-" if default_of(d) is None else f"{default_of(d)}" for d in defaults]
        shown = " / ".join(shown if len(set(shown)) > 1 else shown[:1])
        like = next((d for d in defaults if not isinstance(d, type)), defaults[0])
        text = f"{text} (default: {shown})".replace("%", "%%")
        parser.add_argument(parser.flag(name), dest=name, help=text, **reader(name, like, only))
    return parser


def parse(doc: str, flags, methods: dict, other: dict, side, argv=None, named: str = "method"):
    """The arguments of a script, all decided here.

    flags: rows laid over SHARED. methods: {name: stages}, the default first. other: {key: {flag:
    default}} laid over both, in this order where a key is the kind, the data set, either with
    --imb-ratio, the method, (method, kind), (method, data set). side: (dataset, data_root,
    image_size) -> pixels, of a path. named: the flag that chooses the method.
    Sets `kind` (of KINDS), `stages` (a tuple) and `changed`: what differs and changes the result.
    """
    method = ("method", tuple(methods), "row of the paper's table")
    stages = ("stages", str, f"part of {','.join(next(iter(methods.values())))}")
    table = read_rows(SHARED) | read_rows((method, stages)) | read_rows(flags)
    parser = make_parser(doc, table, named)
    args = parser.parse_args(argv)
    args.command_line = parser.words
    said = {name for name in table if getattr(args, name) is not None}
    for name in said:
        if getattr(args, name) == "":  # such as a variable of a shell that is not set
            parser.error(f"{parser.flag(name)} is empty")
    args.dataset = args.dataset or "glyphs_lt"
    try:
        args.kind = kind_of(args, side)
    except UserError as error:
        parser.error(str(error))
    standard = standards(args, table, other)
    vars(args).update(standard | {name: getattr(args, name) for name in said})
    choose_stages(parser, args, methods)
    refuse(parser, args, table, said)
    same = NEUTRAL | {"dataset", "imb_ratio", "seed", "method", "stages"}
    same |= {name for name in table if getattr(args, name) == standard[name]}
    args.changed = {name: getattr(args, name) for name in table if name not in same}
    if args.stages != tuple((standard["stages"] or ",".join(methods[args.method])).split(",")):
        args.changed = {"stages": "-".join(args.stages)} | args.changed
    return args


def kind_of(args, side) -> str:
    """letters, small or large: by the name of the set, else by the side of its images."""
    large = args.dataset in LARGE_SETS
    if large or side(args.dataset, args.data_root, args.image_size) > 64:
        return "large"
    return "letters" if args.dataset == "glyphs_lt" else "small"


def standards(args, table: dict, other: dict) -> dict:
    """Every flag's default for this set and method, which it settles as well: args.method."""
    column = KINDS.index(args.kind)
    standard = {name: default_of(defaults[column]) for name, (defaults, *_) in table.items()}
    if args.dataset not in KNOWN_SETS:
        standard["imb_ratio"] = None  # a user's own images stay as they are
    for key in (args.kind, args.dataset):
        standard |= other.get(key, {})
    args.method = method = args.method or standard["method"]
    ratio, places = args.imb_ratio or standard["imb_ratio"], (args.kind, args.dataset)
    for key in (*((place, ratio) for place in places), method, *((method, p) for p in places)):
        standard |= other.get(key, {})
    return standard


def choose_stages(parser, args, methods) -> None:
    """args.stages as a tuple; what is left out before them comes from --init-from."""
    chain = methods[args.method]
    stages = tuple(args.stages.split(",")) if args.stages else chain
    if [stage for stage in chain if stage in stages] != list(stages):
        has = f"{parser.flag('method')} {args.method} has {', '.join(chain)}, in this order"
        parser.error(f"--stages {args.stages}: {has}")
    if stages[0] != chain[0] and not (args.init_from or args.eval):
        left = f"leaves out {chain[0]}: give its checkpoint with --init-from"
        parser.error(f"--stages {args.stages} {left}")
    args.stages = stages


def refuse(parser, args, table, said) -> None:
    """End the parsing where a flag was said beside others with which it means nothing."""
    beside = [(name, *pair) for name, row in table.items() for pair in row[2].items()]
    for name, needed, wanted in beside:
        if name not in said or needed in ("range", "bare"):
            continue
        flag, other, here = parser.flag(name), parser.flag(needed), getattr(args, needed)
        here = here if isinstance(here, tuple) else (here or False,)
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        if wanted == (False,) and here != wanted:
            parser.error(f"{flag} and {other} contradict each other")
        if not set(here) & set(wanted):
            parser.error(f"{flag} belongs to {other} {' or '.join(wanted)}")
    if args.predict and not args.eval:
        parser.error("--predict belongs to --eval CKPT")
    if args.save_features == "val" and args.select != "val":
        parser.error("--save-features val: there is a validation split only with --select val")


def result_args(args) -> dict:
    """The arguments that decide the result, as plain values; files by name and content."""
    kept = {key: value for key, value in sorted(vars(args).items()) if key not in NEUTRAL}
    kept = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
    if kept.get("init_from"):
        kept["init_from"] = file_identity(kept["init_from"])
    return kept | {"dataset": dataset_name(args.dataset)}


@functools.cache
def file_identity(path: str) -> str:
    """A file's name and a code of its content, the same wherever it lies: `kcl-1a2b3c4d`."""
    code = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    return f"{Path(path).stem}-{code}"


# --- launch ---------------------------------------------------------------------------------------


def _on_signal(number_: int, frame) -> None:
    """Stop at once; last.pt is there, and decoding workers see that their parent has gone."""
    if sys.stdout.isatty():
        os.write(1, b"\nstopped; the same command begins this epoch again\n")
    os._exit(128 + number_)  # without unwinding: a process group would wait for the other ranks


def launch(main, args) -> None:
    """Run `main(args)` here, in `--gpus N` local ranks, or as one rank of torchrun, and exit.

    Codes: 0 done; 1 the run failed; 2 bad arguments or data; 130 / 143 stopped by a signal. Sets
    args.device, args.precision and args.gpus to what is really used.
    """
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    try:
        for path in (args.init_from, args.eval):  # also where a result is there already
            if path and not (os.path.isfile(path) and os.access(path, os.R_OK)):
                raise UserError(f"checkpoint {path} does not exist or cannot be read")
        _choose_device(args, under_torchrun)
        if under_torchrun:
            if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
                raise ValueError("no rank of so many")  # which would be waited for in vain
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
            args.gpus = world_size()
        elif args.gpus > 1:
            sys.exit(_start_ranks(args.gpus))
        signal.signal(signal.SIGTERM, _on_signal)
        signal.signal(signal.SIGINT, _on_signal)
        warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
        with printing():
            main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, RunError) as error:
        _tell_and_exit(error)
    except ValueError as error:
        why = "a batch of one image cannot be batch-normalised here: choose another --batch-size"
        if under_torchrun and not dist.is_initialized():
            why = f"RANK and WORLD_SIZE are set ({error}): start with torchrun, or unset them"
        elif "more than 1 value per channel" not in str(error):
            raise
        _tell_and_exit(UserError(why))
    except RuntimeError as error:
        lost = re.search("gloo|nccl|connection (reset|closed|refused)", str(error), re.IGNORECASE)
        if world_size() == 1 or not lost:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)  # the launcher says which rank is gone, and ends us before this is over
        _tell_and_exit(RunError(f"lost the other ranks: {str(error).splitlines()[0][:200]}"))


def _tell_and_exit(error: Exception) -> None:
    """One line on stderr and the exit code; what all ranks find is told by rank 0 alone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not is_main():
        time.sleep(30)  # when rank 0 has left as well, the launcher ends us before this is over
    sys.stdout.flush()
    where = f" (rank {rank()})" if rank() else ""
    print(f"{Path(sys.argv[0]).name}: error{where}: {error}", file=sys.stderr, flush=True)
    code = 2 if isinstance(error, UserError) else 1
    if world_size() > 1:
        os._exit(code)  # leaving a process group in good order would wait for the other ranks
    sys.exit(code)


def _choose_device(args, under_torchrun: bool) -> None:
    name = args.device
    if name == "auto":
        alone = args.gpus == 1 and not torch.cuda.is_available()
        name = "cpu" if alone else "cuda"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda, cuda:N or mps")
    if name.startswith("cuda"):
        asked = os.environ.get("LOCAL_RANK") if under_torchrun else name.partition(":")[2]
        here, local = torch.cuda.device_count(), int(asked or 0)
        needed = max(args.gpus, local + 1)
        if here < needed:
            why = f"needs {needed} GPUs, this machine has {here}; CPU ranks: --device cpu"
            raise UserError(f"--gpus {args.gpus} --device {args.device} {why}")
        name = f"cuda:{local}"
        torch.cuda.set_device(local)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Metal GPU; use --device cpu")
    args.device = name
    if args.precision == "auto":
        capable = name.startswith("cuda") and torch.cuda.get_device_capability() >= (8, 0)
        args.precision = "bf16" if capable else "fp32"
    # float32 means float32: losses are products of float32 matrices outside autocast
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _start_ranks(count: int) -> int:
    """This same command as `count` local ranks under PyTorch's elastic launcher; its exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the ranks say themselves what is wrong
    # a stop signal waits for the end of an evaluation
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "monitor_interval": 0.1}
    config = LaunchConfig(1, 1, count, max_restarts=0, **place)
    try:
        elastic_launch(config, sys.executable)("-u", *sys.argv)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        number_, first = failed.get_first_failure()
        code = first.exitcode
        if code not in (1, 2, 130, 141, 143):  # those have said why themselves
            killed = code < 0 and f"was killed by {signal.Signals(-code).name}"
            how = killed or f"died with exit code {code}"
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            rest = "all ranks were stopped, the same command continues from what was saved"
            print(f"error: rank {number_} {how}{hint}; {rest}", file=sys.stderr)
        return code if code > 0 else 1
    return 0


def autocast(args):
    """Autocast context of `--precision`; losses belong in float32 outside of it."""
    if args.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16)


# --- files ----------------------------------------------------------------------------------------

KEPT = "what was saved before is intact"


@contextlib.contextmanager
def writing(path: Path, kind: type = RunError):
    """Around writing to `path`: an error of this kind where that cannot be, of a full disk, too."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free / 1e6
            why = f"the disk is full ({free:,.1f} MB free)"
        raise kind(f"cannot write {path}: {why}; {KEPT}") from None


def write_atomic(path: Path, write) -> None:
    """Call `write(file)` on a neighbour of `path`, sync it, put it in place: never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Write a JSON file; a figure that is not finite becomes null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda word: None)
    text = json.dumps(plain, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def make_folder(path: Path) -> None:
    """Make a folder of results; UserError when that cannot be."""
    with writing(path, UserError):
        path.mkdir(parents=True, exist_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint: a plain dict of tensors, numbers, strings."""
    content = io.BytesIO()  # torch's own writer would not say why it failed
    torch.save(checkpoint, content)
    write_atomic(path, lambda file: file.write(content.getbuffer()))


def read_file(path: str | Path, hint: str = "") -> dict:
    """What torch.save wrote, without running code in it; UserError when it is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged one
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception:  # unpickling raises many kinds; whichever it was, the file is of no use
        raise UserError(f"checkpoint {path} is damaged or not one of ours{hint}") from None


def load_checkpoint(path: str | Path, hint: str = "") -> dict:
    """One of our checkpoints; UserError when it is damaged or foreign."""
    checkpoint = read_file(path, hint)
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != "long-tail-run":
        raise UserError(f"checkpoint {path} was not written by these scripts{hint}")
    return checkpoint


def check_same(path, saved: dict, now: dict, names, remedy="give the saved value") -> None:
    """Refuse a checkpoint whose arguments differ from the present ones, naming the first."""
    for name in names:
        if saved.get(name) != now.get(name):
            made = f"was made with --{name.replace('_', '-')} {saved.get(name)}"
            raise UserError(f"{path} {made}, this has {now.get(name)}; {remedy}")


def load_weights(module: nn.Module, state: dict[str, Tensor], source) -> None:
    """Load weights that must fill `module` exactly; UserError naming what does not fit."""
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        misfit = str(error).splitlines()[1].strip()
        raise UserError(f"{source} does not fit this network: {misfit[:200]}") from None


def check_data(path, saved: str, now: str, dataset: str) -> None:
    """Refuse a checkpoint of other data, naming what differs in `images:1a2b classes:3c4d`."""
    was, here = (  # a code without a name is that of the images with their labels
        dict(word.split(":") if ":" in word else ("images", word) for word in text.split())
        for text in (saved, now)
    )
    other = [name for name in here if was.get(name, here[name]) != here[name]]
    if other:
        why = f"was trained on other {' and '.join(other)} than --dataset {dataset} gives now"
        raise UserError(f"{path} {why}")


def load_backbone(backbone: nn.Module, path, args, data: str | None = None) -> dict:
    """Fill a backbone, every tensor, from a network of any script and data set, or torchvision's.

    Returns the checkpoint; of torchvision's plain tensors one that holds the backbone alone. data:
    fingerprint of the training images; UserError when it is of this very data set and other images
    of it: what is held out here was seen there.
    """
    found, start = read_file(path), "backbone."
    if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()):
        load_weights(backbone, {k: v for k, v in found.items() if not k.startswith("fc.")}, path)
        state = {start + name: value for name, value in backbone.state_dict().items()}
        of = {"script": "torchvision", "stage": "", "epoch": 0}
        return of | {"args": {}, "info": {}, "state": {"model": state}}
    found, now = load_checkpoint(path), result_args(args)
    if found["args"]["dataset"] == now["dataset"]:
        subset = ("imb_ratio", "imb_type", "data_seed") if data else ()
        check_same(path, found["args"], now, ("backbone", *subset))
        check_data(path, found["data"], data or found["data"], args.dataset)
    state = found["state"]["model"]
    own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    load_weights(backbone, own, path)
    return found


# --- run folder -----------------------------------------------------------------------------------

DELETE = "; delete it (what it held is then trained again) or use --fresh"


def dataset_name(dataset: str) -> str:
    """A known set's name; of a path its last part, wherever it lies: Run compares what it holds."""
    if dataset in KNOWN_SETS:
        return dataset
    path = Path(dataset).resolve()
    return re.sub(r"[^\w.+-]", "-", path.stem if path.suffix == ".npz" else path.name)


def dataset_tag(args) -> str:
    """Folder name of the data set: `cifar10_lt_ir100`."""
    ratio = "" if args.imb_ratio is None else f"_ir{args.imb_ratio:g}"
    return dataset_name(args.dataset) + ratio


def variant_name(args, method: str) -> str:
    """Method and every result-changing flag that is not the default: `kcl_epochs100_queue4096`."""
    parts = [method]
    for key, value in args.changed.items():
        if isinstance(value, str) and (os.sep in value or key == "init_from"):
            value = Path(value).stem
        shown = f"{value:g}" if isinstance(value, float) else f"{value}"
        parts.append(key.replace("_", "-") + ("" if value is True else shown))
    name = re.sub(r"[^\w.+-]", "-", "_".join(parts))
    if len(name) <= 120:
        return name
    return f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def lock(path: Path):
    """The open file that keeps a folder to one process; UserError when another one holds it."""
    with writing(path, UserError):
        file = open(path, "a+")
    try:
        import fcntl  # here and not above: not every system has it, and a run does without

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        raise UserError(f"{path.parent} is in use by another process ({holder})") from None
    except (ImportError, OSError):
        line = f"{path.parent} cannot be locked here: start this run only once at a time"
        print(f"warning: {line}", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


class Run:
    """One training run: `<out>/<script>/<dataset>_ir<ratio>/<variant>/seed<k>/`, its lock and logs.

    fingerprint: identity of the training images and labels; a checkpoint of other data is refused.
    """

    def __init__(self, args, method: str, fingerprint: str):
        self.args, self.method, self.fingerprint = args, method, fingerprint
        self.script, self.variant = Path(sys.argv[0]).stem, variant_name(args, method)
        self.made = {"script": self.script, "args": result_args(args), "data": fingerprint}
        place = Path(args.out, self.script, dataset_tag(args), self.variant)
        self.folder = place / f"seed{args.seed}"
        self.rows, self.saved, self.writer = [], None, None
        if is_main():
            make_folder(self.folder)
            self.lock = lock(self.folder / "lock")
            for path in self.folder.glob("*" if args.fresh else ".*.tmp"):
                if path.is_file() and path.name != "lock":
                    path.unlink()
        barrier()
        torch.manual_seed(derive_seed(args.seed, "init"))  # networks built from here on
        if finished := self.result:
            self.check(self.folder / "result.json", finished)
        elif (last := self.folder / "last.pt").exists():
            self.saved = self.read(last)
            self.rows = self.saved["rows"]
        if is_main() and not finished:
            write_json(self.folder / "args.json", vars(args))
            self.writer = event_writer(self)

    @property
    def result(self) -> dict | None:
        """The result of a finished run; None before, and when its file is damaged (made again)."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def complete(self, *suffixes: str) -> bool:
        """Whether nothing is left to do: result and, where asked for, features are there."""
        paths = [features_path(self, suffix) for suffix in suffixes or [""]]
        features = not self.args.save_features or all(path.exists() for path in paths)
        return features and self.result is not None

    def read(self, path: Path) -> dict:
        """A checkpoint of this very run."""
        checkpoint = load_checkpoint(path, DELETE)
        self.check(path, checkpoint)
        return checkpoint

    def check(self, path, checkpoint: dict) -> None:
        """Refuse a checkpoint of other arguments or other data."""
        saved, now = checkpoint["args"], self.made["args"]
        names = [name for name in ("dataset", "backbone", *now, *saved) if name not in NEUTRAL]
        check_same(path, saved, now, names, "give the saved value, another --out, or --fresh")
        check_data(path, checkpoint["data"], self.fingerprint, self.args.dataset)

    def say(self, text: str) -> None:
        if is_main() and not self.args.quiet:
            print(text, flush=True)

    def stage(self, name: str, epochs: int, info: dict | None = None, **parts) -> Stage:
        """A stage of `parts` with a state_dict; info: plain values its evaluation needs."""
        return Stage(self, name, epochs, info or {}, parts)

    @property
    def passes(self) -> int:
        """Images sent forward and backward in all stages; of a frozen backbone none."""
        return sum({row["stage"]: row["passes"] for row in self.rows}.values())

    def finish(self, **result) -> dict:
        """Write result.json and return it; what is clocked or of the machine stays apart."""
        args, seconds = self.args, sum(row["timing"]["seconds"] for row in self.rows)
        full = {"kind": "long-tail-result", **self.made, "dataset": dataset_tag(args)}
        full |= {"variant": self.variant, "method": self.method, "seed": args.seed}
        full |= {"changed": args.changed, "headline": None, "best_on_test": None} | result
        full["machine"] = machine(args, self.rows)
        full["timing"] = {"seconds": round(seconds, 2)}
        if is_main():
            write_json(self.folder / "result.json", full)
        self.show()
        return full

    def show(self) -> None:
        """Print the headline and, last, where result.json is (`tools.report run` reads this)."""
        if is_main():
            if head := self.result.get("headline"):
                print(in_words(head))
            print(f"result: {self.folder / 'result.json'}", flush=True)
        barrier()


class Stage:
    """The bookkeeping of one stage; the loop stays in the script (see the top of this file)."""

    def __init__(self, run: Run, name: str, epochs: int, info: dict, parts: dict):
        self.run, self.name, self.total, self.info, self.parts = run, name, epochs, info, parts
        self.epoch, self.step, self.passes, self.best = 0, 0, 0, None
        self.own = run.folder / f"{name}.pt"
        saved = run.read(self.own) if self.own.exists() else run.saved
        if saved and saved["stage"] == name:
            self.restore(saved)
            run.rows = max(run.rows, saved["rows"], key=len)
            if self.epoch < epochs:
                run.say(f"{name}: continuing at epoch {self.epoch + 1} of {epochs}")

    def restore(self, saved: dict) -> None:
        for key, part in self.parts.items():
            part.load_state_dict(saved["state"][key])
        self.epoch, self.passes, self.best = saved["epoch"], saved["passes"], saved["best"]

    @property
    def lr(self) -> float:
        """Of the optimiser; 0 of a stage without one."""
        optimizer = self.parts.get("optimizer")
        return float(optimizer.param_groups[0]["lr"]) if optimizer else 0.0

    def epochs(self):
        """Yield the epochs that are still to be done, from 0; the script must call `end_epoch`."""
        for epoch in range(self.epoch, self.total):
            torch.manual_seed(derive_seed(self.run.args.seed, self.name, epoch, rank()))
            self.step, self.sums, self.begin = 0, {}, time.perf_counter()
            self.images, self.sent, self.wait, self.trained = 0, 0, 0.0, 1e-9  # without batches
            self.bad = torch.full((), math.inf, device=self.run.args.device)
            yield epoch
            assert self.epoch == epoch + 1, f"stage {self.name}: the loop must call end_epoch"

    def batches(self, loader, passes: int = 1):
        """Yield an epoch's batches; passes: views sent through, twice with SAM, 0 where frozen."""
        loader.set_epoch(self.epoch)
        self.steps, self.bar = len(loader), 0.0
        start = asked = time.perf_counter()
        for batch in loader:
            self.wait += time.perf_counter() - asked
            yield batch
            self.step += 1
            self.images += loader.global_batch
            asked = time.perf_counter()
            show_bar(self, asked - start)
        self.trained = max(time.perf_counter() - start, 1e-9)
        self.sent = passes * self.images
        self.passes += self.sent

    def guard(self, loss: Tensor) -> None:
        """Between backward and step: a loss not finite ends the run, on a GPU after the epoch."""
        step = torch.where(torch.isfinite(loss.detach()), math.inf, float(self.step))
        self.bad = torch.minimum(self.bad, step)
        if step.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """RunError when a loss of the epoch was not finite on any rank."""
        if world_size() > 1:
            dist.all_reduce(self.bad, op=dist.ReduceOp.MIN)
        step = self.bad.item()
        if step < math.inf:
            place = f"epoch {self.epoch + 1} of {self.total}, step {step + 1:.0f}, lr {self.lr:g}"
            raise RunError(f"the loss is not finite in stage {self.name}, {place}; {KEPT}")

    def add(self, count: int, **values: Tensor) -> None:
        """Add means over `count` images of this rank to those of the epoch; no host sync."""
        for key, value in values.items():
            total, weight = self.sums.get(key, (0.0, 0))
            exact = torch.float32 if value.device.type == "mps" else torch.float64  # all it has
            self.sums[key] = value.detach().to(exact) * count + total, weight + count

    def due(self, every: int) -> bool:
        """Whether this epoch is one of every `every`; the last always is."""
        return (self.epoch + 1) % every == 0 or self.epoch + 1 == self.total

    def end_epoch(self, judge: Judge | None = None, **metrics) -> dict:
        """Close the epoch: evaluate where due, a row of metrics.jsonl (returned), checkpoints."""
        self.look()
        row = {"stage": self.name, "epoch": self.epoch, "steps": self.step, "passes": self.passes}
        row |= {"lr": self.lr, **means_over_ranks(self.sums), **metrics}
        if judge and self.due(self.run.args.eval_every):
            row |= judge()
        row["timing"] = timing(self)
        score = judge.score(row) if judge else None
        better = score is not None and (self.best is None or score > self.best)
        self.best, self.epoch = score if better else self.best, self.epoch + 1
        self.run.rows.append(row)
        if is_main():
            warn_of_collapse(self, row)
            log_row(self, row)
            self.save(better)
        barrier()
        return row

    def save(self, better: bool) -> None:
        run, state = self.run, {key: part.state_dict() for key, part in self.parts.items()}
        checkpoint = {"kind": "long-tail-run", **run.made, "rows": run.rows, "state": state}
        checkpoint |= {"stage": self.name, "info": self.info, "epoch": self.epoch}
        checkpoint |= {"passes": self.passes, "best": self.best}
        if better:
            save_checkpoint(run.folder / f"{self.name}_best.pt", checkpoint)
        if self.epoch == self.total:
            save_checkpoint(self.own, checkpoint)
        save_checkpoint(run.folder / "last.pt", checkpoint)


def timing(stage: Stage) -> dict:
    """What is clocked of an epoch; images and passes a second are those of the training alone."""
    return {
        "seconds": round(time.perf_counter() - stage.begin, 3),
        "images_per_second": round(stage.images / stage.trained, 1),
        "passes_per_second": round(stage.sent / stage.trained, 1),
        "data_wait_share": round(stage.wait / stage.trained, 4),
        "ranks": world_size(),
    }


def machine(args, rows: list[dict]) -> dict:
    """What a run was done on, and on how many ranks epochs in a row were trained."""
    gpu = args.device.startswith("cuda")
    runs = itertools.groupby(row["timing"].get("ranks", 1) for row in rows)
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "ranks": world_size(),
        "threads": torch.get_num_threads(),
        "precision": args.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "stretches": [{"ranks": ranks, "epochs": len([*same])} for ranks, same in runs],
    }


def means_over_ranks(sums: dict[str, tuple[Tensor, int]]) -> dict[str, float]:
    """Means of {name: (sum on the device, items)} over all ranks; the one wait for the device."""
    if not sums:
        return {}
    pairs = [torch.stack([total, torch.full_like(total, n)]) for total, n in sums.values()]
    pairs = torch.stack(pairs)
    if world_size() > 1:
        dist.all_reduce(pairs)
    return {key: total / n for key, (total, n) in zip(sums, pairs.tolist(), strict=True)}


# --- what is shown of a run -----------------------------------------------------------------------


def in_words(figures: dict, form: str = "{:.1f} %") -> str:
    """`overall 77.8 %  many 92.0 %  ...` of a report; n/a where a group has no class."""
    shown = {name: figures[name] for name in ("overall", "mean_class", *GROUPS) if name in figures}
    if round(100 * (shown.get("mean_class") or 0) - 100 * (shown["overall"] or 0), 2) == 0:
        shown.pop("mean_class", None)  # only of a test set that is not balanced it says more
    return "  ".join(
        f"{name} {'n/a' if value is None else form.format(100 * value)}"
        for name, value in shown.items()
    )


def trouble(row: dict, total: int) -> str | None:
    """What the cosines of an epoch's embeddings tell against a contrastive stage of `total`."""
    same, other = row["same_label"], row["other_label"]
    if other > 0.999:
        return "all embeddings have collapsed into one point"
    late = row["epoch"] + 1 >= max(total / 2, 5)  # a shorter stage only tries whether all runs
    if late and same - other < 0.01 * (1 - other):
        return "images of one label are no closer than images of two"
    return None


def warn_of_collapse(stage: Stage, row: dict) -> None:
    """Say once what is wrong with the embeddings of a stage, and since which epoch."""
    rows = [old for old in stage.run.rows if old["stage"] == stage.name and "same_label" in old]
    *before, now = [trouble(old, stage.total) for old in rows] or [None]
    if now and now not in before:
        cosines = f"mean cosines {row['same_label']:.4f} and {row['other_label']:.4f}"
        where = f"stage {stage.name}, epoch {row['epoch'] + 1} of {stage.total}"
        print(f"warning: {where}: {now} ({cosines})", file=sys.stderr, flush=True)


def event_writer(run: Run):
    """TensorBoard's writer of a run; None where it is not wanted or not installed."""
    if run.args.logger == "none":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        run.say("tensorboard is not installed: writing metrics.jsonl only")
        return None
    return SummaryWriter(str(run.folder), purge_step=len(run.rows))


def show_bar(stage: Stage, seconds: float) -> None:
    """On a terminal, where the epoch is."""
    now = time.perf_counter()
    quiet = stage.run.args.quiet or not is_main() or not sys.stdout.isatty()
    if quiet or now - stage.bar < 0.2:
        return
    stage.bar = now
    left = ((stage.total - stage.epoch) * stage.steps - stage.step) * seconds / stage.step
    bar = "#" * (20 * stage.step // stage.steps)
    place = f"{stage.name} {stage.epoch + 1}/{stage.total} [{bar:.<20}]"
    text = f"{place} {stage.images / max(seconds, 1e-9):,.0f} images/s, {left:,.0f} s left"
    print(f"\r{text:<100}", end="", flush=True)


def log_row(stage: Stage, row: dict) -> None:
    """The row of an epoch: metrics.jsonl, TensorBoard, a line on the screen.

    The whole file is put in place, and before the checkpoint: a row too many is written again.
    """
    run, told = stage.run, []
    lines = "".join(json.dumps(row) + "\n" for row in run.rows).encode()
    write_atomic(run.folder / "metrics.jsonl", lambda file: file.write(lines))
    for key, value in row.items():
        if isinstance(value, float):
            told.append(f"{key} {value:.4g}")
        elif isinstance(value, dict) and isinstance(value.get("overall"), float):
            told.append(f"{key} {100 * value['overall']:.1f}%")
    if run.writer:
        with writing(run.folder):
            for name, value in scalars(row):
                run.writer.add_scalar(f"{stage.name}/{name}", value, len(run.rows))
            run.writer.flush()
    left = row["timing"]["seconds"] * (stage.total - stage.epoch)
    speed = f"{row['timing']['images_per_second']:,.0f} images/s, {left:,.0f} s left"
    start = "\r" if sys.stdout.isatty() else ""
    line = f"{start}{stage.name} {stage.epoch}/{stage.total}  {'  '.join(told)}  ({speed})"
    run.say(line.ljust(100))


def scalars(row: dict, before: str = ""):
    """(name, number) of all figures of a row, those of the dicts in it as `test/overall`."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{before}{key}/")
        elif isinstance(value, (int, float)):
            yield before + key, value


# --- schedules ------------------------------------------------------------------------------------


def scale_milestones(published: Sequence[float], published_epochs: int, epochs: int) -> list[int]:
    """A recipe's milestones at the same fractions of `epochs`, rounded down but never below 1."""
    return [max(1, math.floor(m * epochs / published_epochs)) if m > 0 else 0 for m in published]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def milestone_lr(base_lr: float, epoch: float, milestones: Sequence[float], factor=0.1) -> float:
    """base_lr, times `factor` from each epoch in `milestones` on."""
    return base_lr * factor ** sum(epoch >= m for m in milestones)


def step_lr(base_lr: float, epoch: float, epochs: int) -> float:
    """LDAM-DRW's on CIFAR: (epoch + 1) / 5 of the rate for 5 epochs, x 0.01 at 160 and at 180."""
    warmup, first, second = scale_milestones((5, 160, 180), 200, epochs)
    second = max(second, first + 1)  # in very short runs the two drops would fall together
    if epoch < warmup:
        return base_lr * (math.floor(epoch) + 1) / warmup
    return milestone_lr(base_lr, epoch, (first, second), 0.01)


def cosine_lr(base_lr: float, epoch: float, epochs: int) -> float:
    """Half cosine from base_lr to 0: base_lr / 2 (1 + cos(pi e / epochs)), e the whole epoch."""
    return warmup_cosine_lr(base_lr, math.floor(epoch), epochs)


def warmup_cosine_lr(base_lr: float, epoch: float, epochs: float, warmup=0.0, floor=0.0) -> float:
    """At fractional epoch t: base_lr t / warmup, then a half cosine to `floor` at `epochs`."""
    if epoch < warmup:
        return base_lr * epoch / warmup
    done = (epoch - warmup) / (epochs - warmup) if epochs > warmup else 1.0
    return floor + (base_lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


# --- evaluation -----------------------------------------------------------------------------------

GROUPS = ("many", "medium", "few")
LONG = ("per_class", "confusion", "reliability")  # of a report, beside its headline
CHOSEN = {  # what `--select` makes of a result, as it says itself
    "last": "last epoch",
    "val": "epoch chosen on validation data",
    "test": "epoch chosen on the test set",
}


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def group_of(counts, many: int = 100, few: int = 20) -> np.ndarray:
    """Group of each class by its training count, int64 [C]: 0 above many, 2 below few, else 1."""
    counts = np.asarray(counts)
    return np.where(counts > many, 0, np.where(counts < few, 2, 1)).astype(np.int64)


def report(
    labels, predictions, counts, *, confidence=None, nll=None, topk_hits=None, **groups
) -> dict:
    """Figures of a classifier, plain Python fractions in [0, 1]; None where there is nothing.

    labels, predictions: [N] class ids (-1 is no class: always wrong); counts: training images of
    each class [C]; confidence, nll, topk_hits: [N]. groups: bounds of `group_of`. mean_class, many,
    medium, few: mean recall of the classes that have test images. macro_f1: over those that occur
    in labels or predictions. confusion (up to 200 classes): rows are the true class.
    """
    labels, predictions, counts = (
        np.asarray(values).astype(np.int64) for values in (labels, predictions, counts)
    )
    size, hit, named = len(counts), labels == predictions, predictions >= 0
    support, correct, predicted = (
        np.bincount(of, minlength=size) for of in (labels, labels[hit], predictions[named])
    )
    tested = support > 0
    recall = correct[tested] / support[tested]
    group = group_of(counts, **groups)[tested]
    total, classes = np.bincount(group, recall, minlength=3), np.bincount(group, minlength=3)
    f1 = 2.0 * correct / np.maximum(support + predicted, 1)
    loss = math.nan if nll is None or not len(hit) else np.asarray(nll, np.float64).mean()
    figures = {
        "overall": _ratio(hit.sum(), len(hit)),
        "mean_class": _ratio(recall.sum(), recall.size),
        **{name: _ratio(total[g], classes[g]) for g, name in enumerate(GROUPS)},
        "macro_f1": _ratio(f1.sum(), np.count_nonzero(support + predicted)),
        "harmonic_mean": _ratio(recall.size, (1.0 / recall).sum()) if recall.all() else 0.0,
        "worst_class": float(recall.min()) if recall.size else None,
        **calibration(confidence, hit),
        "top5": None if topk_hits is None else _ratio(np.asarray(topk_hits).sum(), len(hit)),
        "loss": float(loss) if math.isfinite(loss) else None,
        "per_class": [_ratio(*pair) for pair in zip(correct, support, strict=True)],
    }
    if size <= 200:
        pairs = np.bincount((labels * size + predictions)[named], minlength=size * size)
        figures["confusion"] = pairs.reshape(size, size).tolist()
    return figures


def calibration(confidence, hit: np.ndarray, bins: int = 15) -> dict:
    """Expected calibration error (Guo et al. 2017), and its bins ((b - 1) / bins, b / bins]."""
    confidence = np.asarray([math.nan] if confidence is None else confidence)
    if not len(hit) or not np.isfinite(confidence).all():
        return {"ece": None, "reliability": None}
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sure, right = (
        np.bincount(index, values, minlength=bins) / np.maximum(count, 1)
        for values in (confidence, hit)
    )
    error = float((count * np.abs(right - sure)).sum() / count.sum())
    means = {"confidence": sure.tolist(), "accuracy": right.tolist()}
    return {"ece": error, "reliability": {"count": count.tolist()} | means}


def topk_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k largest of logits [N, C], bool [N]; never beside a NaN."""
    true = logits.gather(1, labels[:, None])  # of equal logits the lower class comes first
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    place = ((logits > true) | ((logits == true) & before)).sum(1)
    return (place < k) & ~logits.isnan().any(1)


@dataclass
class Scores:
    """What a network said about every item of a set, in the set's order: CPU tensors [N]."""

    labels: Tensor  # int64
    predictions: Tensor  # int64; -1 where the logits were not finite
    confidence: Tensor  # float32, softmax of the predicted class
    nll: Tensor  # float32, cross-entropy in nats
    top5: Tensor  # bool, true class among the five largest logits
    features: Tensor | None = None  # float32 [N, d]

    def report(self, counts: Sequence[int], **groups) -> dict:
        """`report` of these scores."""
        groups |= {"confidence": self.confidence, "nll": self.nll, "topk_hits": self.top5}
        return report(self.labels, self.predictions, counts, **groups)


@torch.no_grad()
def evaluate(model: nn.Module, loader, num_items=None, autocast=None, features=None) -> Scores:
    """Scores of `model` on an evaluation loader, every item exactly once over all ranks.

    loader yields (views [V, b, 3, H, W], labels [b], indices [b]); the first view counts. autocast:
    makes the context of a forward pass. features: a second function of the images whose output
    [b, d] is kept. RuntimeError when one of num_items (default: of its set) is not seen just once.
    """
    if dist.is_initialized():
        for buffer in model.buffers():  # batch norm: the statistics that rank 0 saves
            dist.broadcast(buffer, 0)
    size = len(loader.dataset) if num_items is None else num_items
    modes, rows = [(module, module.training) for module in model.modules()], []
    model.eval()
    try:
        for views, labels, indices in loader:
            with autocast() if autocast else contextlib.nullcontext():
                logits, extra = model(views[0]), features(views[0]) if features else None
            rows.append(score(logits.float(), labels, indices, extra))
    finally:
        for module, mode in modes:
            module.training = mode
    table = gather_rows(rows)
    table = table[table[:, 0].argsort()]
    place = table[:, 0].long()
    if not torch.equal(place, torch.arange(size)):
        seen = f"{len(place)} rows of {len(place.unique())} items"
        raise RuntimeError(f"evaluation must see each of {size} items once, saw {seen}")
    labels, predictions, confidence, nll, top5 = table[:, 1:6].T
    kept = table[:, 6:].clone() if features else None
    return Scores(labels.long(), predictions.long(), confidence, nll, top5 > 0, kept)


def score(logits: Tensor, labels: Tensor, indices: Tensor, extra: Tensor | None) -> Tensor:
    """A row of each item: index, the five fields of Scores, its features; float32 [b, 6 + d]."""
    log_p = logits.log_softmax(1)
    valid = ~log_p.isnan().any(1)
    predictions = logits.argmax(1)
    columns = [
        indices,  # whole numbers are exact in float32, below 2^24
        labels,
        torch.where(valid, predictions, -1),
        log_p.gather(1, predictions[:, None])[:, 0].exp(),
        -log_p.gather(1, labels[:, None])[:, 0],
        topk_hits(logits, labels, 5) & valid,
    ]
    rows = torch.stack([column.float() for column in columns], 1)
    return rows if extra is None else torch.cat([rows, extra.float()], 1)


def gather_rows(rows: list[Tensor]) -> Tensor:
    """The rows [n, width] of all batches of all ranks, on the CPU; a rank may have none."""
    parts = [torch.cat(rows).cpu()] if rows else []
    if dist.is_initialized():
        shares = [None] * world_size()
        dist.all_gather_object(shares, parts)
        parts = [part for share in shares for part in share]
    return torch.cat(parts)


def figures(args, net: nn.Module, loader, counts: Sequence[int], **groups) -> dict:
    """`report` of a network on an evaluation loader; RunError when its outputs are not finite."""
    full = evaluate(net, loader, autocast=lambda: autocast(args)).report(counts, **groups)
    if full["loss"] is None:
        raise RunError("the network has diverged (outputs not finite): try a smaller --lr")
    return full


class Judge:
    """Evaluates a network where `--eval-every` says so, and chooses the epoch by `--select`.

    test, val: evaluation loaders, val for `--select val`. counts: training images of each class.
    others: further networks by name, judged on the test set beside it.
    """

    def __init__(self, args, net, counts, test, val=None, others: dict | None = None):
        self.args, self.counts, self.judged = args, counts, {"test": (net, test)}
        self.judged |= {name: (other, test) for name, other in (others or {}).items()}
        if val is not None:
            self.judged["val"] = net, val

    def __call__(self) -> dict[str, dict]:
        """What a row of metrics.jsonl holds of the evaluation: `test`, others, perhaps `val`."""
        return {
            name: logged(figures(self.args, net, loader, self.counts))
            for name, (net, loader) in self.judged.items()
        }

    def score(self, row: dict) -> float | None:
        """By what epochs are compared; None where nothing is chosen or the row was not judged."""
        if self.args.select == "last" or "test" not in row:
            return None
        if self.args.select == "test":
            return row["test"]["overall"]
        return row["val"]["mean_class"]  # may be as long-tailed as the training set

    def chosen(self, stage: Stage) -> None:
        """Put the weights of the chosen epoch into the parts of a finished stage."""
        if self.args.select != "last":
            stage.restore(stage.run.read(stage.run.folder / f"{stage.name}_best.pt"))


def logged(full: dict) -> dict:
    """What metrics.jsonl keeps of a report: no table, recalls of up to 200 classes."""
    tables = LONG[1:] if len(full["per_class"]) <= 200 else LONG
    return {key: value for key, value in full.items() if key not in tables}


def outcome(run: Run, stage: str, figures: dict, classes: list[str], counts: list[int]) -> dict:
    """What result.json says of a classifier trained in `stage`, figures its test report."""
    rows = [row for row in run.rows if row["stage"] == stage]
    best = max((row for row in rows if "test" in row), key=lambda row: row["test"]["overall"])
    return {key: figures.get(key) for key in LONG} | {
        "headline": {key: value for key, value in figures.items() if key not in LONG},
        "best_on_test": {"overall": best["test"]["overall"], "epoch": best["epoch"]},
        "chosen": CHOSEN[run.args.select],
        "classes": classes,
        "counts": counts,
        "image_passes": run.passes,
        "epochs": rows[-1]["epoch"] + 1,
    }


def features_path(run: Run, suffix: str = "") -> Path:
    return run.folder / f"features_{run.args.save_features}{suffix}.npz"


def keep_features(run: Run, net: nn.Module, dataset, loader, suffix: str = "") -> None:
    """`--save-features`: float32 features [N, d] of a set, labels [N], positions in its source."""
    scores = evaluate(net, loader, autocast=lambda: autocast(run.args), features=net.features)
    arrays = {"features": scores.features, "labels": scores.labels, "indices": dataset.indices}
    arrays = {key: value.cpu().numpy() for key, value in arrays.items()}
    if is_main():
        write_atomic(features_path(run, suffix), lambda file: np.savez(file, **arrays))
    barrier()


def tell_figures(args, checkpoint: dict, found: dict) -> None:
    """`--eval`: print figures, keep all as `<out>/<script>/examined/eval-<run>-<stage>.json`."""
    if is_main():
        head = {"checkpoint": args.eval} | {key: checkpoint[key] for key in ("stage", "epoch")}
        if "overall" in found:
            told = in_words(found, "{:.2f}%")
            print(f"{args.eval}: {head['stage']}, epoch {head['epoch']}: {told}")
        path, folder = Path(args.eval).resolve(), Path(args.out, checkpoint["script"], "examined")
        name = "-".join(["eval", *path.parts[1:-1][-3:], path.stem])
        make_folder(folder)
        write_json(folder / f"{name}.json", head | found)
    barrier()


def pair_cosines(z: Tensor, labels: Tensor, views: int = 1) -> dict[str, Tensor]:
    """Mean cosine of pairs of one label and of two, of unit rows z [views N, d], view by view."""
    image = torch.arange(len(z), device=z.device) % (len(z) // views)  # makes no pair with itself
    cosine, same = z @ z.T, labels[:, None] == labels
    pairs = {"same_label": same & (image[:, None] != image), "other_label": ~same}
    return {
        name: (cosine * found).sum() / found.sum().clamp(min=1) for name, found in pairs.items()
    }
