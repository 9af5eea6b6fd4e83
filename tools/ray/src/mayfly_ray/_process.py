"""One process of ``mayfly-jailer``, and the guarantee that it ends.

What ends it, whatever happens to the caller:

- A pair of sockets (the lease) of which this process holds one. Its hang-up ends the microVM (``--end-with-fd``): by
  :meth:`Process.stop`, when the object is freed, when the interpreter ends, when this process is killed. It is made
  before the child, so that an exception between the start of the child and its assignment leaves nothing behind. It is
  shut down, not only closed: a process that was forked from this one has a copy of it.
- ``--with-parent``: where this process is killed, and such a copy is left.
- The child stays in the process group of its caller, to which Ray sends signals: no session of its own.

Waits never block for more than :data:`TICK` seconds: ``ray.cancel`` sets a flag that the interpreter looks at between
its instructions, and interrupts no system call. Everything runs on the calling thread.
"""

import json
import os
import selectors
import socket
import subprocess
import time
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from ._errors import MicroVMError, NotStarted, TimedOut

#: Longest wait in one system call, in seconds.
TICK = 0.1
#: How long a process that was told to end has before it is killed, in seconds.
GRACE = 10.0
#: How long output may come after the process has ended, in seconds: its keeper writes the exit report then.
SETTLE = 5.0
#: Most bytes of an exit report.
REPORT_LIMIT = 1 << 20


class Descriptor:
    """A descriptor that is closed with its last reference at the latest."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.close()


class Lease:
    """One of two sockets, shut down with its last reference at the latest."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self._maker = os.getpid()

    def close(self) -> None:
        # In a process that was forked from the one that made it, the copy goes and the microVM stays.
        if self._socket.fileno() >= 0 and os.getpid() == self._maker:
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __del__(self) -> None:
        self.close()


def lease() -> Tuple[Lease, Descriptor]:
    """A lease, and the descriptor whose hang-up is its end."""
    ours, theirs = socket.socketpair()
    return Lease(ours), Descriptor(theirs.detach())


def pipe() -> Tuple[Descriptor, Descriptor]:
    """A pipe: the end to read and the end to write; no child inherits them unasked."""
    read, write = os.pipe()
    return Descriptor(read), Descriptor(write)


class Output:
    """The first bytes of a stream; further ones are counted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = bytearray()
        self.dropped = 0

    def add(self, data: bytes) -> None:
        room = max(self.limit - len(self.kept), 0)
        self.kept += data[:room]
        self.dropped += max(len(data) - room, 0)


class Process:
    """A running ``mayfly-jailer``. With ``is_run`` it supervises a microVM, which the lease ends."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        max_output: int,
        stdin: Optional[bytes] = None,
        is_run: bool = False,
        with_ready: bool = False,
        command: Sequence[str] = (),
    ) -> None:
        """Starts ``words``, then the options that this class adds, then ``--`` and ``command``.

        Raises:
            NotStarted: the program could not be executed.
        """
        self.began = time.monotonic()
        self.outputs = {"stdout": Output(max_output), "stderr": Output(max_output)}
        self._report = Output(REPORT_LIMIT)
        self._streams: Dict[str, Descriptor] = {}
        # A view: what is left of a long input is not copied each time.
        self._stdin = None if stdin is None else memoryview(stdin)
        self._lease: Optional[Lease] = None
        self._process: Optional["subprocess.Popen[bytes]"] = None
        self.ready: Optional[Descriptor] = None

        theirs: List[Descriptor] = []
        passed: List[int] = []
        words = list(words)

        def passes(descriptor: Descriptor) -> int:
            theirs.append(descriptor)
            passed.append(descriptor.number)
            return descriptor.number

        try:
            out, for_out = pipe()
            err, for_err = pipe()
            theirs += [for_out, for_err]
            self._streams.update(stdout=out, stderr=err)
            if is_run:
                self._lease, end = lease()
                report, for_report = pipe()
                self._streams["report"] = report
                words += ["--with-parent", "--end-with-fd", str(passes(end))]
                words += ["--exit-report", f"/dev/fd/{passes(for_report)}"]
            if with_ready:
                self.ready, for_ready = pipe()
                words += ["--ready-fd", str(passes(for_ready))]
            given = subprocess.DEVNULL
            if stdin is not None:
                their_input, ours = pipe()
                theirs.append(their_input)
                given = their_input.number
                os.set_blocking(ours.number, False)
                self._streams["stdin"] = ours
            if command:
                words += ["--", *command]
            self._process = subprocess.Popen(
                words,
                stdin=given,
                stdout=for_out.number,
                stderr=for_err.number,
                pass_fds=passed,
                env=dict(environment),
            )
        except OSError as error:
            raise NotStarted(f"cannot run {words[0]}: {error.strerror}") from error
        except BaseException:
            # Its traceback may live on and keep this object; what was started is not to.
            if self._lease is not None:
                self._lease.close()
            raise
        finally:
            for one in theirs:
                one.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """Ends the process and waits for that; does nothing to one that has ended.

        What ends the microVM comes first, so that an exception in the middle leaves nothing running.
        """
        if self._lease is not None:
            self._lease.close()
        process = self._process
        if process is None:
            return
        try:
            if self._lease is None and process.poll() is None:
                # exec or cp: the guest kills the process of a client that is gone.
                process.kill()
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        except BaseException:
            process.kill()
            raise

    def says_ready(self) -> bool:
        """Whether the microVM was ready for commands; waits for nothing."""
        assert self.ready is not None
        os.set_blocking(self.ready.number, False)
        try:
            return bool(os.read(self.ready.number, 1))
        except BlockingIOError:
            return False

    def give_way(self, seconds: float) -> None:
        """Takes what has come so far, and waits that long for the end of the process."""
        try:
            self.collect(time.monotonic() + seconds)
        except TimedOut:
            pass

    def collect(self, deadline: Optional[float] = None, until_ready: bool = False) -> None:
        """Reads output until the process has ended; with ``until_ready`` also until it has said that it is ready.

        Raises:
            TimedOut: ``deadline`` (of ``time.monotonic``) came before that. The process goes on.
        """
        ended_at: Optional[float] = None
        with selectors.DefaultSelector() as selector:
            for name, stream in self._streams.items():
                what = selectors.EVENT_WRITE if name == "stdin" else selectors.EVENT_READ
                selector.register(stream.number, what, name)
            if until_ready and self.ready is not None:
                selector.register(self.ready.number, selectors.EVENT_READ, "ready")
            while True:
                for key, _ in selector.select(TICK):
                    if key.data == "ready":
                        return
                    if not self._move(key.data):
                        selector.unregister(key.fd)
                        self._streams.pop(key.data).close()
                now = time.monotonic()
                if self.has_ended():
                    ended_at = ended_at or now
                    is_all = not self._streams.keys() - {"stdin"}
                    if is_all or now - ended_at > SETTLE:
                        return
                elif deadline is not None and now >= deadline:
                    raise TimedOut("the time limit was reached")

    def _move(self, name: str) -> bool:
        """Moves bytes of one stream; whether there may be more."""
        number = self._streams[name].number
        if name == "stdin":
            assert self._stdin is not None
            try:
                written = os.write(number, self._stdin[: 1 << 16]) if self._stdin else 0
            except BrokenPipeError:
                return False
            self._stdin = self._stdin[written:]
            return bool(self._stdin)
        data = os.read(number, 1 << 16)
        (self._report if name == "report" else self.outputs[name]).add(data)
        return bool(data)

    @property
    def stdout(self) -> bytes:
        """Standard output so far."""
        return bytes(self.outputs["stdout"].kept)

    @property
    def stderr(self) -> bytes:
        """Standard error so far."""
        return bytes(self.outputs["stderr"].kept)

    @property
    def dropped(self) -> int:
        """Bytes of output that were not kept."""
        return sum(output.dropped for output in self.outputs.values())

    @property
    def exit_code(self) -> int:
        """The exit code of a process that has ended; 128 and the number of the signal that ended it."""
        assert self._process is not None
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def report(self) -> Mapping[str, object]:
        """The exit report; empty if there is none."""
        try:
            report = json.loads(bytes(self._report.kept))
        except ValueError:
            return {}
        return report if isinstance(report, dict) else {}

    def error(self, kind: "type[MicroVMError]", message: str) -> MicroVMError:
        """An error with what is known of the process."""
        code = self.exit_code if self.has_ended() else None
        return kind(message, str(self.report().get("ended", "")), code, self.stdout, self.stderr)
