"""Programs that serve a page on loopback."""

import queue
import socket
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(command: list[str], environment: dict, address: str, cwd: Path = ROOT) -> subprocess.Popen:
    """Starts a program and returns when it has printed an address; `printed` has what it printed until then."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
    )
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    printed, deadline = "", time.monotonic() + 300
    while address not in printed:
        assert process.poll() is None or not lines.empty(), printed
        assert time.monotonic() < deadline, printed
        try:
            printed += lines.get(timeout=1)
        except queue.Empty:
            continue
    process.printed = printed
    return process
