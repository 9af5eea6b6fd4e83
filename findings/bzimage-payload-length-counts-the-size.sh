#!/usr/bin/env bash
# Finding: xz 5.4.1, lz4 1.9.4, zstd 1.5.4: given the payload of a Linux bzImage exactly as its header says
# (payload_offset, payload_length), each writes the whole kernel and ends with an error.
#
# The kernel's build adds the kernel's size, 4 bytes, to every format but gzip's, whose own format ends with it, and counts
# them in payload_length (scripts/Makefile.lib, size_append; Documentation/arch/x86/boot.rst does not say so). A program
# that judges by the exit status takes every stock kernel for damaged. tools/guest extract cuts the 4 bytes off and
# compares them with the length of what came out.
#
# Exits with 0 when this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get -qq download xz-utils=5.4.1-1+deb12u2 lz4=1.9.4-1 zstd=1.5.4+dfsg2-5
for package in ./*.deb; do dpkg-deb -x "$package" pinned; done
PATH=$folder/pinned/usr/bin:$PATH
seq 1 100000 >kernel
seen=0
for tool in 'xz -c' 'lz4 -lc' 'zstd -qc'; do
    name=${tool%% *}
    # The size of `kernel`, 588895 bytes, in four bytes, the lowest first.
    { $tool kernel; printf '\137\374\010\000'; } >payload
    status=0
    $name -dc <payload >out 2>message || status=$?
    cmp -s kernel out && whole=whole || whole=different
    echo "$name: exit status $status, output $whole: $(sed -n 1p message)"
    [ "$status" = 0 ] || [ $whole != whole ] || seen=$((seen + 1))
    head -c -4 payload | $name -dc | cmp -s kernel -
done
[ $seen = 3 ]
