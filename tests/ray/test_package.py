"""Unit tests of tools/ray, with a program in the place of mayfly-jailer. tests/ray.rs runs them."""

import _thread
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
from unittest import mock

import mayfly_ray
from mayfly_ray import _process
from waiting import wait_until

#: How long anything may take before a test gives up, in seconds; no test measures time with it.
PATIENCE = 120
HERE = os.path.dirname(os.path.abspath(__file__))


def is_running(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="mf-ray-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.jailer = os.path.join(folder.name, "mayfly-jailer")
        self.log = os.path.join(folder.name, "log")
        with open(os.path.join(HERE, "fake_jailer.py")) as source, open(self.jailer, "w") as made:
            made.write(f"#!{sys.executable} -IS\n{source.read()}")
        os.chmod(self.jailer, 0o755)
        self.machine = mayfly_ray.Machine(kernel="/vmlinux", jailer=self.jailer)
        variables = mock.patch.dict(os.environ, {"FAKE_LOG": self.log})
        variables.start()
        self.addCleanup(variables.stop)
        self.plan()

    def plan(self, **of_subcommand):
        os.environ["FAKE"] = json.dumps(of_subcommand)

    def started(self):
        """What the programs were started with, in order."""
        try:
            with open(self.log) as file:
                return [json.loads(line) for line in file if line.endswith("\n")]
        except FileNotFoundError:
            return []

    def run_true(self, **options):
        return mayfly_ray.run(self.machine, ["true"], image="/root.erofs", **options)


class Words(Case):
    def test_machine_and_command_are_passed_and_values_of_variables_are_not_in_the_command_line(self):
        machine = mayfly_ray.Machine(
            kernel="/vmlinux",
            memory_mib=64,
            vcpus=2,
            cmdline="a b",
            drives=["/d:ro"],
            nets=["auto"],
            limits={"memory": "300M"},
            uid=7,
            gid=8,
            options=["--hostname", "h"],
            jailer=self.jailer,
        )
        env = {"SECRET": "s3cret", "XDG_RUNTIME_DIR": "/guest"}
        mayfly_ray.run(machine, ["echo", "--", "-x"], image="/i:ro", env=env, workdir="/w", user="u:g", timeout=1.5)
        (fact,) = self.started()
        words = fact["words"]
        self.assertEqual(words[words.index("--") :], ["--", "echo", "--", "-x"])
        text = " ".join(words)
        for part in (
            "run --quiet --kernel /vmlinux --memory 64M --vcpus 2 --cmdline a b --uid 7 --gid 8 --drive /d:ro",
            "--net auto --limit memory=300M --hostname h --timeout 1.500 --image /i:ro",
            "--env SECRET --env XDG_RUNTIME_DIR=/guest --workdir /w --user u:g --with-parent --end-with-fd",
        ):
            self.assertIn(part, text)
        self.assertNotIn("s3cret", text)
        self.assertEqual(fact["env"]["SECRET"], "s3cret")
        self.assertNotEqual(fact["env"].get("XDG_RUNTIME_DIR"), "/guest")

    def test_variable_whose_name_only_begins_as_one_of_this_host_is_not_in_the_command_line(self):
        names = ["HOMEBREW_TOKEN", "PATHS", "TMPDIRS"]
        hosts = ["HOME", "PATH", "TMPDIR", "LD_X", "MAYFLY_X", "RUST_X", "XDG_X"]
        self.run_true(env={name: "v4lue" for name in names + hosts})
        words = self.started()[0]["words"]
        given = [words[place + 1] for place, word in enumerate(words) if word == "--env"]
        self.assertEqual(given, names + [f"{name}=v4lue" for name in hosts])

    def test_child_stays_in_the_process_group_and_session_of_its_caller(self):
        self.run_true()
        (fact,) = self.started()
        mine = (os.getpid(), os.getpgid(0), os.getsid(0))
        self.assertEqual((fact["parent"], fact["group"], fact["session"]), mine)

    def test_what_is_no_command_or_variable_is_refused_before_anything_starts(self):
        for command, env in (("true", {}), ([], {}), (["true"], {"A=B": ""}), (["true"], {"": ""}), (["x"], {"A": "\0"})):
            with self.assertRaises(ValueError):
                mayfly_ray.run(self.machine, command, image="/i", env=env)
        self.assertEqual(self.started(), [])

    def test_jailer_that_is_not_there_is_named(self):
        machine = mayfly_ray.Machine(kernel="/k", jailer=self.folder + "/none")
        with self.assertRaisesRegex(mayfly_ray.NotStarted, "/none: there is no such program on this node"):
            mayfly_ray.run_kernel(machine)
        with open(self.jailer, "w") as file:
            file.write("#!/nowhere/at/all\n")
        with self.assertRaisesRegex(mayfly_ray.NotStarted, "No such file"):
            self.run_true()


class Ends(Case):
    def test_exit_code_and_streams_come_apart(self):
        self.plan(run={"stdout": "out", "stderr": "err", "code": 7})
        result = self.run_true()
        self.assertEqual((result.exit_code, result.stdout, result.stderr), (7, b"out", b"err"))
        self.assertEqual((result.ended, result.dropped), ("exited", 0))
        with self.assertRaisesRegex(mayfly_ray.CommandFailed, "exit code 7; the last output: err") as caught:
            result.check()
        self.assertEqual((caught.exception.exit_code, caught.exception.stdout), (7, b"out"))
        self.plan(run={})
        result = self.run_true()
        self.assertIs(result.check(), result)

    def test_each_word_of_the_report_has_its_error(self):
        words = {
            "not-started": mayfly_ray.NotStarted,
            "refused": mayfly_ray.NotStarted,
            "error": mayfly_ray.NotStarted,
            "": mayfly_ray.NotStarted,
            "time-limit": mayfly_ray.TimedOut,
            "crash": mayfly_ray.GuestEnded,
            "panic": mayfly_ray.GuestEnded,
            "memory-limit": mayfly_ray.GuestEnded,
            "stopped": mayfly_ray.GuestEnded,
            "jailer-killed": mayfly_ray.GuestEnded,
        }
        for word, kind in words.items():
            said = "mayfly-jailer: it \x1b[31mfailed\n"
            self.plan(run={"ended": word, "code": 99, "stdout": "before", "stderr": said, "sentence": "it failed"})
            with self.assertRaises(mayfly_ray.MicroVMError) as caught:
                mayfly_ray.run_kernel(self.machine)
            error = caught.exception
            self.assertIs(type(error), kind, word)
            self.assertEqual((error.ended, error.exit_code, error.stdout), (word, 99, b"before"))
            self.assertRegex(str(error), r"^it (\?\[31m)?failed$")
        for word in ("reset", "shutdown", "ended"):
            self.plan(run={"ended": word, "code": 3})
            self.assertEqual(mayfly_ray.run_kernel(self.machine).exit_code, 3)

    def test_errors_keep_their_members_through_pickle(self):
        for kind in ("NotStarted", "TimedOut", "GuestEnded", "CommandFailed", "CopyFailed", "MicroVMError"):
            error = getattr(mayfly_ray, kind)("why", "crash", 160, b"out", b"err")
            again = pickle.loads(pickle.dumps(error))
            self.assertIs(type(again), type(error))
            self.assertEqual(vars(again), vars(error))
            self.assertEqual(str(again), "why")
        self.assertEqual(pickle.loads(pickle.dumps(self.machine)), self.machine)

    def test_output_beyond_the_limit_is_read_and_counted(self):
        self.plan(run={"stdout": "0123456789", "times": 100_000})
        result = self.run_true(max_output=15)
        self.assertEqual((result.stdout, result.dropped), (b"012345678901234", 999_985))

    def test_standard_input_longer_than_a_pipe_arrives_and_one_that_is_not_read_does_not_matter(self):
        text = b"line\n" * 100_000
        self.plan(run={"cat": True})
        self.assertEqual(self.run_true(stdin=text).stdout, text)
        self.plan(run={"stdout": "done"})
        self.assertEqual(self.run_true(stdin=text).stdout, b"done")
        self.assertIn("--interactive", self.started()[0]["words"])

    def test_long_standard_input_is_not_copied_with_each_piece(self):
        self.plan(run={"cat": True})
        pieces = 0
        real = _process.Process._move

        def watched(process, name):
            nonlocal pieces
            before = process._stdin
            goes_on = real(process, name)
            if name == "stdin" and process._stdin is not None and before is not None:
                self.assertIs(process._stdin.obj, before.obj)
                pieces += 1
            return goes_on

        with mock.patch.object(_process.Process, "_move", watched):
            text = b"line\n" * 100_000
            self.assertEqual(self.run_true(stdin=text).stdout, text)
        self.assertGreater(pieces, 1)

    def test_no_descriptor_is_left(self):
        self.run_true(stdin=b"x")
        gc.collect()
        before = sorted(os.listdir("/proc/self/fd"))
        for plan in ({}, {"ended": "crash", "code": 160}, {"stays": True, "ended": ""}):
            self.plan(run=plan)
            try:
                with mock.patch.object(_process.Process, "collect", **stop_at_once(plan)):
                    self.run_true(stdin=b"x")
            except mayfly_ray.MicroVMError:
                pass
        gc.collect()
        self.assertEqual(sorted(os.listdir("/proc/self/fd")), before)


def stop_at_once(plan):
    """For a program that stays: an error in the middle; otherwise all as it is."""
    if plan.get("stays"):
        return {"side_effect": mayfly_ray.TimedOut("in the middle")}
    return {"new": _process.Process.collect}


class Stops(Case):
    def test_interrupt_as_of_ray_cancel_ends_the_microvm(self):
        self.plan(run={"stays": True})

        def interrupt():
            wait_until(self.started, "the start", PATIENCE)
            # Sets the flag that ray.cancel sets, and interrupts no system call.
            _thread.interrupt_main()

        thread = threading.Thread(target=interrupt)
        thread.start()
        with self.assertRaises(KeyboardInterrupt):
            self.run_true()
        thread.join()
        self.assertFalse(is_running(self.started()[0]["pid"]))

    def test_object_that_is_dropped_ends_the_microvm(self):
        self.plan(run={"stays": True, "ready": True})
        vm = mayfly_ray.MicroVM(self.machine, "/i").start()
        pid = self.started()[0]["pid"]
        self.assertTrue(is_running(pid))
        del vm
        gc.collect()
        wait_until(lambda: not is_running(pid), "the end of the microVM", PATIENCE)

    def test_interpreter_that_is_killed_ends_the_microvm(self):
        self.plan(run={"stays": True})
        code = f"import mayfly_ray as m; m.run_kernel(m.Machine(kernel='/k', jailer={self.jailer!r}))"
        child = subprocess.Popen([sys.executable, "-c", code])
        try:
            wait_until(self.started, "the start", PATIENCE)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        wait_until(lambda: not is_running(self.started()[0]["pid"]), "the end of the microVM", PATIENCE)

    def test_microvm_ends_at_once_although_a_forked_process_has_a_copy_of_all_descriptors(self):
        self.plan(run={"stays": True, "ready": True})
        vm = mayfly_ray.MicroVM(self.machine, "/i").start()
        pid = self.started()[0]["pid"]
        dropped = os.fork()
        if dropped == 0:
            try:
                del vm
                gc.collect()
            finally:
                os._exit(0)
        os.waitpid(dropped, 0)
        kept = os.fork()
        if kept == 0:
            try:
                signal.pause()
            finally:
                os._exit(0)
        try:
            # The end of a copy is not the end of the microVM.
            self.assertTrue(is_running(pid))
            vm.stop()
            self.assertFalse(is_running(pid))
            # By the hang-up, and not by a signal after that was in vain.
            self.assertEqual(vm._supervisor.exit_code, 129)
        finally:
            os.kill(kept, signal.SIGKILL)
            os.waitpid(kept, 0)

    def test_program_that_does_not_heed_the_hang_up_is_killed(self):
        self.plan(run={"stays": True, "deaf": True, "ready": True})
        with mock.patch.object(_process, "GRACE", 0.2):
            with mayfly_ray.MicroVM(self.machine, "/i"):
                pid = self.started()[0]["pid"]
            self.assertFalse(is_running(pid))

    def test_error_in_the_block_ends_the_microvm_and_a_second_stop_does_nothing(self):
        self.plan(run={"stays": True, "ready": True})
        with self.assertRaises(ZeroDivisionError):
            with mayfly_ray.MicroVM(self.machine, "/i") as vm:
                raise ZeroDivisionError
        self.assertFalse(is_running(self.started()[0]["pid"]))
        vm.stop()
        with self.assertRaises(RuntimeError):
            vm.start()


class Several(Case):
    def test_commands_and_files_go_to_the_microvm_of_the_block(self):
        self.plan(run={"stays": True, "ready": True}, exec={"cat": True, "stderr": "e", "code": 3}, cp={})
        with mayfly_ray.MicroVM(self.machine, "/i", lifetime=60, id="box") as vm:
            result = vm.run(["sh", "-c", "x"], stdin=b"text", env={"A": "b"})
            vm.put("file", "/tmp/f")
            vm.get("/tmp/f", "back", merge=True)
        self.assertEqual((result.exit_code, result.stdout, result.stderr), (3, b"text", b"e"))
        run, first, put, get = [fact["words"] for fact in self.started()]
        for word in ("--hold", "--ready-fd", "--timeout", "--log"):
            self.assertIn(word, run)
        self.assertEqual((vm.id, run[run.index("--id") + 1]), ("box", "box"))
        self.assertEqual(first, ["exec", vm.id, "--interactive", "--env", "A", "--", "sh", "-c", "x"])
        self.assertEqual(put, ["cp", os.path.abspath("file"), f"{vm.id}:/tmp/f"])
        self.assertEqual(get, ["cp", "--merge", f"{vm.id}:/tmp/f", os.path.abspath("back")])

    def test_start_that_fails_or_takes_too_long_says_so_and_leaves_nothing(self):
        self.plan(run={"ended": "not-started", "code": 125, "sentence": "cannot open /i"})
        with self.assertRaisesRegex(mayfly_ray.NotStarted, "cannot open /i"):
            mayfly_ray.MicroVM(self.machine, "/i").start()
        self.plan(run={"stays": True})
        with self.assertRaisesRegex(mayfly_ray.TimedOut, "not ready after 0.3 s"):
            mayfly_ray.MicroVM(self.machine, "/i", start_timeout=0.3).start()
        # It may have been ended before it wrote that it had started.
        for fact in self.started():
            self.assertFalse(is_running(fact["pid"]))

    def test_command_that_takes_too_long_is_ended_and_the_microvm_goes_on(self):
        self.plan(run={"stays": True, "ready": True}, exec={"stays": True, "stdout": "so far"})
        with mayfly_ray.MicroVM(self.machine, "/i") as vm:
            with self.assertRaises(mayfly_ray.TimedOut) as caught:
                vm.run(["x"], timeout=3)
            self.assertEqual(caught.exception.stdout, b"so far")
            run, client = self.started()
            self.assertTrue(is_running(run["pid"]))
            self.assertFalse(is_running(client["pid"]))

    def test_failures_of_commands_and_copies_are_told_apart(self):
        message = "mayfly-jailer: cannot do it\n"
        plans = {"run": {"stays": True, "ready": True}, "cp": {"code": 1, "stderr": message}}
        with mock.patch.dict(os.environ):
            self.plan(**plans, exec={"code": 125, "stderr": message})
            with mayfly_ray.MicroVM(self.machine, "/i") as vm:
                with self.assertRaisesRegex(mayfly_ray.NotStarted, "cannot do it"):
                    vm.run(["x"])
                with self.assertRaisesRegex(mayfly_ray.CopyFailed, "cannot copy .* cannot do it"):
                    vm.get("/a", "b")
                self.plan(**plans, exec={"code": 125})
                self.assertEqual(vm.run(["x"]).exit_code, 125)
                self.plan(**plans, exec={"code": 137})
                self.assertEqual(vm.run(["x"]).exit_code, 137)
        with self.assertRaises(mayfly_ray.NotStarted):
            mayfly_ray.MicroVM(self.machine, "/i").run(["x"])

    def test_guest_that_ends_under_a_command_is_told_with_its_reason(self):
        stays = {"stays": True, "ready": True, "ended": "crash", "code": 160, "sentence": "the guest crashed"}
        self.plan(run=stays, exec={"ends_the_microvm": True, "code": 137})
        with mayfly_ray.MicroVM(self.machine, "/i") as vm:
            with self.assertRaisesRegex(mayfly_ray.GuestEnded, "the guest crashed") as caught:
                vm.run(["x"])
        self.assertEqual((caught.exception.ended, caught.exception.exit_code), ("crash", 160))


if __name__ == "__main__":
    # A script that starts this in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A test that hangs is to say where.
    import faulthandler

    faulthandler.dump_traceback_later(PATIENCE * 2, exit=True)
    unittest.main()
