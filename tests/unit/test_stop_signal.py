"""Waiting for a signal: none is missed, whenever it comes."""

from __future__ import annotations

import subprocess
import sys

from tests.support.server import ROOT

# In a process of its own, whose main thread may have its signals taken. Each round a thread sends SIGTERM within some
# microseconds of the moment at which the main thread begins to wait; a signal that is missed is a wait without end.
SCRIPT = """
import os, random, signal, threading, time
from service.server import StopSignal

def send(delay):
    end = time.perf_counter() + delay
    while time.perf_counter() < end:
        pass
    os.kill(os.getpid(), signal.SIGTERM)

random.seed(1)
for _ in range(3000):
    stop = StopSignal()
    thread = threading.Thread(target=send, args=(random.random() * 60e-6,))
    thread.start()
    stop.wait()
    assert stop.is_set()
    stop.wait()  # at once
    thread.join()
    signal.set_wakeup_fd(-1)
    os.close(stop._read)
    os.close(stop._write)
print("done")
"""


def test_no_signal_is_missed() -> None:
    """Three thousand times."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


# The interpreter's handler runs only when a system call returns. This one stands for the moment before it begins: the
# signal has come, and the handler has not run.
BETWEEN = """
import os, signal, threading
from service.server import StopSignal

stop = StopSignal()
# A signal that another thread of the process receives does not interrupt the main thread's call.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

def other():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    ready.set()
    done.wait()

ready, done = threading.Event(), threading.Event()
thread = threading.Thread(target=other, daemon=True)
thread.start()
ready.wait()
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
stop.wait()
print("done")
done.set()
"""


def test_a_signal_that_does_not_interrupt_the_wait() -> None:
    """The wait ends all the same: the byte in the pipe does not depend on the handler."""
    done = subprocess.run([sys.executable, "-c", BETWEEN], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.stdout == "done\n", done.stderr
