#!@SHELL@
# The first process of a root file system that had none: mounts what programs expect, runs the command of
# the container image, or a shell on the console, and ends the microVM after it.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
# A busybox without links for its programs finds them through /proc.
[ ! -x /bin/busybox ] || /bin/busybox mount -t proc proc /proc 2>/dev/null
has() { command -v "$1" >/dev/null 2>&1; }
if has mount; then
    [ -e /proc/self ] || mount -t proc proc /proc
    mount -t sysfs sysfs /sys 2>/dev/null
    [ -c /dev/console ] || mount -t devtmpfs dev /dev
    mount -t tmpfs tmpfs /run
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mkdir -p /dev/pts /dev/shm && mount -t devpts devpts /dev/pts 2>/dev/null
fi
if has hostname; then hostname -F /etc/hostname 2>/dev/null; fi
if has ip; then ip link set lo up 2>/dev/null; elif has ifconfig; then ifconfig lo up 2>/dev/null; fi
@ENVIRONMENT@
cd @FOLDER@ 2>/dev/null || cd /
set -- @COMMAND@
console=/dev/ttyS0
[ -c $console ] || console=/dev/console
if [ $# -gt 0 ]; then
    "$@" <$console >$console 2>&1
    echo "mayfly-init: the command ended with code $?" >$console
elif has cttyhack; then
    setsid cttyhack sh
elif has setsid; then
    setsid -c sh <$console >$console 2>&1 || sh <$console >$console 2>&1
else
    sh <$console >$console 2>&1
fi
if has sync; then sync; fi
has reboot && reboot -f
# No program for it: by the kernel's own key, which reboots at once.
echo b >/proc/sysrq-trigger
