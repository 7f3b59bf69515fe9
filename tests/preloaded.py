"""fairseq's commands from a process that has imported PyTorch and fairseq once: many short runs in little time.

Each run is a fork that executes the command's script with its own arguments, as Python itself would: the script is
``__main__``, what it raises goes to ``sys.excepthook``. The plugin is imported in the fork, by ``--user-dir``.
"""

import json
import subprocess
import sys

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
    child = os.fork()
    if not child:
        execute(**request)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Preloaded:
    def __init__(self, folder):
        self.folder = folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment(), text=True, **pipes)

    def run(self, command, *args, cwd=REPO):
        program = ["-m", command[3:]] if command.startswith("-m ") else [str(BIN / command)]
        files = {name: str(self.folder / name) for name in ("out", "err")}
        request = {"argv": [*program, *map(str, args)], "cwd": str(cwd), **files}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return Result(code, *((self.folder / name).read_text() for name in ("out", "err")))

    def close(self):
        self.process.stdin.close()
        self.process.wait()
