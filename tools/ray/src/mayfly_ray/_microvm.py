"""The calls of a task: a command in an image, a kernel, and a microVM for several commands and files."""

import os
import time
import uuid
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from ._errors import CopyFailed, GuestEnded, MicroVMError, NotStarted, TimedOut, printable
from ._machine import Machine
from ._process import Process
from ._result import Result

#: Bytes of standard output, and of standard error, that are kept unless a call says otherwise.
MAX_OUTPUT = 16 << 20
#: Words of the exit report for a guest that ended by itself.
ORDERLY = ("exited", "reset", "shutdown", "ended")
#: Words for a microVM that there never was.
NEVER_STARTED = ("", "not-started", "no-snapshot", "refused", "error", "unknown")
#: Variables that the programs of this host read themselves: their values go by the command line.
HOST_NAMES = ("HOME", "PATH", "TMPDIR")
#: How the names of further such variables begin.
HOST_PREFIXES = ("LD_", "MAYFLY_", "RUST_", "XDG_")


def run_kernel(machine: Machine, *, timeout: Optional[float] = None, max_output: int = MAX_OUTPUT) -> Result:
    """Boots ``machine``'s kernel and waits until the guest resets or powers off.

    Standard output is the guest's console; the exit code is what the guest wrote to its port (docs/guests.md), else 0.

    Args:
        machine: what to boot.
        timeout: seconds until the microVM is ended, the boot included; None: no limit.
        max_output: bytes of the console that are kept; more is read and counted.

    Raises:
        NotStarted: the microVM could not be started; the message is that of ``mayfly-jailer``.
        TimedOut: the time limit was reached.
        GuestEnded: the guest crashed, panicked, or was ended from outside.
    """
    words = [machine.find_jailer(), "run", "--quiet", *machine.words(), *_timeout(timeout)]
    return _run(Process(words, os.environ, max_output, is_run=True))


def run(
    machine: Machine,
    command: Sequence[str],
    *,
    image: str,
    env: Optional[Mapping[str, str]] = None,
    workdir: Optional[str] = None,
    user: Optional[str] = None,
    stdin: Optional[bytes] = None,
    timeout: Optional[float] = None,
    max_output: int = MAX_OUTPUT,
) -> Result:
    """Runs one command from a disk image in a microVM of its own.

    Args:
        machine: the machine; its kernel has to have what docs/images.md names.
        command: the program and its arguments; no shell is involved.
        image: a disk, folder, archive or image layout, as of ``--image``, with ``:ro`` or ``:rw`` where wanted.
        env: variables of the command. Values are in no command line of the host, but for those of
            :data:`HOST_NAMES` and of names that begin as :data:`HOST_PREFIXES` says.
        workdir: its working folder; None: ``/``.
        user: ``USER[:GROUP]`` of the image; None: root.
        stdin: what it reads from standard input; None: nothing.
        timeout: seconds until the microVM is ended, the boot included; None: no limit.
        max_output: bytes of standard output, and of standard error, that are kept; more is read and counted.

    Raises:
        NotStarted, TimedOut, GuestEnded: as of :func:`run_kernel`.
        ValueError: the command is empty, or a variable has no valid name.
    """
    words = [machine.find_jailer(), "run", "--quiet", *machine.words(), *_timeout(timeout), "--image", image]
    more, environment = _of_command(command, env, workdir, user, stdin)
    return _run(Process(words + more, environment, max_output, stdin, is_run=True, command=command))


class MicroVM:
    """A microVM from a disk image, for any number of commands and files; used in a ``with`` block::

        with MicroVM(machine, "/srv/root.erofs") as vm:
            vm.put("input.csv", "/data/")
            vm.run(["/usr/bin/analyse", "/data/input.csv"]).check()
            vm.get("/data/result.csv", "result.csv")

    Nothing of the image is run but what :meth:`run` names. One thread uses it at a time.
    """

    def __init__(
        self,
        machine: Machine,
        image: str,
        *,
        start_timeout: Optional[float] = None,
        lifetime: Optional[float] = None,
        id: Optional[str] = None,
    ) -> None:
        """Describes a microVM; :meth:`start` or ``with`` starts it.

        Args:
            machine: the machine; its kernel has to have what docs/images.md names.
            image: as of :func:`run`.
            start_timeout: seconds until the guest has to be ready for commands; None: no limit.
            lifetime: seconds until the microVM is ended, whatever it does; None: no limit.
            id: its name, which no other microVM of this user on the node may have; None: a random one.
        """
        self.machine = machine
        self.image = image
        self.start_timeout = start_timeout
        self.lifetime = lifetime
        self.id = id or f"ray-{uuid.uuid4().hex[:24]}"
        self._supervisor: Optional[Process] = None

    def start(self) -> "MicroVM":
        """Starts the microVM and waits until it takes commands.

        Raises:
            NotStarted: it could not be started.
            TimedOut: it was not ready in ``start_timeout`` seconds.
            GuestEnded: the guest ended before it was ready.
        """
        if self._supervisor is not None:
            raise RuntimeError(f"the microVM {self.id} has been started already")
        words = [self._jailer(), "run", "--quiet", "--hold", "--id", self.id, *self.machine.words()]
        words += [*_timeout(self.lifetime), "--image", self.image]
        if "--log" not in self.machine.options:
            # Nothing reads standard error while commands run.
            words += ["--log", "/dev/null"]
        # The command is held for ever; exec reaches the guest meanwhile.
        supervisor = Process(words, os.environ, 1 << 16, is_run=True, with_ready=True, command=["/"])
        self._supervisor = supervisor
        try:
            try:
                supervisor.collect(_deadline(self.start_timeout), until_ready=True)
            except TimedOut:
                message = f"the microVM {self.id} was not ready after {self.start_timeout} s"
                raise supervisor.error(TimedOut, message) from None
            if not supervisor.says_ready():
                supervisor.collect()
                _raise_unless_orderly(supervisor)
                raise supervisor.error(GuestEnded, f"the microVM {self.id} ended before it was ready")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the microVM and waits for that; does nothing the second time."""
        if self._supervisor is not None:
            self._supervisor.stop()

    def __enter__(self) -> "MicroVM":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self,
        command: Sequence[str],
        *,
        env: Optional[Mapping[str, str]] = None,
        workdir: Optional[str] = None,
        user: Optional[str] = None,
        stdin: Optional[bytes] = None,
        timeout: Optional[float] = None,
        max_output: int = MAX_OUTPUT,
    ) -> Result:
        """Runs a command in the guest; the arguments are those of :func:`run`.

        A command whose ``timeout`` (in seconds) is reached is killed, and the microVM goes on.

        Raises:
            NotStarted: the command could not be run, or the microVM is not running.
            TimedOut: the time limit was reached.
            GuestEnded: the guest ended before the command did.
            ValueError: the command is empty, or a variable has no valid name.
        """
        more, environment = _of_command(command, env, workdir, user, stdin)
        words = [self._jailer(), "exec", self.id, *more]
        process = self._client(words, environment, timeout, max_output, stdin, command)
        if _says_it_failed(process):
            raise process.error(NotStarted, f"cannot run a command in {self.id}: {_message(process)}")
        return _result(process, "exited")

    def put(self, source: str, target: str, *, timeout: Optional[float] = None) -> None:
        """Copies a file, or a folder with what is in it, into the guest.

        Args:
            source: path on this node.
            target: absolute path in the guest; into a folder that is there it goes under its own name.
            timeout: seconds; None: no limit.

        Raises:
            CopyFailed: not all was copied.
            TimedOut: the time limit was reached.
            GuestEnded: the guest ended meanwhile.
        """
        self._copy([os.path.abspath(source), f"{self.id}:{target}"], timeout)

    def get(self, source: str, target: str, *, merge: bool = False, timeout: Optional[float] = None) -> None:
        """Copies a file, or a folder with what is in it, out of the guest, whose content is the guest's choice.

        Args:
            source: absolute path in the guest.
            target: path on this node of one new file or folder, or a folder that is there, to put it into.
            merge: write into folders that are there; the guest then chooses what is written in them.
            timeout: seconds; None: no limit.

        Raises:
            CopyFailed, TimedOut, GuestEnded: as of :meth:`put`.
        """
        self._copy([*(["--merge"] if merge else []), f"{self.id}:{source}", os.path.abspath(target)], timeout)

    def _copy(self, words: List[str], timeout: Optional[float]) -> None:
        process = self._client([self._jailer(), "cp", *words], os.environ, timeout, 1 << 16)
        if process.exit_code != 0:
            raise process.error(CopyFailed, f"cannot copy {words[-2]} to {words[-1]}: {_message(process)}")

    def _client(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        timeout: Optional[float],
        max_output: int,
        stdin: Optional[bytes] = None,
        command: Sequence[str] = (),
    ) -> Process:
        """Runs a program that speaks with the guest, to its end."""
        supervisor = self._supervisor
        if supervisor is None:
            raise NotStarted(f"the microVM {self.id} has not been started")
        process = Process(words, environment, max_output, stdin, command=command)
        try:
            process.collect(_deadline(timeout))
        except TimedOut:
            process.stop()
            raise process.error(TimedOut, f"{words[1]} in {self.id} did not end in {timeout} s") from None
        finally:
            process.stop()
        if words[1] == "cp":
            may_be_lost = process.exit_code == 1
        else:
            may_be_lost = process.exit_code == 137 or _says_it_failed(process)
        if may_be_lost:
            # The supervisor ends some milliseconds after the connections of its clients.
            supervisor.give_way(1.0)
            if supervisor.has_ended():
                message = f"the microVM {self.id} ended: {_message(supervisor)}"
                ended = str(supervisor.report().get("ended", ""))
                kind = TimedOut if ended == "time-limit" else GuestEnded
                raise kind(message, ended, supervisor.exit_code, process.stdout, process.stderr)
        return process

    def _jailer(self) -> str:
        return self.machine.find_jailer()


def _deadline(timeout: Optional[float]) -> Optional[float]:
    return None if timeout is None else time.monotonic() + timeout


def _timeout(timeout: Optional[float]) -> List[str]:
    return [] if timeout is None else ["--timeout", f"{timeout:.3f}"]


def _of_command(
    command: Sequence[str],
    env: Optional[Mapping[str, str]],
    workdir: Optional[str],
    user: Optional[str],
    stdin: Optional[bytes],
) -> Tuple[List[str], Dict[str, str]]:
    """The words of ``mayfly-jailer`` for a command, and the environment that they take values from."""
    if isinstance(command, (str, bytes)) or not command:
        raise ValueError("command is a list: a program and its arguments")
    words: List[str] = ["--interactive"] if stdin is not None else []
    environment = dict(os.environ)
    for name, value in (env or {}).items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"{name!r} is not a variable with a valid name and value")
        if name in HOST_NAMES or name.startswith(HOST_PREFIXES):
            words += ["--env", f"{name}={value}"]
        else:
            words += ["--env", name]
            environment[name] = value
    words += ["--workdir", workdir] if workdir is not None else []
    words += ["--user", user] if user is not None else []
    return words, environment


def _run(process: Process) -> Result:
    """Waits for the end of a microVM of one command or kernel."""
    try:
        process.collect()
    finally:
        process.stop()
    return _result(process, _raise_unless_orderly(process))


def _raise_unless_orderly(process: Process) -> str:
    """The word for the end of a microVM whose guest ended by itself."""
    ended = str(process.report().get("ended", ""))
    if ended in ORDERLY:
        return ended
    kind: "type[MicroVMError]" = GuestEnded
    if ended in NEVER_STARTED:
        kind = NotStarted
    elif ended == "time-limit":
        kind = TimedOut
    raise process.error(kind, _message(process))


def _says_it_failed(process: Process) -> bool:
    """Whether 125 is the code of ``mayfly-jailer exec``, which has a message, and not that of the command."""
    return process.exit_code == 125 and b"mayfly-jailer: " in process.stderr


def _result(process: Process, ended: str) -> Result:
    seconds = time.monotonic() - process.began
    return Result(process.exit_code, process.stdout, process.stderr, ended, process.dropped, seconds)


def _message(process: Process) -> str:
    """What the program said of its failure."""
    sentence = process.report().get("sentence")
    if isinstance(sentence, str) and sentence:
        return printable(sentence.encode())
    said = printable(process.stderr).split("mayfly-jailer: ")[-1]
    return said or f"mayfly-jailer ended with exit code {process.exit_code} and no message"
