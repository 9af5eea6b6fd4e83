"""What came out of a command or a kernel."""

from dataclasses import dataclass

from ._errors import CommandFailed, printable


@dataclass(frozen=True)
class Result:
    """The end of a command or of a kernel that ended by itself.

    Attributes:
        exit_code: 0 to 255; 126 and 127 as of a shell; 128 and the signal's number if a signal ended the command.
        stdout: the first ``max_output`` bytes of standard output; of a kernel, of its console.
        stderr: the same of standard error; of a kernel, the messages of ``mayfly-jailer``.
        ended: the word of the exit report (``exited``, ``reset``, ``shutdown``), ``exited`` of :meth:`MicroVM.run`.
        dropped: number of bytes of output beyond ``max_output``, which were read and not kept.
        seconds: from the start of the process to its end.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    ended: str
    dropped: int
    seconds: float

    def check(self) -> "Result":
        """This result if the exit code is 0.

        Raises:
            CommandFailed: it is another one.
        """
        if self.exit_code == 0:
            return self
        message = f"ended with exit code {self.exit_code}"
        last = printable(self.stderr) or printable(self.stdout)
        if last:
            message += f"; the last output: {last}"
        raise CommandFailed(message, self.ended, self.exit_code, self.stdout, self.stderr)
