"""Commands in forks of a process that has tinyfusion imported, killed before they change the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# forks for every command of a line of its input, all at once. A child with a text kills itself before its Nth call of Python that
# changes the disk at a path with that text in it; what it did until then is on the disk, as after any kill
_PROGRAM = """
import json, os, signal, sys
import torch, tinyfusion.cli
import diffusers, transformers
torch.set_num_threads(1)  # no pool of threads, which a fork would lose
answers = os.dup(1)
os.dup2(2, 1)
for arguments in json.loads(sys.argv[1]):  # once here: what is imported late is there afterwards
    assert tinyfusion.cli.main(arguments) == 0
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.copyfile", "os.truncate", "os.chmod"}
def run(arguments, environment, text, limit, answer):
    calls = 0
    def counted(event, given):
        nonlocal calls
        if not text or event not in EVENTS or not any(text in os.fsdecode(each) for each in given if isinstance(each, (str, bytes, os.PathLike))):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(counted)
    os.environ.update(environment)
    code = tinyfusion.cli.main(arguments)
    os.write(answer, str(calls).encode())
    os._exit(code)
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                run(*job, write)
            finally:
                os._exit(99)
        os.close(write)
        children.append((child, read))
    said = [(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.read(read, 100).decode(), os.close(read)) for child, read in children]
    os.write(answers, (json.dumps([(code, int(calls or 0)) for code, calls, _ in said]) + "\\n").encode())
"""  # noqa: E501
Job = tuple[list[str], dict[str, str], str, int]
Forks = Callable[..., list[list[int]]]


@contextmanager
def forks(folder: Path, once: list[list[str]]) -> Iterator[Forks]:
    """Runs jobs (arguments, environment, text, N; N = 0: not killed) at once: exit code and number of such calls of each.

    once: commands that import what all need.
    """
    command = [sys.executable, "-c", _PROGRAM, json.dumps(once)]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        source, sink = process.stdout, process.stdin

        def run(*jobs: Job) -> list[list[int]]:
            sink.write(json.dumps(jobs) + "\n")
            sink.flush()
            answer: list[list[int]] = json.loads(source.readline())
            return answer

        assert run() == []  # those that run once are done
        yield run
        sink.close()
