"""Another thread that is inside a block, and a forked child."""

import os
import signal
import threading
import traceback
import warnings

import pytest

from bidirect_patch import bidirectional

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


class InBlock(threading.Thread):
    """Holds `with bidirectional(model, enabled, ...)` open in a thread of its own until the end of its own block."""

    def __init__(self, model, enabled, **sinks):
        super().__init__(daemon=True)
        self.entered, self.leave, self.error = threading.Event(), threading.Event(), None

        def run():
            try:
                with bidirectional(model, enabled=enabled, **sinks):
                    self.entered.set()
                    self.leave.wait(20)
            except BaseException as error:
                self.error = error
                self.entered.set()

        self.run = run

    def __enter__(self):
        self.start()
        assert self.entered.wait(20) and self.error is None
        return self

    def __exit__(self, *_):
        self.leave.set()
        self.join(20)
        assert not self.is_alive() and self.error is None


def works_in_a_fork(work):
    """Whether `work` ends without an error in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is the point
        child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
