"""Faults injected everywhere: each call that writes fails once, and the program is killed there once.

`python -m tests.faults` prints, for each scenario, the calls counted, the faults injected and their outcomes. A
case is a program that is disturbed at its k-th call, and the command that a user gives next, undisturbed; then
every file must be as in a run that nothing disturbed, and a user's own files as they were.

Seen are calls of Python: open, write, fsync, rename, unlink, mkdir, ... below the case's folder. Writes of
SQLite and to memory maps are not; the process is killed before and after them.
"""

import argparse
import builtins
import csv
import errno
import gc
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # no pools of threads: they do not survive a fork

NO_ROOM = ("ENOSPC", "full")
# Faults of each kind of call, by turns. An error's name: this one call fails by it; full: so do all later ones
# that need room; short: half of the bytes are written, then the disk is full.
FAULTS = dict(
    open=("EACCES", "EIO", *NO_ROOM),
    write=("short", "EIO", "full"),
    fsync=("EIO", "ENOSPC"),
    rename=("EACCES", "EIO", "ENOSPC"),
    unlink=("EACCES", "EIO"),
    mkdir=("EACCES", *NO_ROOM),
    rmdir=("EACCES", "EIO"),
    chmod=("EACCES", "EIO"),
    read=("EIO", "EMFILE", "EACCES"),
)
NEED_ROOM = ("open", "write", "fsync", "mkdir")
NOTE = "a user's own\n"
SECONDS = 120  # after which a program hangs


# The layer


class Layer:
    """Counts the calls that write below a folder, and disturbs one of them.

    at: number of that call, from 1; 0: none. fault: "kill", or as in `FAULTS`. reads: count files that are
    opened for reading instead. note: a descriptor, to which the disturbed call's name is written.
    Attributes: `calls`, a line for each call.
    """

    def __init__(self, folder, at=0, fault="", reads=False, note=None):
        self.folder = os.path.realpath(folder)
        self.at = at
        self.fault = fault
        self.reads = reads
        self.note = note
        self.calls = []
        self.lock = threading.Lock()
        self.real = {}

    def place(self, path, folder_fd=None):
        """Return a path relative to the folder, or None if it is not below it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
            if not os.path.isabs(path):  # "pipe:[8]", which has no place
                return None
        elif folder_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder_fd}"), os.fsdecode(path))
        path = os.path.abspath(os.fsdecode(path))
        return os.path.relpath(path, self.folder) if path.startswith(self.folder + os.sep) else None

    def call(self, name, path, folder_fd=None, half=None):
        """Count a call, and disturb it if it is the one. half: does half of a write."""
        place = self.place(path, folder_fd)
        if place is None or self.reads != (name == "read"):
            return
        with self.lock:
            self.calls.append(f"{name} {place}")
            count = len(self.calls)
        disturbed = count == self.at
        if self.fault == "full":
            disturbed = 0 < self.at <= count and name in NEED_ROOM
        if not disturbed:
            return
        if count == self.at and self.note is not None:
            self.real["write"](self.note, f"{name} {place}\n".encode())
        if half and self.fault in ("short", "kill", "full"):
            half()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.fault, errno.ENOSPC)
        raise OSError(number, os.strerror(number), os.fspath(path) if isinstance(path, os.PathLike) else path)

    def install(self):
        """Replace Python's functions on files in this process, for good."""
        real_open = io.open
        layer = self

        def open_file(file, mode="r", *args, **options):
            writes = any(letter in mode for letter in "wax+")
            layer.call("open" if writes else "read", file)
            opened = real_open(file, mode, *args, **options)
            return WrittenFile(opened, layer, file) if writes and layer.place(file) else opened

        builtins.open = io.open = open_file
        real = self.real = {name: getattr(os, name) for name in ("open", "write", "fsync")}

        def os_open(path, flags, mode=0o777, *, dir_fd=None):
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or not flags & os.O_DIRECTORY:
                layer.call("open" if writes else "read", path, dir_fd)
            return real["open"](path, flags, mode, dir_fd=dir_fd)

        def os_write(fd, data):
            layer.call("write", fd, half=lambda: real["write"](fd, data[: len(data) // 2]))
            return real["write"](fd, data)

        def os_fsync(fd):
            layer.call("fsync", fd)  # nothing more: no power is cut here

        os.open, os.write, os.fsync = os_open, os_write, os_fsync
        for name, kind in dict(
            mkdir="mkdir", rmdir="rmdir", unlink="unlink", remove="unlink", chmod="chmod", rename="rename",
            replace="rename", link="open", symlink="open", posix_fallocate="write", ftruncate="write",
            truncate="write",
        ).items():  # fmt: skip
            setattr(os, name, self.counted(getattr(os, name), kind))

    def counted(self, function, kind):
        """Return a function of `os` that is counted; of two paths the second one is where it writes."""

        def call(path, *args, **options):
            target = args[0] if kind == "rename" else path
            if not (kind == "mkdir" and os.path.isdir(path)):  # then nothing is written
                self.call(kind, target, options.get("dir_fd"))
            return function(path, *args, **options)

        return call


class WrittenFile:
    """A file object whose writes are counted."""

    def __init__(self, file, layer, path):
        self._file = file
        self._layer = layer
        self._path = path

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)

    def write(self, data):
        def half():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._layer.call("write", self._path, half=half)
        return self._file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def truncate(self, *size):
        self._layer.call("write", self._path)
        return self._file.truncate(*size)


# Programs in forked processes


def run(program, argv, folder, log, layer=None):
    """Run a program's `main` in a forked process, in a folder; returns (exit code, its output).

    The code is negative for a signal's number, as in `subprocess`. layer: arguments of a `Layer` or None.
    """
    note = log.with_suffix(".note")
    pid = os.fork()
    if not pid:
        _be_program(program, argv, folder, log, note, layer)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def draw_quickly(history, best, name, path):
    """Write some bytes in place of a chart, which takes longer than all else in a run as small as these."""
    with open(path, "wb") as file:
        for row in history:
            file.write(bytes(row["epoch"]))


def _be_program(program, argv, folder, log, note, layer):
    """Be the program, and leave with its exit code."""
    code = 1
    before = set(sys.modules)
    try:
        from vlsm.system import plots
        from vlsm.system.console import friendly_errors

        plots.curves = draw_quickly
        signal.alarm(SECONDS)
        main = importlib.import_module(program).main
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        notes = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        layer = layer or {}
        counted = folder.parent.parent if layer.get("reads") else folder  # the data are beside the cases
        injected = Layer(counted, note=notes, **layer)
        injected.install()
        with friendly_errors():
            main([str(word) for word in argv])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    if code == 0 and not injected.at:
        modules = sorted(set(sys.modules) - before)
        injected.real["write"](notes, json.dumps(dict(calls=injected.calls, modules=modules)).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


# Scenarios


@dataclass
class Scenario:
    """A program that is disturbed, and what comes next.

    again: its arguments afterwards, if `commit`, a file, is there; without it, it is begun again.
    setup: programs that run before, undisturbed, as (program, arguments). kept: folders with a user's files
    from the beginning. joined: folders into which a user puts files before the second command, once they have a
    config.json. whole: a folder that is absent or whole after the disturbed program.
    """

    program: str
    argv: str
    again: str = ""
    commit: str = ""
    setup: list = field(default_factory=list)
    kept: tuple = (".",)
    joined: tuple = ()
    whole: str = ""


# One trained tensor: each tensor takes a dozen writes of state.pt
TRAIN = (
    "--dataset ../../data --weights mini --image-size 32 --peft coop --context 2 --no-upsampler --negatives 1 "
    "--batch-size 4 --device cpu --cache-dir cache --epochs"
)
PREPARE = "--prepare kvasir --data-root root --src ../../"
EVALUATE = "--ckpt run --gallery --figure 1 --save-masks masks --cache-dir cache --device cpu"
SCENARIOS = dict(
    train=Scenario(
        "train", f"{TRAIN} 2 --out run", "--resume --out run", "run/config.json", kept=(".", "cache"),
        joined=("run",),
    ),
    resume=Scenario(
        "train", "--resume --out run --epochs 2", setup=[("train", f"{TRAIN} 1 --out run")], kept=(".", "run")
    ),
    prepare=Scenario("datasets", f"{PREPARE}download", whole="root/kvasir_polyp"),
    again=Scenario(
        "datasets", f"{PREPARE}download", setup=[("datasets", f"{PREPARE}earlier")],
        kept=(".", "root", "root/kvasir_polyp", "root/kvasir_polyp/images"),
    ),
    evaluate=Scenario(
        "evaluate", EVALUATE, setup=[("train", f"{TRAIN} 1 --out run")],
        kept=(".", "run", "run/eval-test", "run/eval-test/gallery", "masks", "cache"),
    ),
    sweep=Scenario(
        "vlsm.tools.sweep", f"--out sweep --trials 2 --space ../../space.json -- {TRAIN} 1",
        "--out sweep --trials 2 --resume", "sweep/config.json", joined=("sweep", "sweep/trial-000"),
    ),
    repeat=Scenario(
        "vlsm.tools.repeat", f"--seeds 1 2 --out group -- {TRAIN} 1",
        "--seeds 1 2 --out group --resume", "group/config.json", joined=("group", "group/seed1"),
    ),
)  # fmt: skip


def make_data(base):
    """Write the data set, a download in Kvasir's layout, an earlier state of it, and a sweep's space."""
    import numpy as np

    from tests.conftest import disk, write_pair

    rng = np.random.default_rng(0)
    counts = dict(train=6, val=3, test=1)
    pairs = [disk(rng, 30, 34) for _ in range(11)]
    names = iter(range(11))
    (base / "data" / "anns").mkdir(parents=True)
    for split, count in counts.items():
        entries = []
        for k in [next(names) for _ in range(count)]:
            prompts = dict(p0="", p1="disk", p2="red disk")
            entries.append(dict(img_name=f"{k}.png", mask_name=f"{k}.png", prompts=prompts))
            write_pair(base / "data", f"{k}", *pairs[k])
        (base / "data" / "anns" / f"{split}.json").write_text(json.dumps(entries))
    for k in range(8):
        write_pair(base / "download", f"k{k}", *pairs[k])
        if k != 3:  # the earlier state lacks one, and another has another picture
            write_pair(base / "earlier", f"k{k}", *pairs[9 if k == 2 else k])
    (base / "outside").mkdir()
    (base / "outside" / "index.html").write_text(NOTE)
    (base / "space.json").write_text('{"lr": {"low": 1e-4, "high": 1e-2, "log": true}}')


@dataclass
class Undisturbed:
    """A scenario's folders before (`start`) and after the program, its calls, and what its files hold."""

    start: Path
    calls: list
    content: dict
    whole: dict
    modules: list


def undisturbed(base, name, reads=False):
    """Run a scenario's programs without faults; returns `Undisturbed`. Raises RuntimeError if one fails."""
    scenario = SCENARIOS[name]
    start = base / f"{name}-start" / "work"
    log = base / f"{name}.log"
    start.mkdir(parents=True)
    for program, argv in scenario.setup:
        code, output = run(program, argv.split(), start, log)
        if code:
            raise RuntimeError(f"{name}: {output}")
    for folder in scenario.kept:
        add_users_files(start / folder, base / "outside")
    end = base / f"{name}-end" / "work"
    shutil.copytree(start, end, symlinks=True)
    code, output = run(scenario.program, scenario.argv.split(), end, log, dict(reads=reads))
    if code:
        raise RuntimeError(f"{name}: {output}")
    told = json.loads(log.with_suffix(".note").read_text())
    return Undisturbed(
        start, told["calls"], content(end), content(end / (scenario.whole or ".")), told["modules"]
    )


def import_here(modules):
    """Import what a program imported, so that later ones, which are forked from here, need not."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception:  # a part that cannot be imported by itself
            pass


TIMED = ("seconds", "images_per_second")  # columns of log.csv
DATES = re.compile(r"\d{4}-\d\d-\d\d( [\d:.]+)?")


def content(folder):
    """Return {path below a folder: digest of its content without times}, without a user's files."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.name == "notes.txt":
            continue
        name = re.sub(r"-\d+-(\w+\.tmp)", r"-PID-\1", str(path.relative_to(folder)))
        digests[name] = "folder" if path.is_dir() else hashlib.sha256(essence(path)).hexdigest()[:16]
    return digests


def essence(path):
    """Return the bytes of a file that two equal runs share."""
    if path.suffix == ".tmp" or path.name in ("curves.png", ".vlsm-written"):
        return b""  # temporary files are never read; the others hold seconds, or lines in the order of events
    if path.name == "log.csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return json.dumps([{k: v for k, v in row.items() if k not in TIMED} for row in rows]).encode()
    if path.name == "state.pt":
        import torch

        return str(len(torch.load(path)["history"])).encode()
    if path.name == "study.db":
        with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as database:
            return DATES.sub("", "\n".join(database.iterdump())).encode()
    if path.suffix == ".safetensors":  # whose metadata come in the order of a hash table
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    if path.suffix == ".html":
        return DATES.sub("", path.read_text()).encode()
    return path.read_bytes()


def difference(found, expected):
    """Return in words how two contents differ; "" if they do not."""
    lines = [f"left: {name}" for name in found if name not in expected]
    lines += [f"missing: {name}" for name in expected if name not in found]
    lines += [f"differs: {name}" for name in found if name in expected and found[name] != expected[name]]
    return "; ".join(lines)


def add_users_files(folder, outside):
    """Put a text file and a link to a folder elsewhere into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_text(NOTE)
    (folder / "outside").symlink_to(outside)


def users_files_changed(folders, outside):
    """Return in words which of a user's files are not as they were; "" if all are."""
    for folder in folders:
        notes, link = folder / "notes.txt", folder / "outside"
        if not notes.is_file() or notes.read_text() != NOTE:
            return f"user's file changed: {notes}"
        if not link.is_symlink() or os.readlink(link) != str(outside):
            return f"user's link changed: {link}"
    if sorted(outside.iterdir()) != [outside / "index.html"] or (outside / "index.html").read_text() != NOTE:
        return f"user's folder behind a link changed: {outside}"
    return ""


OUTCOMES = ("same bits", "said what to do", "not reached", "bad")


def disturb(base, name, truth, at, fault, reads, seen):
    """Disturb a scenario's program at a call, then give the next command; returns (outcome, description).

    seen: {content of the folder in between: what came of it}, to which this case is added.
    """
    scenario = SCENARIOS[name]
    case = Path(tempfile.mkdtemp(prefix="case-", dir=base))
    work, log = case / "work", case / "log"
    try:
        shutil.copytree(truth.start, work, symlinks=True)
        layer = dict(at=at, fault=fault, reads=reads)
        code, output = run(scenario.program, scenario.argv.split(), work, log, layer)
        note = log.with_suffix(".note").read_text().strip()
        what = f"{name} {at} {fault}: {note or truth.calls[at - 1]}: "
        if not note:
            return "not reached", f"{what}exit {code}: {last_line(output)}"
        problem = misbehaviour(code, output, fault)
        if not problem and scenario.whole and (work / scenario.whole).exists():
            problem = difference(content(work / scenario.whole), truth.whole)
            problem = problem and f"neither absent nor whole, {problem}"
        if problem:
            return "bad", what + problem
        between = json.dumps(content(work))
        if between not in seen:
            seen[between] = go_on(base, scenario, truth, work, log)
        outcome, words = seen[between]
        return outcome, what + words
    finally:
        shutil.rmtree(case)


def go_on(base, scenario, truth, work, log):
    """Give the next command in the folder of a disturbed program; returns (outcome, description)."""
    outside = base / "outside"
    folders = [work / folder for folder in scenario.kept]
    for folder in map(work.joinpath, scenario.joined):
        if (folder / "config.json").is_file():
            folders.append(folder)
            add_users_files(folder, outside)
    argv = scenario.argv
    if scenario.again and (work / scenario.commit).exists():
        argv = scenario.again
    code, output = run(scenario.program, argv.split(), work, log)
    problem = misbehaviour(code, output) or users_files_changed(folders, outside)
    temporary = [str(path.relative_to(work)) for path in work.rglob(".vlsm-*.tmp")]
    if not problem and temporary:
        problem = f"temporary files left: {temporary}"
    if not problem and code:
        return "said what to do", last_line(output)
    problem = problem or difference(content(work), truth.content)
    return ("bad", f"{problem} (second command: {argv})") if problem else ("same bits", "")


def misbehaviour(code, output, fault=""):
    """Return in words how a program should not end; "" for code 0, 2 with a sentence, or the kill."""
    if "Traceback" in output or "Exception ignored" in output:
        return f"traceback: {last_line(output)}"
    if fault == "kill":
        return "" if code == -signal.SIGKILL else f"exit {code} instead of the kill: {last_line(output)}"
    if code == 0 or (code == 2 and "error: " in output):
        return ""
    return f"exit {code}: {last_line(output)}"


def last_line(output):
    lines = output.strip().splitlines()
    return lines[-1][:300] if lines else ""


def cases(truth, step=1, one=False, reads=False):
    """Yield (number, fault) of every `step`-th call: the kill, and the faults of its kind by turns.

    one: of kill and fault, each call gets one by turns; writes, which are most of the calls, always do.
    """
    turn = Counter()
    for at in range(step, len(truth.calls) + 1, step):
        kind = truth.calls[at - 1].split()[0]
        number = turn[kind]
        turn[kind] += 1
        faults = FAULTS[kind]
        if kind == "read":
            yield at, faults[number % len(faults)]
        elif one or kind == "write":
            yield at, faults[number // 2 % len(faults)] if number % 2 else "kill"
        else:
            yield at, faults[number % len(faults)]
            yield at, "kill"


BLOCK = 8  # cases that follow each other, which are likely to leave equal folders


def work_through(base, truths, part, parts, step, one, reads, file):
    """Go through one of several parts of the cases; write a line of JSON of each to a file."""
    for name, truth in truths.items():
        seen = {}
        for k, (at, fault) in enumerate(cases(truth, step, one, reads)):
            if k // BLOCK % parts == part:
                outcome, text = disturb(base, name, truth, at, fault, reads, seen)
                file.write(json.dumps([name, outcome, text]) + "\n")
                file.flush()
                if outcome in OUTCOMES[1:]:
                    print(f"{outcome.upper()}: {text}", flush=True)


def share_work(base, truths, workers, *options):
    """Go through all cases in several forked processes; returns the lines of all."""
    files = [base / f"part-{part}.jsonl" for part in range(workers)]
    children = []
    for part, path in enumerate(files):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with open(path, "w") as file:
                    work_through(base, truths, part, workers, *options, file)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in children):
        raise RuntimeError("A worker ended before its last case.")
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--step", type=int, default=1, help="every so many calls (default 1)")
    parser.add_argument("--one", action="store_true", help="one fault a call: it fails or is the last")
    parser.add_argument(
        "--part", type=int, nargs=2, metavar=("PART", "PARTS"), help="a part of the cases, from 0"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, unless --part is given (default 2)"
    )
    parser.add_argument("--reads", action="store_true", help="fail the opening of files that are read")
    parser.add_argument("--list", action="store_true", help="print the calls, and no more")
    args = parser.parse_args(argv)
    names = args.scenario or list(SCENARIOS)
    began = time.perf_counter()
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vlsm-faults-", dir=in_memory) as base:
        base = Path(base)
        make_data(base)
        import torch

        torch.set_num_threads(1)
        import_here(["torch._dynamo", *(SCENARIOS[name].program for name in names)])
        truths = {}
        for name in names:
            truths[name] = undisturbed(base, name, args.reads)
            import_here(truths[name].modules)
        gc.collect()
        gc.freeze()  # so that forked processes share these pages
        if args.list:
            for truth in truths.values():
                print(*truth.calls, sep="\n")
            gc.unfreeze()
            return
        options = args.step, args.one, args.reads
        if args.part:
            output = io.StringIO()
            work_through(base, truths, *args.part, *options, output)
            lines = [json.loads(line) for line in output.getvalue().splitlines()]
        else:
            lines = share_work(base, truths, args.workers, *options)
        gc.unfreeze()
    print(f"\n| scenario | calls | faults | {' | '.join(OUTCOMES)} |\n|{' --- |' * (3 + len(OUTCOMES))}")
    for name in names:
        counts = Counter(outcome for scenario, outcome, _ in lines if scenario == name)
        cells = [name, len(truths[name].calls), counts.total(), *(counts[outcome] for outcome in OUTCOMES)]
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"\n{len(lines)} faults in {time.perf_counter() - began:.0f} s")
    sys.exit(0 if all(outcome == "same bits" for _, outcome, _ in lines) else 1)


if __name__ == "__main__":
    main()
