"""Two processes of four devices train as one device does; when one fails, none is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import multi_process
import numpy as np
import pytest
from minilm.processes import RunFailedError, run_together

import lorax_fn as lora

EXAMPLES = Path(multi_process.__file__).parent
QUICK = ["--limit=400", "--batch=16", "--length=8", "--steps=3", "--lr=0.01", "--timeout=500"]


def test_two_processes_learn_as_one_device_does(tmp_path, monkeypatch, capfd):
    """And write a checkpoint together, from which one process alone resumes."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    results = multi_process.main([*QUICK, "--check", f"--checkpoints={tmp_path}"])
    assert len(results["losses"]) == 3
    assert np.ptp(results["losses"]) > 0.05
    assert results["difference"] < 1e-4
    assert "8 devices; 90,301,544 bytes are frozen" in capfd.readouterr().out

    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    job = multi_process.prepare(multi_process.parse(QUICK))
    state = job.tx.init(job.factors)
    factors, _, done = lora.restore_checkpoint(tmp_path, job.factors, state)
    resumed = multi_process.report(job, factors, [])
    assert done == 3
    assert resumed["test"] == results["test"]


def script(text):
    return [sys.executable, "-c", text]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # a dead child that nobody has waited for is no process
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def written(path):
    """The number in a file, once it is there."""
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


SLEEPS = (
    "import os, pathlib, time; pathlib.Path({!r}).write_text(str(os.getpid())); time.sleep(600)"
)


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ("import sys; sys.exit(3)", r"process 1 of 2 failed with status 3"),
        ("import os; os.kill(os.getpid(), 9)", r"process 1 of 2 was ended by signal 9"),
    ],
)
def test_when_one_fails_the_others_are_ended(tmp_path, ends, says):
    file = str(tmp_path / "pid")
    waits = f"import pathlib, time\nwhile not pathlib.Path({file!r}).exists(): time.sleep(0.05)\n"
    begin = time.monotonic()
    with pytest.raises(RunFailedError, match=says):
        run_together([script(SLEEPS.format(file)), script(waits + ends)], [os.environ] * 2, 120)
    assert time.monotonic() - begin < 60
    assert not is_alive(written(tmp_path / "pid"))


def test_time_is_bounded_even_for_a_process_that_will_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr("minilm.processes.GRACE", 0.5)
    file = str(tmp_path / "pid")
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    with pytest.raises(RunFailedError, match=r"1 processes still ran after 5 seconds"):
        run_together([script(stubborn + SLEEPS.format(file))], [os.environ], 5)
    assert not is_alive(written(tmp_path / "pid"))


def test_no_orphan_is_left_when_the_parent_is_killed(tmp_path):
    file = str(tmp_path / "pid")
    child = (
        f"from minilm.processes import end_with_parent; end_with_parent(); {SLEEPS.format(file)}"
    )
    parent = (
        "import os, sys; from minilm.processes import run_together; "
        f"run_together([[sys.executable, '-c', {child!r}]], [os.environ], 600)"
    )
    env = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    with subprocess.Popen(script(parent), env=env) as process:
        pid = written(tmp_path / "pid")
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
