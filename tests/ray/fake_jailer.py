"""Stands in for mayfly-jailer in the unit tests of tools/ray: does what the variable FAKE (JSON) says for the
subcommand, and appends what it was started with to the file FAKE_LOG."""

import json
import os
import select
import sys

words = sys.argv[1:]
plan = json.loads(os.environ["FAKE"]).get(words[0], {})


def option(name):
    head = words[: words.index("--")] if "--" in words else words
    return head[head.index(name) + 1] if name in head else None


def say(stream, text):
    stream.write(text)
    stream.flush()


def end(code, word, sentence=""):
    place = option("--exit-report")
    if place and word:
        with open(place, "w") as report:
            json.dump({"ended": word, "exit_code": code, "sentence": sentence}, report)
    os._exit(code)


with open(os.environ["FAKE_LOG"], "a") as log:
    facts = {
        "words": words,
        "env": dict(os.environ),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
    }
    log.write(json.dumps(facts) + "\n")

if plan.get("cat"):
    say(sys.stdout, sys.stdin.read())
say(sys.stdout, plan.get("stdout", "") * plan.get("times", 1))
say(sys.stderr, plan.get("stderr", ""))
if plan.get("ready") and option("--ready-fd"):
    os.write(int(option("--ready-fd")), b"1")
    os.close(int(option("--ready-fd")))
if plan.get("stays"):
    lease = option("--end-with-fd")
    if lease is None or plan.get("deaf"):
        select.select([], [], [])
    # As long as it takes, or until something is asked of the file that ends it.
    while not os.path.exists(os.environ["FAKE_LOG"] + ".end"):
        if select.select([int(lease)], [], [], 0.02)[0]:
            end(129, "stopped", "the other end of the descriptor was closed (--end-with-fd)")
if plan.get("ends_the_microvm"):
    open(os.environ["FAKE_LOG"] + ".end", "w").close()
end(plan.get("code", 0), plan.get("ended", "exited"), plan.get("sentence", ""))
