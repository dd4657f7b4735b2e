#!/bin/busybox sh
# The first program of a Linux guest: sets up what there is, runs /run.sh if that was added to the image, and else a shell.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
while read -r module; do insmod "/lib/modules/$module"; done </lib/modules/order
ip link set lo up
echo "guest: up after $(cut -d ' ' -f 1 /proc/uptime) s"
if [ -f /run.sh ]; then sh /run.sh; else setsid -c sh; fi
echo "guest: ends with $?"
poweroff -f
