"""Give mutated files to every reader, and mutated command lines to every program, and watch what they do.

Allowed is a result, or an error that becomes a sentence. A find is any other exception, a crash, no end within 20
seconds of the processor, memory above a limit, a program that is started, a connection, or a file that is touched
outside of the folder of the case. Each case follows from the seed, the kind and its number alone:

  python -m tests.fuzz --minutes 5
  python -m tests.fuzz --count 1000 --only png tiff --seed 3
  python -m tests.fuzz --only png --at 817     (the same case in this process, with its traceback)
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":  # before torch is imported, and not in a process of other tests
    SETTINGS = tempfile.TemporaryDirectory()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ.update(MPLCONFIGDIR=SETTINGS.name, TORCHINDUCTOR_CACHE_DIR=SETTINGS.name)

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from tests.fuzz_inputs import KINDS, NEEDS, OF_A_RUN, trained  # noqa: E402
from tests.fuzz_mutations import change_words, mutate  # noqa: E402
from vlsm.system import console  # noqa: E402

ROOT = str(Path(__file__).parents[1])
HANG = 20  # seconds of the processor
WAITS = 6  # times as many seconds that a case may wait
MEMORY = 4 << 30  # bytes that a case may take
PIXELS = 4_000_000  # half of Pillow's limit in a case, so that `HANG` is enough for all readers of a picture
CHUNK = 400  # cases of one process
KEPT = 3  # finds of one cause that are written
NOT_HERE = ("merge", "push", "convert_cris")  # programs that refuse the run that there is
OUTCOMES = ("result", "refusal", "stopped")
STATE = struct.Struct("qdqqq")  # number and start of the case, and the counts of `OUTCOMES`
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {  # Python's audit events on paths that change something
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "os.utime",
    "shutil.rmtree", "shutil.move", "sqlite3.connect",
}  # fmt: skip
# Those that execute or connect. torch.load's own unpickler finds no classes by this event.
EXECUTES = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "socket.bind",
    "pickle.find_class", "ctypes.dlopen",
}  # fmt: skip


class Forbidden(BaseException):
    """Something that no file may cause. Not an Exception, so that no reader takes it for a damaged file."""


class Enough(BaseException):
    """The time of a case is over that may take longer than that."""


# A case


def make_case(kind, name, seed, number):
    """Return (files by name, words of the command line or None) of a case; below 0 the valid ones, unchanged."""
    rng = random.Random(f"{seed}/{name}/{number}")
    if number < 0:
        files = dict(kind.variants[number % len(kind.variants)])
        files.pop("!", None)
        return files, kind.words[number] if kind.words else None
    files = dict(rng.choice(kind.variants))
    endings = files.pop("!", None)
    candidates = [file for file in files if endings is None or file.endswith(endings)]
    for file in rng.sample(candidates, min(len(candidates), rng.choice((1, 1, 1, 2)))):
        files[file] = mutate(file, files[file], rng)
    words = change_words(rng.choice(kind.words), rng) if kind.words else None
    return files, words


def run_case(kind, case, root):
    """Read a case's files in a new folder below `root`; returns "result", "refusal" or "stopped".

    Raises what is a find.
    """
    files, words = case
    folder = root / "work"
    folder.mkdir()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "xdg")
    console._printed.clear()
    signal.setitimer(signal.ITIMER_REAL, kind.seconds)
    began = time.monotonic()
    outcome = "result"
    try:
        kind.read(folder, words) if words else kind.read(folder)
    except Enough:
        outcome = "stopped"
    except Exception as error:
        outcome = "refusal"
        if kind.seconds and time.monotonic() - began > kind.seconds:  # `Enough` in a library that wraps it
            outcome = "stopped"
        elif not isinstance(error, kind.allowed) or not is_sentence(error):
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(root)
    present = sorted(path.name for path in root.iterdir())
    if present != ["keep", "work"] or (root / "keep/notes.txt").read_bytes() != b"notes":
        raise Forbidden(f"files outside of the case's folder: {present}")
    shutil.rmtree(folder)
    return outcome


def is_sentence(error):
    """Tell whether this project raised an error for a user, or the system for a file that it names."""
    if isinstance(error, OSError) and error.filename:
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(ROOT) and last.line.startswith("raise")


def guard(root):
    """Raise Forbidden, in this process from now on, for a change outside of a folder and for execution."""
    allowed = (
        f"{root}/work",
        "/dev/null",
        "/proc/self/clear_refs",
        os.environ.get("MPLCONFIGDIR", "/dev/null"),
    )

    def look(event, arguments):
        if event == "open":
            path, _, flags = arguments
            if flags & WRITING and isinstance(path, (str, bytes, os.PathLike)):
                check(event, path)
        elif event in CHANGES:
            base = os.getcwd()
            if isinstance(arguments[-1], int) and arguments[-1] >= 0:  # the handle of a folder
                base = os.readlink(f"/proc/self/fd/{arguments[-1]}")
            for path in arguments:
                if isinstance(path, (str, bytes, os.PathLike)):
                    check(event, os.path.join(base, os.fsdecode(path)))
        elif event in EXECUTES:
            if not (event == "ctypes.dlopen" and not str(arguments[0]).startswith(str(root))):
                raise Forbidden(f"{event} {arguments}")

    def check(event, path):
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(allowed):
            raise Forbidden(f"{event} {path}")

    sys.addaudithook(look)


def limit_memory():
    """Limit this process's memory to what it has, and `MEMORY`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY,) * 2)


def stop(*_):
    raise Enough


# A process of many cases


def work(kind, name, seed, numbers, state, pipe, root):
    """Run cases in this process, below the folder `root`, to the first find; write it to a pipe, as a line of JSON.

    The next process begins anew.
    """
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    for stream in (sys.stdout, sys.stderr):  # as `friendly_errors` does
        stream.reconfigure(errors="backslashreplace")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = PIXELS
    signal.signal(signal.SIGALRM, stop)
    counts = Counter()
    limit_memory()
    guard(root)
    for number in numbers:
        case = make_case(kind, name, seed, number)
        state[:] = STATE.pack(number, time.monotonic(), *(counts[key] for key in OUTCOMES))
        try:
            outcome = run_case(kind, case, root)
            if number < 0 and outcome == "refusal" and not (case[1] and case[1][0].endswith(NOT_HERE)):
                raise AssertionError("a valid input is refused")
            counts[outcome] += 1
            if outcome == "stopped":
                break  # perhaps amid the import of a module
        except BaseException as error:  # Forbidden and SystemExit, too
            line = json.dumps([number, cause(error), traceback.format_exc()[-6000:]])
            os.write(pipe, line.encode() + b"\n")
            break
    state[:] = STATE.pack(number, 0, *(counts[key] for key in OUTCOMES))


def new_root(folder):
    """Return the folder of cases in a temporary one: beside a case's own there is a file of somebody's."""
    root = Path(folder).resolve()
    (root / "keep").mkdir()
    (root / "keep/notes.txt").write_bytes(b"notes")
    return root


def scratch():
    """A folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def cause(error):
    """Return what tells finds of one cause: the type, and the last lines of this project in the traceback."""
    places = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(ROOT) and "/tests/fuzz" not in frame.filename:
            places.append(f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}")
    message = re.sub(r"'[^']*'|0x\w+|\d+", "#", str(error))[:60]  # without what differs from case to case
    return " ".join([type(error).__name__, message, *places[-2:]])


class Watch:
    """Runs the cases of a kind in processes of their own, and counts. finds: {cause: [(number, trace)]}."""

    def __init__(self, name, kind, seed):
        self.name, self.kind, self.seed = name, kind, seed
        self.state = mmap.mmap(-1, STATE.size)
        self.next = -max(len(kind.variants), len(kind.words))  # the valid ones first
        self.counts = Counter()
        self.finds = {}
        self.seconds = 0.0

    def run(self, count, seconds):
        """Run so many cases more, or those of so many seconds."""
        began = time.monotonic()
        end = max(self.next, 0) + count
        while self.next < end and time.monotonic() - began < seconds:
            self.run_process(range(self.next, min(end, self.next + CHUNK)), began + seconds)
        self.seconds += time.monotonic() - began

    def run_process(self, numbers, deadline):
        """Run cases in a new process, until its end, a find, a hang, or the deadline."""
        self.state[:] = STATE.pack(numbers[0], 0, 0, 0, 0)
        reading, writing = os.pipe()
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            root = new_root(folder)
            process = os.fork()
            if not process:
                code = 1
                with contextlib.suppress(BaseException):
                    work(self.kind, self.name, self.seed, numbers, self.state, writing, root)
                    code = 0
                os._exit(code)
            os.close(writing)
            status = self.wait(process, deadline)
            with os.fdopen(reading) as pipe:
                for line in pipe:
                    self.add(*json.loads(line))
        number, start, *counts = STATE.unpack(self.state[:])
        if start and status not in (0, signal.SIGKILL):
            self.add(number, f"the process ended by signal or code {status}", "")
        self.next = number + 1
        self.counts.update(dict(zip(OUTCOMES, counts)))

    def wait(self, process, deadline):
        """Return the status of a process at its end; end it at the deadline, or if a case does not end."""
        last = None
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return status
            number, start, *_ = STATE.unpack(self.state[:])
            busy = processor_seconds(process)
            if number != last:
                last, began, busy_before = number, time.monotonic(), busy
            # the processor's time: other programs may need it, too
            hangs = busy - busy_before > HANG or time.monotonic() - began > WAITS * HANG
            if start and hangs:
                self.add(number, f"no end in {HANG} s", "")
            if start and hangs or time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                return os.waitpid(process, 0)[1]
            time.sleep(0.01)

    def add(self, number, reason, trace):
        self.counts["find"] += 1
        self.finds.setdefault(reason, []).append((number, trace))

    def write_finds(self, folder):
        """Write each cause's first cases: their files, the traceback, and how to run them again."""
        for k, (reason, cases) in enumerate(self.finds.items()):
            for number, trace in cases[:KEPT]:
                files, words = make_case(self.kind, self.name, self.seed, number)
                place = folder / f"{self.name}-{k}-{self.seed}-{number}"
                for name, data in files.items():
                    path = place / "input" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                again = f"python -m tests.fuzz --only {self.name} --seed {self.seed} --at {number}"
                place.mkdir(parents=True, exist_ok=True)
                (place / "find.txt").write_text(
                    f"{again}\n{words or ''}\n{reason} ({len(cases)} times)\n\n{trace}",
                    errors="backslashreplace",
                )


def processor_seconds(process):
    """Return the time that a process has computed."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# All kinds


def make_kinds(names):
    """Return {name: `Kind`}; a run is trained, in a process of its own, if a kind needs one."""
    import matplotlib.font_manager  # noqa: F401  its list of fonts is written once, before processes are watched

    run = None
    if set(names) & set(OF_A_RUN):
        run = in_child(trained)
    return {name: KINDS[name](run) if name in OF_A_RUN else KINDS[name]() for name in names}


def in_child(make):
    """Return what a function returns in a child process: threads that it starts do not outlive a fork."""
    import pickle

    with tempfile.NamedTemporaryFile() as file:
        process = os.fork()
        if not process:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                torch.set_num_threads(1)
                Path(file.name).write_bytes(pickle.dumps(make()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        if os.waitpid(process, 0)[1]:
            raise RuntimeError("the run that is mutated could not be made")
        return pickle.loads(Path(file.name).read_bytes())


HEAD = (
    f"{'kind':20}{'inputs':>9}{'results':>9}{'refused':>9}{'stopped':>9}{'finds':>7}{'s':>8}{'inputs/s':>10}"
)


def table_row(name, row):
    """Return a line of the table below `HEAD`."""
    keys = ("inputs", *OUTCOMES)
    rate = row["inputs"] / max(row["seconds"], 1e-3)
    cells = "".join(f"{row.get(key, 0):9}" for key in keys)
    return f"{name:20}{cells}{row.get('find', 0):7}{row['seconds']:8.1f}{rate:10.0f}"


def show(kind, name, seed, number):
    """Run one case in this process, so that its traceback is seen."""
    case = make_case(kind, name, seed, number)
    print(f"{name} {seed} {number}: {case[1] or ''} {sorted(case[0])[:9]}")
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        root = new_root(folder)
        signal.signal(signal.SIGALRM, stop)
        here = os.getcwd()
        try:
            print(run_case(kind, case, root))
        finally:
            os.chdir(here)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="for all kinds together")
    parser.add_argument("--count", type=int, default=10**9, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(KINDS),
        metavar="KIND",
        default=list(KINDS),
        help="of " + ", ".join(KINDS),
    )
    parser.add_argument("--at", type=int, help="run this case alone, of the first kind of --only")
    parser.add_argument(
        "--out",
        default=Path(tempfile.gettempdir(), "fuzz-finds"),
        help="folder of the finds (default %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.minutes is None and args.count == 10**9 and args.at is None:
        parser.error("give --minutes, --count or --at")
    torch.set_num_threads(1)
    names = [name for name in args.only if all(map(find_spec, NEEDS.get(name, ())))]
    if len(names) < len(args.only):
        print(f"left out, as packages are missing: {', '.join(set(args.only) - set(names))}")
    kinds = make_kinds(names)
    if args.at is not None:
        return show(kinds[args.only[0]], args.only[0], args.seed, args.at)
    seconds = 60 * args.minutes / len(kinds) if args.minutes else 1e9
    total = Counter()
    print(HEAD)
    for name, kind in kinds.items():
        watch = Watch(name, kind, args.seed)
        watch.run(args.count, seconds)
        watch.write_finds(Path(args.out))
        row = Counter(watch.counts, inputs=watch.counts.total(), seconds=watch.seconds)
        print(table_row(name, row), flush=True)
        for reason, cases in watch.finds.items():
            print(f"  FIND {cases[0][0]} ({len(cases)} times): {reason}", flush=True)
        total.update(row)
    print(table_row("all", total))
    return int(total["find"] > 0)


if __name__ == "__main__":
    sys.exit(main())
