"""The processes of a distributed run on one machine: started together, ended together."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

GRACE = 5.0  # seconds that a process has between being asked to end and being killed


class RunFailedError(RuntimeError):
    """A process failed, or the time was up."""


def run_together(
    commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]], timeout: float
) -> None:
    """Runs the commands side by side until all are done.

    Raises:
        RunFailedError: as soon as one fails, or when `timeout` seconds are over. Then, too, no
            process is left.
    """
    started: list[subprocess.Popen] = []
    try:
        for command, env in zip(commands, envs, strict=True):
            # A pipe that nobody writes to: it closes when this process ends, however it ends.
            started.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE))
        wait(started, timeout)
    finally:
        end(started)


def wait(started: Sequence[subprocess.Popen], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while running := [process for process in started if process.poll() is None]:
        check(started)
        if time.monotonic() > deadline:
            raise RunFailedError(f"{len(running)} processes still ran after {timeout:g} seconds.")
        time.sleep(0.1)
    check(started)


def check(started: Sequence[subprocess.Popen]) -> None:
    for i, process in enumerate(started):
        if process.returncode:
            how = (
                f"was ended by signal {-process.returncode}"
                if process.returncode < 0
                else f"failed with status {process.returncode}"
            )
            raise RunFailedError(f"process {i} of {len(started)} {how}; the others were stopped.")


def end(started: Sequence[subprocess.Popen]) -> None:
    """Asks what still runs to end, then kills it."""
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin:
            process.stdin.close()


def end_with_parent() -> None:
    """Ends this process once the one that started it by `run_together` is gone."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read, which holds a lock at exit
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def free_address() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"
