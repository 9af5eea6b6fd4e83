#!/usr/bin/env bash
# Finding: qemu-img 7.2.22 and 10.0.2: `info` refuses a json: name with the option "backing", which other commands take.
#
# Version:  qemu-img 7.2.22 (Debian 12), which this script runs; 10.0.2 (its backports) does the same
# Expected: a name `json:{"driver":"qcow2","file":...,"backing":...}` that `convert`, `map` and `check` open is opened by
#           `info` too; it has no need of the backing file, and may ignore it.
# Seen:     "Block format 'qcow2' does not support the option 'backing.driver'", exit code 1. With "backing": null it works.
# So:       who names all files of a chain must name them to `convert` and `map`, and give `info` the image alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq download qemu-utils=1:7.2+dfsg-7+deb12u18+b3
dpkg-deb -x qemu-utils_*.deb pinned
PATH=$work/pinned/usr/bin:$PATH
qemu-img --version | sed -n 1p
qemu-img create -q -f raw base.raw 1M
qemu-img create -q -f qcow2 -F raw -b base.raw top.qcow2
file() { printf '{"driver":"file","filename":"%s/%s"}' "$work" "$1"; }
name() { printf 'json:{"driver":"qcow2","file":%s,"backing":%s}' "$(file top.qcow2)" "$1"; }
with=$(name "{\"driver\":\"raw\",\"file\":$(file base.raw)}")
for command in map check; do
    qemu-img $command "$with" >/dev/null
    echo "$command: opened"
done
qemu-img convert -O raw "$with" out.raw
echo "convert: opened"
qemu-img info "$(name null)" >/dev/null
echo "info, with null: opened"
if qemu-img info "$with" >/dev/null 2>messages; then
    echo "changed: info takes the option now" >&2
    exit 1
fi
grep -o "Block format.*" messages
