"""Real processes that start at once: forks of one that has imported torch and the programs.

A process of its own would import torch for three seconds before the first step.
"""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = """
import ctypes, json, os, resource, runpy, signal, sys
sys.path.insert(0, os.getcwd())
import show
import matplotlib.figure
import torch
import checkpoints, fit, pretrain, runs, train, transfer
torch.set_num_threads(1)  # as conftest.py
fit.make_optimizer(torch.nn.Linear(1, 1), fit.Recipe(steps=1, lr=1.0))  # torch imports more

def die_in_write(number):
    # The write of this number ends in the middle, and the process with it.
    left, original = [number], checkpoints.save_file
    def save_file(tensors, path, **more):
        original(tensors, path, **more)
        left[0] -= 1
        if left[0] < 0:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save_file = runs.save_file = save_file

def child(job):
    log = os.open(job["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, to in enumerate((os.open(os.devnull, 0), os.open(os.devnull, 1), log)):
        os.dup2(to, number)
    if job["dies_in"] is not None:
        die_in_write(job["dies_in"])
    if job["bytes"]:  # no file may become larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["bytes"], job["bytes"]))
    if job["unprivileged"]:  # root may write where nobody may
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert not ctypes.CDLL(None).capset(header, none)
    os.environ.update(job["environment"])
    sys.argv = job["line"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        try:
            status = child(job)
        except KeyboardInterrupt:  # before the program begins
            sys.stderr.write("interrupted\\n")
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


EACH = """
import json, os, sys, traceback
import torch
for folder, code in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        log = os.open(f"{folder}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)  # from which modules are imported
        status = 0
        try:
            exec(code, {"__name__": "__main__"})
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def run_in_folders(codes: dict[Path, str]) -> dict[Path, tuple[int, str]]:
    """Run code in folders that exist, each in a process of its own: {folder: (status, output)}."""
    call = [sys.executable, "-E", "-c", EACH]
    given = json.dumps([[str(folder), code] for folder, code in codes.items()])
    cwd = next(iter(codes))
    result = subprocess.run(call, input=given, cwd=cwd, check=True, capture_output=True, text=True)
    statuses = [int(word) for word in result.stdout.split()]
    outputs = [Path(f"{folder}.txt").read_text() for folder in codes]
    return dict(zip(codes, zip(statuses, outputs)))


class Process:
    """One fork. `end` gives its status, negative if a signal ended it, and its standard error."""

    def __init__(self, server, pid: int, errors: Path):
        self.server, self.pid, self.errors, self.started = server, pid, errors, time.monotonic()

    def running(self) -> bool:
        status = Path(f"/proc/{self.pid}/stat")
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"

    def end(self) -> tuple[int, str]:
        status = int(self.server.stdout.readline())
        return status, self.errors.read_text()


class Forks:
    """start(line) -> Process. One at a time: `end` it before the next one starts."""

    def __init__(self, server, folder: Path):
        self.server, self.folder = server, folder

    def start(self, line: list[str], dies_in=None, bytes=0, unprivileged=False, environment=None):
        errors = self.folder / "errors.txt"
        job = {"line": [*map(str, line)], "errors": str(errors), "dies_in": dies_in}
        job |= {"bytes": bytes, "unprivileged": unprivileged}
        job["environment"] = environment or {}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Process(self.server, int(self.server.stdout.readline()), errors)


@contextmanager
def forks(folder: Path):
    pipe = subprocess.PIPE
    call = [sys.executable, "-c", SERVER]
    with subprocess.Popen(call, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        yield Forks(server, folder)
        server.stdin.close()
