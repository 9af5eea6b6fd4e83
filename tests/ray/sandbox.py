"""Ray's own sandboxes, unmodified, with mayfly-oci in runsc's place. tests/ray.rs runs it, in a network namespace.

    sandbox.py IMAGE.tar BIN

prints a line for each step that holds. IMAGE.tar has a shell and a file; BIN holds what was installed as runsc.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import ray
from ray.experimental.sandbox.image_manager import ImageManager
from ray.experimental.sandbox.sandbox import Sandbox

from waiting import wait_until

#: How long a guest may take to boot, and anything to end, in seconds; nothing is measured with it.
PATIENCE = 1200
#: Where Ray's sandboxes keep the state of their runtime.
RUNSC_ROOT = "/tmp/runsc"
#: Where it keeps their bundles.
SANDBOXES = "/tmp/ray/sandbox"


def step(name):
    print(f"sandbox: {name} ok", flush=True)


def processes(programs):
    """Numbers of processes whose program is in this folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            program = os.readlink(f"/proc/{pid}/exe")
        except OSError:
            continue
        if program.startswith(programs + "/"):
            found.append(int(pid))
    return found


def worker_of(sandbox):
    """The process of an actor."""
    return ray.get(sandbox.__ray_call__.remote(lambda self: os.getpid()))


def create(image, **more):
    sandbox = Sandbox.options(num_cpus=1).remote(
        image=image, timeout_seconds=PATIENCE, network="none", memory="200Mi", env={"GIVEN": "at create"}, **more
    )
    return sandbox, ray.get(sandbox.get_instance_id.remote())


def check(image, programs):
    sandbox, name = create(image, readonly=False, workdir="/work")
    assert ray.get(sandbox.get_status.remote()).value == "RUNNING"
    step("create")

    def run(command, **more):
        return ray.get(sandbox.exec.remote(command, **more))

    script = "pwd; echo $GIVEN $MORE; cat /etc/hosts >/dev/null && echo apart >&2; exit 7"
    result = run(script, shell="/bin/sh", env={"MORE": "at exec"})
    assert (result.exit_code, result.stdout, result.stderr) == (7, "/work\nat create at exec\n", "apart\n"), result
    result = run(["/bin/cat", "/srv/of-image"])
    assert (result.exit_code, result.stdout) == (0, "of the image\n"), result
    step("exec")

    content = bytes(range(256)) * 1024
    ray.get(sandbox.write_file.remote("/data/deep/file", content))
    assert ray.get(sandbox.read_file.remote("/data/deep/file")) == content
    ray.get(sandbox.write_file.remote("relative", "text\n"))
    assert run(["cat", "/work/relative"]).stdout == "text\n"
    try:
        ray.get(sandbox.read_file.remote("/missing"))
        raise AssertionError("a missing file was read")
    except ray.exceptions.RayTaskError as error:
        assert "/missing" in str(error), error
    step("write_file and read_file")

    ray.get(sandbox.delete.remote())
    wait_until(lambda: not processes(programs), "the end of its processes", PATIENCE)
    assert not os.path.exists(f"{RUNSC_ROOT}/{name}")
    step("delete")

    # With a root that is only read, a workdir is the one place to write to.
    sandbox, name = create(image, workdir="/scratch")
    ray.get(sandbox.write_file.remote("/scratch/file", "kept"))
    assert ray.get(sandbox.read_file.remote("/scratch/file")) == b"kept"
    step("scratch folder")
    os.kill(worker_of(sandbox), signal.SIGKILL)
    wait_until(lambda: not processes(programs), "the end of the microVM with its worker", PATIENCE)
    wait_until(lambda: not os.path.exists(f"{RUNSC_ROOT}/{name}"), "the end of its state", PATIENCE)
    shutil.rmtree(f"{SANDBOXES}/{name}")
    step("worker killed")


def main():
    image, programs = sys.argv[1:]
    version = subprocess.run(["runsc", "--version"], capture_output=True, text=True, check=True).stdout
    assert "mayfly-oci" in version, version
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
    cache = ImageManager().get_image_dir(image)
    try:
        check(image, programs)
    finally:
        ray.shutdown()
        shutil.rmtree(cache, ignore_errors=True)
        if os.path.exists(f"{cache}.lock"):
            os.remove(f"{cache}.lock")
        # Others' sandboxes keep them.
        for folder in (RUNSC_ROOT, os.path.dirname(cache), SANDBOXES):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


main()
