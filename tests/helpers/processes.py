"""Waiting for a process that has processes of its own."""

import os
import signal
import subprocess

TO_END = 15  # seconds for a launcher to end its ranks, which are sessions of their own


def finish(process: subprocess.Popen, seconds: float) -> tuple[str, str]:
    """Wait for a process that began a session of its own; what it wrote to stdout and stderr.

    Whatever is left of it after `seconds` is ended, so that a failed test leaves nothing running.
    """
    try:
        return process.communicate(timeout=seconds)
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, how)
                try:
                    process.communicate(timeout=TO_END)
                except subprocess.TimeoutExpired:
                    continue
