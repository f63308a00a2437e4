"""Processes of their own, in which nothing of transformers, PEFT or this package is imported yet.

They are forks of a server that has imported what these need, torch above all, which takes most of the time. So a fork isn't
all that a new interpreter is: what IMPORTED names is there already, a variable that these read when they are imported has the
value that it had at the first fork, and before Python 3.13 nothing runs at exit. What depends on that needs `subprocess`.
"""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from pathlib import Path

from .paths import ROOT

IMPORTED = (
    *("torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("pandas", "pyarrow.dataset", "scipy.optimize", "scipy.stats", "sklearn.metrics", "tokenizers"),
)
OF_TRAINING = ("accelerate", "datasets", "peft", "transformers.models.llama.modeling_llama", "transformers.trainer")
TO_END = 15  # seconds for a process to end its own

_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(list(IMPORTED))


class Fork:
    """A running process, with as much of the interface of `subprocess.Popen` as tests need.

    Args:
        words: What `python` would be given: `-c CODE ARGUMENT ...`, `-m MODULE ARGUMENT ...`, or `FILE ARGUMENT ...`.
        cwd: Where it runs.
        environment: Variables that it has beside those of this process.
    """

    def __init__(self, *words, cwd=ROOT, **environment):
        self._written = [tempfile.NamedTemporaryFile(mode="w+") for _ in range(2)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        files = [file.name for file in self._written]
        self._process = _servers.Process(target=_run, args=([*map(str, words)], str(cwd), environment, files))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """What it wrote to stdout and to stderr, once it has ended."""
        self._process.join(timeout)
        written = [file.read() for file in self._written]
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a fork", timeout, *written)
        return tuple(written)


def _run(words, cwd, environment, written):
    """What a fork does."""
    os.setsid()
    for number, file in zip((1, 2), written):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _work(words)


def _work(words):
    """What `python WORDS` does."""
    if words[0] != "-m":  # tests look at the warnings of a command
        warnings.simplefilter("ignore")
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def finish(process, seconds):
    """Wait for a process that began a session of its own; what it wrote to stdout and stderr.

    Whatever is left of it after `seconds` is ended, so that a failed test leaves nothing running.
    """
    try:
        return process.communicate(timeout=seconds)
    finally:
        end(process)


def end(process):
    """End a process and its own, if it still runs."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=TO_END)


def in_a_new_process(*words, seconds=200, **how):
    """What `python WORDS` writes to stdout, in a fork. A failed one fails the test."""
    process = Fork(*words, **how)
    out, err = finish(process, seconds)
    assert process.returncode == 0, err[-5000:]
    return out


RANKS = """
import sys
from tests.helpers.processes import be_two_ranks
be_two_ranks(sys.argv[1], sys.argv[2:])
"""


def in_two_ranks(*words, seconds=250, **environment):
    """What the ranks of `torchrun --nproc_per_node=2 WORDS` write to stdout, each in a fork. A failed one fails the test."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(chosen.getsockname()[1])}
    world = {**environment, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **meeting}
    with tempfile.TemporaryDirectory() as folder:
        launcher = Fork("-c", RANKS, folder, *words, **world)
        _, err = finish(launcher, seconds)
        assert launcher.returncode == 0, err + "".join(path.read_text()[-5000:] for path in Path(folder).glob("*.err"))
        return [Path(folder, rank).read_text() for rank in "01"]


def be_two_ranks(folder, words):
    """Import what both need, once, and go on as two ranks, each of which writes into files of its own."""
    for name in OF_TRAINING:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    ranks = {}
    for rank in "01":
        pid = os.fork()
        if pid:
            ranks[pid] = rank
            continue
        code = 1
        try:
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            for number, ending in ((1, ""), (2, ".err")):
                os.dup2(os.open(f"{folder}/{rank}{ending}", os.O_WRONLY | os.O_CREAT), number)
            _work(words)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        if status:  # the other one would wait for it without end
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
