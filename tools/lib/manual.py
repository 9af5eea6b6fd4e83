#!/usr/bin/env python3
"""Manual pages and completions for bash, from what programs print for --help.

usage: manual.py man NAME SUMMARY VERSION < HELP        a manual page
       manual.py bash NAME [COMMAND=HELP_FILE ...] < HELP   a completion; each COMMAND is a first word

What --help prints is the one place where options are described. Its form: lines `usage: ...` with continuations that
are indented; headings, which begin a line and end with a colon; entries, which are indented by two spaces (options by
six, too), with two spaces or more before their text; lines that are indented further and continue the entry; and paragraphs.
"""

import re
import sys

ENTRY = re.compile(r"^(?:  |      (?=-))(?=\S)(.*?)(?:\s{2,}(\S.*))?$")
# With one space only before the text, where the names of an option and of its value fill the column.
TIGHT = re.compile(r"^(-\S+ \S+) (\S.*)$")
HEADING = re.compile(r"^\S.*:$")
OPTION = re.compile(r"(?<![\w-])(--?[A-Za-z][\w-]*)")


def entry(line):
    """The name and the text of an entry, if the line begins one."""
    found = ENTRY.match(line)
    if not found:
        return None
    name, text = found[1], found[2] or ""
    tight = TIGHT.match(name) if not text else None
    return (tight[1], tight[2]) if tight else (name, text)


def roff(text):
    """The text with everything that roff would take for its own made plain."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\\&" + text if text.startswith(".") else text


def man(name, summary, version, lines):
    out = [
        f'.TH {roff(name).upper()} 1 "" "mayfly {version}" "User Commands"',
        ".SH NAME",
        f"{roff(name)} \\- {roff(summary)}",
    ]
    synopsis, rest, in_usage = [], [], False
    for line in lines:
        if line.lower().startswith("usage: ") or in_usage and line.startswith("       "):
            synopsis.append(re.sub(r"\s{2,}", "    ", line[7:]))
            in_usage = True
        else:
            in_usage = False
            rest.append(line)
    if synopsis:
        out += [".SH SYNOPSIS", ".nf", *map(roff, synopsis), ".fi"]
    out.append(".SH DESCRIPTION")
    in_entry = False
    for line in rest:
        begun = entry(line)
        if not line.strip():
            out.append(".PP")
            in_entry = False
        elif HEADING.match(line):
            out.append(f".SH {roff(line[:-1]).upper()}")
            in_entry = False
        elif begun:
            out += [".TP", f"\\fB{roff(begun[0])}\\fR", roff(begun[1])]
            in_entry = True
        else:
            # What is indented within an entry has lines of its own there.
            if in_entry and re.match(r"^\s+\S+\s{2,}\S", line):
                out.append(".br")
            out.append(roff(line.strip()))
    # An empty paragraph before a heading is none.
    text = "\n".join(line for line in out if line)
    return re.sub(r"(?:\.PP\n)+(?=\.SH|\.TP|$)", "", text + "\n")


def options(lines):
    """The options that begin an entry, in their order."""
    found = {}
    for line in lines:
        begun = entry(line)
        if begun and begun[0].startswith("-"):
            for option in OPTION.findall(begun[0]):
                found[option] = True
    return list(found)


def bash(name, commands, lines):
    function = "_" + name.replace("-", "_")
    cases = "".join(
        f"    {command}) words='{' '.join(options(text))}' ;;\n"
        for command, text in commands.items()
    )
    first = " ".join(commands)
    return f"""# bash completion for {name}
{function}() {{
    local words current=${{COMP_WORDS[COMP_CWORD]}}
    case ${{COMP_WORDS[1]}} in
{cases}    *) words='{' '.join(options(lines))}' ;;
    esac
    # Where neither an option nor a command begins, bash offers the names of files.
    [[ $current = -* ]] || words=
    [[ $COMP_CWORD -gt 1 ]] || words+=' {first}'
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}
complete -o default -F {function} {name}
"""


def main():
    kind, name, *rest = sys.argv[1:]
    lines = sys.stdin.read().splitlines()
    if kind == "man":
        summary, version = rest
        sys.stdout.write(man(name, summary, version, lines))
    elif kind == "bash":
        commands = {}
        for word in rest:
            command, file = word.split("=", 1)
            with open(file, encoding="utf-8") as text:
                commands[command] = text.read().splitlines()
        sys.stdout.write(bash(name, commands, lines))
    else:
        sys.exit(f"manual.py: {kind} is neither man nor bash.")


if __name__ == "__main__":
    main()
