"""tools/ray on a real cluster: two nodes that count microVMs. tests/ray.rs runs it, in a network namespace.

    cluster.py JAILER PROBE FOLDER [KERNEL IMAGE]

prints a line for each step that holds. With KERNEL and IMAGE also a command, a variable and files of a Linux guest.
"""

import dataclasses
import glob
import os
import signal
import sys

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import mayfly_ray
from mayfly_ray import Machine, MicroVM
from waiting import wait_until

#: How long anything may take before the test gives up, in seconds; nothing is measured with it.
PATIENCE = 600
#: What the ids of this test's microVMs begin with.
PREFIX = f"mfray-{os.getpid()}-"
UID = 64321


def stat(pid):
    """State, parent and start of a process; none once it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(") ", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def processes():
    """All processes: number to parent and start."""
    all_of_them = {int(name): stat(name) for name in os.listdir("/proc") if name.isdigit()}
    return {pid: facts for pid, facts in all_of_them.items() if facts}


def jailers(name):
    """Numbers of the processes of ``mayfly-jailer run --id NAME``."""
    found = []
    for pid in processes():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if b"run" in words[:2] and any(word.startswith(name.encode()) for word in words):
            found.append(pid)
    return found


class Guest:
    """A microVM that runs: its jailer, and all processes below it."""

    def __init__(self, name, ref):
        # With its keeper and monitor there are three or more; the monitor is there when the guest runs.
        def whole():
            if ray.wait([ref], timeout=0)[0]:
                raise AssertionError(f"{name} should stay, but ended: {ray.get(ref)}")
            known = processes()
            for top in jailers(name):
                if top in known and known[top][0] not in jailers(name):
                    family = {top}
                    while more := {pid for pid, (parent, _) in known.items() if parent in family} - family:
                        family |= more
                    if len(family) > 1 and any(command(pid) == "mayfly" for pid in family):
                        return top, known[top][0], {pid: known[pid][1] for pid in family}
            return None

        self.jailer, self.worker, self.family = wait_until(whole, f"the microVM {name}", PATIENCE)

    def is_gone(self):
        return not any((facts := stat(pid)) and facts[1] == start for pid, start in self.family.items())

    def goes(self):
        wait_until(self.is_gone, f"the end of {self.family}", PATIENCE)


def command(pid):
    """The name of the program of a process."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).split(" ")[0]
    except OSError:
        return ""


def cgroups():
    """Control groups of this test's microVMs."""
    return [folder for folder, _, _ in os.walk("/sys/fs/cgroup") if PREFIX in folder]


def words_of(machine, name, words, **more):
    options = ("--id", PREFIX + name)
    return dataclasses.replace(machine, cmdline=f"probe={words}", options=options, **more)


@ray.remote(resources={"microvm": 1}, max_retries=0)
def boot(machine):
    result = mayfly_ray.run_kernel(machine, timeout=PATIENCE)
    return result, ray.get_runtime_context().get_node_id()


@ray.remote(resources={"microvm": 1}, max_retries=0)
def limited(machine, timeout):
    return mayfly_ray.run_kernel(machine, timeout=timeout)


@ray.remote(resources={"microvm": 1}, max_retries=1)
def boot_again(first, then, marker):
    """The first time a guest that stays, and another one when it is tried again."""
    is_first = not os.path.exists(marker)
    open(marker, "w").close()
    return mayfly_ray.run_kernel(first if is_first else then, timeout=PATIENCE).exit_code


@ray.remote(resources={"microvm": 1})
class Actor:
    def boot(self, machine):
        return mayfly_ray.run_kernel(machine, timeout=PATIENCE)


@ray.remote(resources={"microvm": 1}, max_retries=0)
def use(machine, image, name, folder):
    with MicroVM(machine, image, start_timeout=PATIENCE, id=name) as vm:
        vm.put(__file__, "/tmp/in")
        result = vm.run(["/bin/sh", "-c", "cat /tmp/in >/tmp/out; echo $WORD; echo apart >&2; exit 7"], env={"WORD": "hello"})
        vm.get("/tmp/out", folder + "/out")
    return result


def fails(kind, ref):
    try:
        value = ray.get(ref, timeout=PATIENCE)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {value}")


def ok(what):
    print(f"cluster: {what} ok", flush=True)


def twenty(machine, nodes):
    refs = [boot.remote(words_of(machine, f"many-{n}", f"print:task-{n},exitcode:{n},reset")) for n in range(20)]
    used = set()
    for n, (result, node) in enumerate(ray.get(refs, timeout=PATIENCE)):
        assert result.exit_code == n and result.ended == "reset", result
        assert f"task-{n} ".encode() in result.stdout + b" ", result
        used.add(node)
    assert used == nodes, (used, nodes)
    ok("twenty tasks")


def errors(machine):
    error = fails(mayfly_ray.GuestEnded, boot.remote(words_of(machine, "crash", "print:before,triple")))
    assert (error.ended, error.exit_code) == ("crash", 160), error
    assert b"before" in error.stdout and isinstance(error, ray.exceptions.RayTaskError), error
    missing = dataclasses.replace(machine, kernel="/nowhere/vmlinux")
    error = fails(mayfly_ray.NotStarted, boot.remote(missing))
    assert "/nowhere/vmlinux" in error.message, error.message
    stays = words_of(machine, "late", "stay")
    error = fails(mayfly_ray.TimedOut, limited.remote(stays, 1.5))
    assert (error.ended, error.exit_code) == ("time-limit", 124) and b"halted" in error.stdout, error
    ok("errors")


def cancelled(machine):
    for force in (False, True):
        name = f"cancel-{int(force)}"
        ref = boot.remote(words_of(machine, name, "stay", limits={"memory": "200M"}))
        guest = Guest(PREFIX + name, ref)
        assert any(name in folder for folder in cgroups()), cgroups()
        ray.cancel(ref, force=force)
        fails((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError), ref)
        guest.goes()
        ok(f"cancel with force={force}")


def actor_killed(machine):
    actor = Actor.remote()
    ref = actor.boot.remote(words_of(machine, "actor", "stay", limits={"memory": "200M"}))
    guest = Guest(PREFIX + "actor", ref)
    ray.kill(actor)
    guest.goes()
    fails(ray.exceptions.RayActorError, ref)
    ok("actor killed")


def jailer_killed(machine):
    ref = boot.remote(words_of(machine, "jailer", "stay", limits={"memory": "200M"}))
    guest = Guest(PREFIX + "jailer", ref)
    os.kill(guest.jailer, signal.SIGKILL)
    error = fails(mayfly_ray.GuestEnded, ref)
    assert (error.ended, error.exit_code) == ("jailer-killed", 137), error
    guest.goes()
    ok("mayfly-jailer killed")


def worker_killed(machine, folder):
    first = words_of(machine, "retry", "stay", limits={"memory": "200M"})
    then = words_of(machine, "retried", "exitcode:9,reset")
    ref = boot_again.remote(first, then, folder + "/marker")
    guest = Guest(PREFIX + "retry", ref)
    os.kill(guest.worker, signal.SIGKILL)
    guest.goes()
    assert ray.get(ref, timeout=PATIENCE) == 9
    ok("worker killed and task tried again")


def node_killed(machine, cluster, node):
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    names = [f"node-{n}" for n in range(3)]
    refs = [
        boot.options(scheduling_strategy=there).remote(words_of(machine, name, "stay", limits={"memory": "200M"}))
        for name in names
    ]
    guests = [Guest(PREFIX + name, ref) for name, ref in zip(names, refs)]
    cluster.remove_node(node, allow_graceful=False)
    for guest in guests:
        guest.goes()
    for ref in refs:
        fails(ray.exceptions.RayError, ref)
    ok("node killed")


def linux_worker_killed(machine, image):
    """While Linux boots: the socket of the microVM goes, too."""
    ref = use.remote(machine, image, PREFIX + "booting", "/nowhere")
    guest = Guest(PREFIX + "booting", ref)
    sockets = glob.glob(f"/run/mayfly/{PREFIX}booting.sock")
    assert sockets
    os.kill(guest.worker, signal.SIGKILL)
    guest.goes()
    fails(ray.exceptions.WorkerCrashedError, ref)
    wait_until(lambda: not any(map(os.path.exists, sockets)), f"the end of {sockets}", PATIENCE)
    ok("worker killed while Linux boots")


def linux(machine, image, folder):
    result = ray.get(use.remote(machine, image, PREFIX + "linux", folder), timeout=PATIENCE)
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"hello\n", b"apart\n"), result
    with open(__file__, "rb") as sent, open(folder + "/out", "rb") as came:
        assert sent.read() == came.read()
    ok("command and files of a Linux guest")


def nothing_is_left():
    wait_until(lambda: not jailers(PREFIX), "the end of all microVMs", PATIENCE)
    left = glob.glob(f"/run/mayfly/{PREFIX}*") + cgroups()
    assert not left, left
    ok("nothing left")


def main(jailer, probe, folder, kernel=None, image=None):
    machine = Machine(kernel=probe, memory_mib=16, uid=UID, gid=UID, jailer=jailer)
    node = {"object_store_memory": 100 << 20, "include_dashboard": False}
    head = {"num_cpus": 0, "_system_config": {"health_check_initial_delay_ms": 1000}, **node}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=4, resources={"microvm": 4}, **node) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        ok(f"Ray {ray.__version__}, two nodes")
        twenty(machine, {one.node_id for one in nodes})
        errors(machine)
        cancelled(machine)
        actor_killed(machine)
        jailer_killed(machine)
        worker_killed(machine, folder)
        if image:
            guest = dataclasses.replace(machine, kernel=kernel, memory_mib=128)
            linux_worker_killed(guest, image)
            linux(guest, image, folder)
        node_killed(machine, cluster, nodes[1])
        # What is left of the cluster goes on.
        assert ray.get(boot.remote(words_of(machine, "last", "exitcode:5,reset")), timeout=PATIENCE)[0].exit_code == 5
        nothing_is_left()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    # A script that starts this in the background has it ignored, and so have the workers: tasks cannot be cancelled then.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(*sys.argv[1:])
