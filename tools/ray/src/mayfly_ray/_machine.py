"""What a microVM is made of, and the words of ``mayfly-jailer run`` for it."""

import os
import shutil
from dataclasses import dataclass, field
from typing import List, Mapping, Optional, Sequence

from ._errors import NotStarted


@dataclass(frozen=True)
class Machine:
    """The machine, its jail and its limits; can be pickled, so that a driver makes it and tasks use it.

    Paths are those of the node that the task runs on.

    Attributes:
        kernel: the guest kernel, an ELF vmlinux or a bzImage.
        memory_mib: guest memory in MiB.
        vcpus: number of processors, 1 to 32.
        cmdline: the kernel command line; None: the default of ``mayfly-jailer``.
        initrd: initial RAM disk, for :func:`run_kernel`.
        drives: disks, each ``FILE[:ro]`` or with other settings as of ``--drive``.
        nets: network interfaces, each as of ``--net``.
        limits: cgroup limits as of ``--limit``, for example ``{"memory": "300M", "cpus": "1.5"}``.
        uid, gid: user and group of the monitor; root has to give both.
        options: further words for ``mayfly-jailer run``, as they are.
        jailer: path of ``mayfly-jailer``; None: the variable MAYFLY_JAILER, else the one in PATH.
    """

    kernel: str
    memory_mib: int = 128
    vcpus: int = 1
    cmdline: Optional[str] = None
    initrd: Optional[str] = None
    drives: Sequence[str] = ()
    nets: Sequence[str] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    uid: Optional[int] = None
    gid: Optional[int] = None
    options: Sequence[str] = ()
    jailer: Optional[str] = None

    def words(self) -> List[str]:
        """The words of ``mayfly-jailer run`` for this machine."""
        words = ["--kernel", self.kernel, "--memory", f"{self.memory_mib}M", "--vcpus", str(self.vcpus)]
        single = [
            ("--cmdline", self.cmdline),
            ("--initrd", self.initrd),
            ("--uid", self.uid),
            ("--gid", self.gid),
        ]
        words += [text for name, value in single if value is not None for text in (name, str(value))]
        words += [text for drive in self.drives for text in ("--drive", drive)]
        words += [text for net in self.nets for text in ("--net", net)]
        words += [text for name, value in self.limits.items() for text in ("--limit", f"{name}={value}")]
        return words + list(self.options)

    def find_jailer(self) -> str:
        """The absolute path of ``mayfly-jailer`` on this node.

        Raises:
            NotStarted: it is not there.
        """
        name = self.jailer or os.environ.get("MAYFLY_JAILER") or "mayfly-jailer"
        path = shutil.which(name)
        if path is None:
            raise NotStarted(
                f"cannot run {name}: there is no such program on this node; install mayfly, or set MAYFLY_JAILER"
            )
        return os.path.abspath(path)
