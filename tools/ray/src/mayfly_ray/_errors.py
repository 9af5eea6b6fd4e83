"""What can fail, as exceptions that keep their members through pickle and through Ray.

Ray sends an exception of a task by pickle and raises it at ``ray.get`` as an instance of both ``RayTaskError`` and its
own class. So all that an exception holds is in ``args``, and no member is a property of the class.
"""

from typing import Optional


class MicroVMError(Exception):
    """The base of all errors of this package.

    Attributes:
        message: what failed, on what, and why.
        ended: the word of the exit report for how the microVM ended (docs/reference.md), "" without a report.
        exit_code: the exit code of ``mayfly-jailer``, None where there is none.
        stdout: standard output so far; of a kernel, its console.
        stderr: standard error so far, with the messages of ``mayfly-jailer``.
    """

    def __init__(
        self,
        message: str,
        ended: str = "",
        exit_code: Optional[int] = None,
        stdout: bytes = b"",
        stderr: bytes = b"",
    ) -> None:
        super().__init__(message, ended, exit_code, stdout, stderr)
        self.message = message
        self.ended = ended
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr

    def __str__(self) -> str:
        return self.message


class NotStarted(MicroVMError):
    """The microVM, or a command in a running one, was not started: a wrong option, a file that is missing, no KVM."""


class TimedOut(MicroVMError):
    """The time limit was reached, and what had it was ended."""


class GuestEnded(MicroVMError):
    """The guest ended before its work did: a crash, a panic of its kernel, a memory limit, a signal from outside."""


class CommandFailed(MicroVMError):
    """A command or a kernel ended with another exit code than 0 (:meth:`Result.check`)."""


class CopyFailed(MicroVMError):
    """Not all files were copied."""


def printable(text: bytes, limit: int = 2000) -> str:
    """The last ``limit`` bytes of what a guest wrote, in one line and without control characters."""
    decoded = text[-limit:].decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else " " if c in "\r\n\t" else "?" for c in decoded)
