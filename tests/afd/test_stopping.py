"""Stop signals in a process of its own: caught, enforced while the main thread is stuck, kept from workers."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afd.stopping import MARKER, OVERDUE, write_marker

ROOT = Path(__file__).parents[2]
HEAD = """
import os, signal, sys, time
from pathlib import Path
from afd.stopping import *
stop = catch_stop_signals()
assert catch_stop_signals() is stop
"""


def start(body: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HEAD + body, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(body: str, *arguments: str) -> tuple[int, str, str]:
    process = start(body, *arguments)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_signal_only_sets_the_flag_and_the_first_one_is_remembered(name: str) -> None:
    code, out, err = run(f"""
assert not stop.is_requested
os.kill(os.getpid(), signal.{name})
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
print(stop.is_requested, stop.signal_name)
stop.disarm()
sys.exit(75)
""")
    assert (code, out.split(), err) == (75, ["True", name], "")


def test_importing_it_loads_no_slow_library() -> None:
    code, out, _ = run("print([name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules])")
    assert (code, out.strip()) == (0, "[]")


def test_overdue_process_dumps_its_stacks_and_ends_though_its_main_thread_is_stuck(tmp_path: Path) -> None:
    # A C call that does not return, like a collective's, keeps Python's handler from running.
    body = """
import ctypes
stop.grace_s = 0.5
stop.output_dir = Path(sys.argv[1])
def stuck_in_a_collective():
    for _ in range(3):  # a signal cuts one call short
        ctypes.CDLL(None).sleep(60)
stuck_in_a_collective()
"""
    started = time.monotonic()
    process = start(body, str(tmp_path))
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR2)
    _, err = process.communicate(timeout=30)
    assert process.returncode == OVERDUE
    assert time.monotonic() - started < 20
    assert "SIGUSR2: no commit within 0.5 s, giving up; the stacks:" in err
    assert "in stuck_in_a_collective" in err
    marker = json.loads((tmp_path / MARKER).read_text())
    assert (marker["exit_code"], marker["signal"], marker["step"]) == (OVERDUE, "SIGUSR2", None)


def test_a_run_that_ends_within_the_grace_time_keeps_its_own_exit_code() -> None:
    code, _, err = run("""
stop.grace_s = 0.3
os.kill(os.getpid(), signal.SIGTERM)
stop.disarm()
time.sleep(0.8)
sys.exit(3)
""")
    assert (code, err) == (3, "")


def test_forked_and_spawned_workers_ignore_the_signals() -> None:
    code, out, err = run("""
import multiprocessing
def survive(queue):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    queue.put("alive")
queue = multiprocessing.get_context("fork").Queue()
worker = multiprocessing.get_context("fork").Process(target=survive, args=(queue,))
worker.start()
print(queue.get(timeout=10))
worker.join()
time.sleep(0.2)
print(worker.exitcode, stop.is_requested)
""")
    assert (code, out.split()) == (0, ["alive", "0", "False"]), err
    ignoring = "from afd.stopping import ignore_stop_signals as f; f(); import os, signal; "
    kill = "[os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGUSR2)]; print('alive')"
    done = subprocess.run([sys.executable, "-c", ignoring + kill], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"


def test_shared_memory_survives_a_signal_to_every_process() -> None:
    code, out, err = run("""
import psutil
from multiprocessing import resource_tracker, shared_memory
for child in psutil.Process().children():
    child.send_signal(signal.SIGUSR2)
    child.send_signal(signal.SIGTERM)
time.sleep(0.2)
memory = shared_memory.SharedMemory(create=True, size=16)
memory.close()
memory.unlink()
print(len(psutil.Process().children()))
""")
    assert (code, out.strip(), err) == (0, "1", "")


def test_watchdog_dumps_stacks_of_a_step_that_does_not_end() -> None:
    code, _, err = run("""
watchdog = Watchdog(0.2)
def slow_step():
    time.sleep(0.5)
watchdog.step()
slow_step()
watchdog.stop()
Watchdog(0.0).step()
time.sleep(0.3)
""")
    assert code == 0
    assert "Timeout (0:00:00.200000)!" in err
    assert "in slow_step" in err


def test_marker_is_replaced_whole(tmp_path: Path) -> None:
    write_marker(tmp_path, exit_code=75, signal_name="SIGTERM", step=3)
    write_marker(tmp_path, exit_code=75, signal_name="SIGTERM", step=4)
    assert [entry.name for entry in tmp_path.iterdir()] == [MARKER]
    assert json.loads((tmp_path / MARKER).read_text())["step"] == 4
