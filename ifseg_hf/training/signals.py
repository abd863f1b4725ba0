"""Ctrl-C and SIGTERM, recorded so that training can stop after a complete step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stop_signals"]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Records the numbers of SIGINT and SIGTERM in a list instead of ending the process.

    The same signal again, more than two seconds later, raises `KeyboardInterrupt`.
    """
    received: list[int] = []
    first_times: dict[int, float] = {}
    process = os.getpid()

    def receive(number, frame):
        # Launchers forward a Ctrl-C that the terminal has sent to every process already: a repetition within two
        # seconds is no second request.
        if number in first_times and time.monotonic() - first_times[number] > 2:
            raise KeyboardInterrupt
        first_times.setdefault(number, time.monotonic())
        received.append(number)
        if len(received) == 1 and os.getpid() == process:  # loader workers inherit this handler
            # os.write, because the signal may have interrupted a print.
            os.write(2, b"\nStopping after this step. The same signal again stops immediately.\n")

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python allows signal handlers in the main thread only
        return
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
