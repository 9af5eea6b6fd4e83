"""Waiting in the tests beside this file."""

import time


def wait_until(holds, what, patience):
    """What ``holds`` gives once that is true; ``patience`` seconds at most."""
    deadline = time.monotonic() + patience
    while not (value := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still waiting for: {what}")
        time.sleep(0.02)
    return value
