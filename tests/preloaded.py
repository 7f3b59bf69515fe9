"""fairseq's commands from a process that has imported PyTorch and fairseq once: many short runs in little time.

Each run is a fork that executes the command's script with its own arguments, as Python itself would: the script is
``__main__``, what it raises goes to ``sys.excepthook``. The plugin is imported in the fork, by ``--user-dir``.
"""

import json
import subprocess
import sys

from fairseq_hyperrouter.launch import free_port, worker_options
from tests.commands import BIN, REPO, Result, environment

SERVER = r"""
import json, os, runpy, sys, traceback
import fairseq_cli.eval_lm, fairseq_cli.train  # noqa: F401

def execute(argv, cwd, out, err):
    for path, fd in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.argv = argv
    code = 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
        continue
    child = os.fork()
    if not child:
        execute(**request)
    print(child, flush=True)
"""


class Preloaded:
    def __init__(self, folder):
        self.folder = folder
        self.started = 0
        self.files = {}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment(), text=True, **pipes)

    def run(self, command, *args, cwd=REPO):
        return self.wait(self.start(command, *args, cwd=cwd))

    def start(self, command, *args, cwd=REPO):
        """Start a command and return its process number."""
        program = ["-m", command[3:]] if command.startswith("-m ") else [str(BIN / command)]
        self.started += 1
        files = {name: self.folder / f"{self.started}.{name}" for name in ("out", "err")}
        for file in files.values():
            file.touch()  # log() may read it before the command has begun
        paths = {name: str(file) for name, file in files.items()}
        process = self._ask({"argv": [*program, *map(str, args)], "cwd": str(cwd), **paths})
        self.files[process] = list(files.values())
        return process

    def log(self, process):
        """What a command has printed so far."""
        return "".join(file.read_text() for file in self.files[process])

    def wait(self, process):
        """Its Result, at its end."""
        code = self._ask(process)
        return Result(code, *(file.read_text() for file in self.files.pop(process)))

    def run_workers(self, workers, command, *args):
        """The Results of a command on *workers* CPU workers; all must end well."""
        results = [self.wait(process) for process in self.start_workers(workers, command, *args)]
        for rank, result in enumerate(results):
            assert result.code == 0, f"worker {rank} of {workers}: {result.code}\n{result.log[-6000:]}"
        return results

    def start_workers(self, workers, command, *args):
        """The process numbers of a command on *workers* CPU workers, as ``fairseq-hyperrouter launch`` starts them."""
        if workers == 1:
            return [self.start(command, *args)]
        options = worker_options(workers, free_port())
        return [self.start(command, *options, "--distributed-rank", rank, *args) for rank in range(workers)]

    def _ask(self, request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
