"""Commands and kernels in microVMs, from Ray tasks.

Each microVM is one process of ``mayfly-jailer run``, a child of the calling process, and ends with the call, with
the ``with`` block, or with the calling process, whichever ends first::

    @ray.remote(resources={"microvm": 1})
    def job(n):
        machine = mayfly_ray.Machine(kernel="/srv/vmlinux", uid=1000, gid=1000)
        result = mayfly_ray.run(machine, ["/bin/sh", "-c", f"echo {n}"], image="/srv/root.erofs", timeout=60)
        return result.check().stdout

Nothing here imports Ray.
"""

from ._errors import CommandFailed, CopyFailed, GuestEnded, MicroVMError, NotStarted, TimedOut
from ._machine import Machine
from ._microvm import MicroVM, run, run_kernel
from ._result import Result

__all__ = [
    "CommandFailed",
    "CopyFailed",
    "GuestEnded",
    "Machine",
    "MicroVM",
    "MicroVMError",
    "NotStarted",
    "Result",
    "TimedOut",
    "run",
    "run_kernel",
]
__version__ = "0.1.0"
