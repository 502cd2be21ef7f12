"""Commands and training runs in processes of their own, forked from a server that has imported LLaMA-Factory.

A new interpreter takes ten seconds of imports for each command; a fork takes a tenth of one. That the installed commands
start from nothing too is tested once for each of them, in test_cli.py.
"""

import contextlib
import http.server
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["llamafactory.train.tuner", "llamafactory.chat.chat_model", "llamafactory_video.tools.cli"]
)
BIN = Path(sys.executable).parent


def _begin(env: dict[str, str], log: str, errors: str, stdin: str = os.devnull) -> None:
    os.setpgrp()
    os.environ.update(env)
    for path, mode, number in ((stdin, os.O_RDONLY, 0), (log, _APPEND, 1), (errors, _APPEND, 2)):
        os.dup2(os.open(path, mode, 0o644), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - multiprocessing has closed the other
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers that read clips, as it is outside the tests


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def _call(words: list[str], env: dict[str, str], folder: str) -> None:
    _begin(env, f"{folder}/out", f"{folder}/err", f"{folder}/in")
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
        return
    sys.argv = [str(BIN / words[0]), *words[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")  # the script that pip installed, up to its exit status


def run_anew(*command: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
    """In an interpreter that has imported nothing, as a person starts it."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **env}
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def run(*words: str, stdin: str = "", **env: str) -> SimpleNamespace:
    """Run an installed command, or `-c` and Python code, to its end; as `subprocess.run` does."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").write_text(stdin, encoding="utf-8")
        process = SERVER.Process(target=_call, args=(list(words), env, folder))
        process.start()
        process.join(300)
        assert process.exitcode is not None, f"{words} hang"
        out, err = (Path(folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


@contextlib.contextmanager
def serving(*words: str, **env: str) -> Iterator[BaseProcess]:
    """The process of a command as `run` starts it, which goes on until it is no longer wanted."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").touch()
        process = SERVER.Process(target=_call, args=(list(words), env, folder))
        process.start()
        process.folder = folder  # of its output, in out and err
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            sys.stdout.write(Path(folder, "out").read_text(encoding="utf-8", errors="replace"))
            sys.stderr.write(Path(folder, "err").read_text(encoding="utf-8", errors="replace"))


def _train(keys: dict, env: dict[str, str], largest_file: int | None) -> None:
    log = f"{keys['output_dir']}.{env.get('RANK', 0)}.log"
    _begin(env, log, log)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))  # as on a full disk
    from llamafactory.train.tuner import run_exp

    run_exp(keys)


class JsonHandler(http.server.BaseHTTPRequestHandler):
    """Of a server in a test, which answers with JSON."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, value: object, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Run:
    """The processes of one start of a training run.

    Args:
        count: how many; more than one train together, as torchrun would start them.
        largest_file: bytes; writing more fails.
        own_env: variables of the environment.
    """

    def __init__(
        self,
        keys: dict,
        output: Path,
        count: int = 1,
        largest_file: int | None = None,
        own_env: dict[str, str] | None = None,
        **overrides,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        keys = {**keys, "output_dir": str(output), **overrides}
        self.logs = [Path(f"{output}.{rank}.log") for rank in range(count)]
        self.processes = []
        for rank in range(count):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            env |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            arguments = keys, {**(env if count > 1 else {}), **(own_env or {})}, largest_file
            self.processes.append(SERVER.Process(target=_train, args=arguments))
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.end()

    def end(self) -> list[int]:
        """Wait for it; the exit statuses."""
        for process in self.processes:
            process.join(240)
            assert process.exitcode is not None, "a process hangs"
        return [process.exitcode for process in self.processes]

    def log(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Until it holds or the run has ended; looks a thousand times a second."""
        while self.alive():
            if condition():
                return True
            time.sleep(0.001)
        return False
