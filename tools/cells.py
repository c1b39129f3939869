"""The cells of run_all.sh: lines are read, the cells of this machine chosen and run.

A line is `table | script and arguments | seeds`; `[name]` begins a section, # a comment. {a,b} in
the arguments stands for a line with a and one with b. `<ROW>` is the run folder of the cell whose
table ends in `: ROW`, of the same data set and seed: `--init-from <CE>/train.pt` starts from what
that cell has trained, and waits for it.
"""

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import common
import data_lt
from common import UserError
from tools.results import name_of

# --- lines ----------------------------------------------------------------------------------------

SECTIONS = {"claims": None, "headline": None, "more": "--more", "all": "--all"}
LINE = "`table | script and arguments | seeds`"


@dataclass(eq=False)
class Cell:
    """One run: a script with its arguments and one seed, and the tables that show it."""

    words: tuple[str, ...]  # script and arguments, without seed and folders
    seed: int
    name: tuple[str, str, str]  # script, data set and variant of its run
    tables: list[tuple[int, str, str]] = field(default_factory=list)  # line, section, table
    needs: "Cell | None" = None

    def __str__(self) -> str:
        return f"{self.title} | {shlex.join(self.words)}"

    @property
    def title(self) -> str:
        return f"{self.tables[0][2]}, seed {self.seed}"

    @property
    def run(self) -> tuple:
        return (*self.name, self.seed)

    @property
    def log(self) -> str:
        return f"{'-'.join(self.name)[:150]}-seed{self.seed}.log"


def read_lines(path: Path) -> str:
    """The text of a file (`-`: standard input); of a shell script what CELLS and CELLS enclose."""
    if str(path) == "-" and sys.stdin.isatty():
        raise UserError(f"no lines: name a file, or send {LINE} lines to standard input")
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None
    inner = re.search(r"<<'CELLS'\n(.*?)^CELLS$", text, re.DOTALL | re.MULTILINE)
    return inner[1] if inner else text


def read_cells(text: str, seeds: int = 1, only: str | None = None) -> list[Cell]:
    """The cells of all lines, each once, with the first `seeds` seeds of a line.

    only: regular expression that must be found in `table | script and arguments`; what such a cell
    needs comes before it. UserError for a line that cannot be run.
    """
    try:
        pattern = re.compile(only or "", re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--only {only!r} is not a regular expression: {error}") from None
    cells, chosen, section = {}, {}, "claims"
    for place, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        try:
            if re.fullmatch(r"\[.*\]", line):
                section = line[1:-1]
                if section not in SECTIONS:
                    known = ", ".join(f"[{name}]" for name in SECTIONS)
                    raise UserError(f"{line} is none of {known}")
                continue
            for table, words, seed in _split_line(line, seeds) if line else ():
                cell = Cell(words, seed, run_name(words))
                cell = cells.setdefault(cell.run, cell)
                cell.tables.append((place, section, table))
                if pattern.search(f"{table} | {shlex.join(cell.words)}"):
                    chosen[cell] = None
        except UserError as error:
            raise UserError(f"line {place}: {error}") from None
    if only and not chosen:
        raise UserError(f"--only {only!r} fits no line")
    return _with_needed(list(chosen), list(cells.values()))


def _split_line(line: str, seeds: int):
    """(table, words, seed) of every cell of a line."""
    table, *rest = (part.strip() for part in line.split("|"))
    if len(rest) != 2 or not table:
        raise UserError(f"needs {LINE}, got: {line}")
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", rest[1]):
        raise UserError(f"seeds are whole numbers with commas between them, got {rest[1]!r}")
    for call in expand(rest[0]):
        try:
            call = re.sub(r"<[^<>]+>", lambda row: row[0].replace(" ", "\\ "), call)
            words = shlex.split(call)
        except ValueError as error:
            raise UserError(f"{error}: {call}") from None
        words = words[1:] if words[:1] in (["python"], ["python3"]) else words
        for seed in list(dict.fromkeys(map(int, rest[1].split(","))))[:seeds]:
            yield table, tuple(words), seed


def expand(text: str) -> list[str]:
    """`a {b,c}` as [`a b`, `a c`]; every pair of braces with a comma, the last changes fastest."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", text)
    if not found:
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    return [full for part in found[1].split(",") for full in expand(f"{before}{part}{after}")]


@functools.cache
def run_name(words: tuple[str, ...]) -> tuple[str, str, str]:
    """Script, data set and variant of the run that these words start; UserError if they cannot."""
    script = words[0] if words else ""
    if not script.endswith(".py") or not (common.ROOT / script).is_file():
        raise UserError(f"no script {script!r} in {common.ROOT}")
    for flag in {word.split("=")[0] for word in words} & {"--seed", "--out", "--data-root"}:
        raise UserError(f"{flag} is set by the run itself, take it out")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = arguments(script, words[1:])
    except SystemExit:
        why = said.getvalue().partition("error: ")[2].strip()
        raise UserError(f"{script}: {why}") from None
    return Path(script).stem, common.dataset_tag(args), common.variant_name(args, args.method)


def arguments(script: str, words: Sequence[str]):
    """The arguments of a script for these words, by its own table of flags."""
    own = _globals_of(script)
    table = own["FLAGS"], own["METHODS"], own["OTHER"], data_lt.peek_image_size
    return common.parse(own["__doc__"], *table, list(words), own.get("NAMED", "method"))


@functools.cache
def _globals_of(script: str) -> dict:
    return runpy.run_path(str(common.ROOT / script))


def _with_needed(chosen: list[Cell], every: list[Cell], above: tuple = ()) -> list[Cell]:
    """The chosen cells, before each the one whose folder it names."""
    found = []
    for cell in chosen:
        if cell in above:
            raise UserError(f"this needs itself: {cell}")
        for row in re.findall(r"<([^<>]+)>", " ".join(cell.words)):
            rows = [c for c in every if any(t.split(": ")[-1] == row for _, _, t in c.tables)]
            same = [c for c in rows if (c.name[1], c.seed) == (cell.name[1], cell.seed)]
            if not same:
                raise UserError(f"no line is called {row}, which this needs: {cell}")
            cell.needs = same[0]
        found += _with_needed([cell.needs], every, (*above, cell)) if cell.needs else []
        found.append(cell)
    return list(dict.fromkeys(found))


# --- what this machine runs, and how long it takes ------------------------------------------------


def why_not(cell: Cell, args) -> str | None:
    """Why a call does not run the cell; None when it does."""
    asked = {"--all": args.all or args.only, "--more": args.more or args.all or args.only, None: 1}
    flags = [SECTIONS[section] for _, section, _ in cell.tables]
    if not any(asked[flag] for flag in flags):
        return f"not of the first tables ({flags[0]} runs it)"
    name = re.sub(r"_ir[\d.]+$", "", cell.name[1])
    if name not in common.KNOWN_SETS or name == "glyphs_lt":
        return None
    if name.startswith(("cifar", "svhn")):
        here = args.cifar or torch.cuda.is_available()
        return None if here else "there is no GPU here (--cifar runs it on the CPU)"
    place = args.data_root / name
    return None if place.exists() else f"{place} is not there"


def minutes(cells: Iterable[Cell], recorded: Sequence[dict], jobs: int) -> str:
    """About how long these cells take, by recorded runs of the same or of like cells."""
    gpu, spent, unknown = torch.cuda.is_available(), [], 0
    known: dict[tuple, list[float]] = {}
    for run in recorded:
        seconds = (run.get("timing") or {}).get("seconds")
        if seconds and ("NVIDIA" in run["machine"]["device"]) == gpu:
            for key in (name_of(run), name_of(run)[:2]):
                known.setdefault(key, []).append(seconds)
    for cell in cells:
        like = known.get(cell.name) or known.get(cell.name[:2])
        unknown += not like
        spent += [statistics.median(like)] if like else []
    text = f"about {max(max(spent), sum(spent) / jobs) / 60:,.0f} min" if spent else "time unknown"
    return text + (f" and {unknown} of unknown length" if spent and unknown else "")


# --- running --------------------------------------------------------------------------------------


class Runner:
    """Runs cells, `args.jobs` at a time with `args.threads` threads each.

    places: folders of runs that are finished. A signal (Ctrl-C, SIGTERM) is passed on to the
    cells, which have GRACE seconds to save; a second one kills them; then SystemExit with
    128 + signal. The same call later continues them.
    """

    GRACE = 60.0

    def __init__(self, cells: Sequence[Cell], places: dict[tuple, Path], args):
        self.args, self.total, self.places = args, len(cells), places
        self.waiting, self.running, self.failed = list(enumerate(cells, 1)), {}, []
        self.stops: list[int] = []
        self.live: list[str] = []  # lines of progress on the terminal

    def run(self) -> list[Cell]:
        """The cells that failed; the others go on."""
        common.make_folder(self.args.out / "logs")
        before = {}
        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(caught) != signal.SIG_IGN:
                before[caught] = signal.signal(caught, lambda got, frame: self.stops.append(got))
        try:
            while (self.waiting or self.running) and not self.stops:
                self.fill()
                self.collect()
                self.show()
                time.sleep(0.05)
        finally:
            self.end()
            for caught, handler in before.items():
                signal.signal(caught, handler)
        if self.stops:
            raise SystemExit(128 + self.stops[0])
        return self.failed

    def fill(self) -> None:
        """Start what may start; a cell whose needed one has not come and does not come fails."""
        coming = [cell for _, cell, *_ in [*self.waiting, *self.running.values()]]
        for place, cell in list(self.waiting):
            slots = set(range(self.args.jobs)) - set(self.running)
            if cell.needs is None or cell.needs.run in self.places:
                if slots:
                    self.waiting.remove((place, cell))
                    self.say(place, f"start  {cell}")
                    process = self.start(cell, min(slots))
                    self.running[min(slots)] = place, cell, time.monotonic(), process
            elif cell.needs not in coming:
                self.waiting.remove((place, cell))
                self.failed.append(cell)
                self.say(place, f"FAILED {cell.title}  what it needs is not there: {cell.needs}")

    def start(self, cell: Cell, slot: int) -> subprocess.Popen:
        """Start a cell in a session of its own, output into its log; slots share out the GPUs."""
        args = self.args
        folder = str(self.places.get(cell.needs.run)) if cell.needs else ""
        words = [re.sub("<[^<>]+>", lambda row: folder, word) for word in cell.words[1:]]
        command = [sys.executable, str(common.ROOT / cell.words[0]), *words]
        command += ["--seed", str(cell.seed), "--out", str(args.out)]
        command += ["--data-root", str(args.data_root)]
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        for library in ("OMP", "MKL", "OPENBLAS"):
            environment[f"{library}_NUM_THREADS"] = str(args.threads)
        gpus = torch.cuda.device_count()
        if gpus > 1 and "--gpus" not in cell.words:
            every = ",".join(map(str, range(gpus)))
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with open(args.out / "logs" / cell.log, "wb") as log:
            return subprocess.Popen(
                command, stdout=log, env=environment, start_new_session=True, **streams
            )

    def collect(self) -> None:
        """Say what has become of cells that have ended."""
        for slot, (place, cell, begin, process) in list(self.running.items()):
            code, log = process.poll(), self.args.out / "logs" / cell.log
            if code is None:
                continue
            del self.running[slot]
            took = f"{cell.title}  {time.monotonic() - begin:.1f} s"
            *lines, last = "no output", *filter(None, log_lines(log, 10**6))
            for line in lines:
                if line.startswith("warning:"):
                    self.say(place, f"{cell.title}  {line}")
            path = Path(last.removeprefix("result: "))  # the last line of a run that is done
            if code or path.name != "result.json":
                self.failed.append(cell)
                self.say(place, f"FAILED {took}  exit code {code}: {last} (log: {log})")
                continue
            self.places[cell.run] = path.parent
            headline = json.loads(path.read_text())["headline"] or {}
            overall = headline.get("overall")
            figure = "" if overall is None else f"  overall {100 * overall:.1f} %"
            self.say(place, f"done   {took}{figure}")

    def say(self, place: int, text: str) -> None:
        self.clear()
        print(f"{time.strftime('%H:%M:%S')} [{place}/{self.total}] {text}", flush=True)

    def clear(self) -> None:
        """Take the live lines off the terminal."""
        print(f"\033[{len(self.live)}A\033[J" * bool(self.live), end="")
        self.live = []

    def show(self) -> None:
        """On a terminal, a live line a running cell: stage, epoch, accuracy, seconds left."""
        if not (sys.stdout.isatty() and self.running):
            return
        width = os.get_terminal_size().columns - 1
        told = []
        for _, cell, *_ in self.running.values():
            told.append(f"  {cell.title}: {progress(self.args.out / 'logs' / cell.log)}"[:width])
        if told != self.live:
            self.clear()
            print("\n".join(told), flush=True)
            self.live = told

    def end(self) -> None:
        """Let what still runs save and stop; kill what does not."""
        self.clear()
        if self.stops:
            name = signal.Signals(self.stops[0]).name
            print(f"{name}: the cells save and stop; the same command continues", flush=True)
        alive = [process for *_, process in self.running.values() if process.poll() is None]
        for process in alive:
            os.killpg(process.pid, signal.SIGTERM)
        limit = time.monotonic() + self.GRACE
        while any(process.poll() is None for process in alive):
            if len(self.stops) > 1 or time.monotonic() > limit:
                break
            time.sleep(0.05)
        for process in alive:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def log_lines(log: Path, last: int = 4096) -> list[str]:
    """The lines in the last bytes of a log."""
    text = log.read_bytes()[-last:].decode(errors="replace")
    return [line.strip() for line in text.replace("\r", "\n").splitlines()]


def progress(log: Path) -> str:
    """Where a run is, by the last epoch of its log: `train 34/200  71.3 %  55 s left`."""
    for line in reversed(log_lines(log)):
        if place := re.match(r"[\w@.]+ \d+/\d+", line):
            accuracy, left = re.search(r"test (\d+\.\d)%", line), re.search(r"[\d,]+ s left", line)
            told = [place[0], f"{accuracy[1]} %" if accuracy else "", left[0] if left else ""]
            return "  ".join(filter(None, told))
    return "starting"
