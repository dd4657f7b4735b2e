#!/bin/busybox sh
# The first program of a host of the laboratory. The kernel's command line says which host it is.
if [ "$1" != moved ]; then
  # Nothing can take the place of the first file system as the root of a container (pivot_root(2)); so this goes on in another.
  /bin/busybox mkdir /root.new
  /bin/busybox mount -t tmpfs root /root.new
  for part in /*; do
    [ "$part" = /root.new ] || /bin/busybox cp -a "$part" /root.new/
  done
  exec /bin/busybox switch_root /root.new /init moved
fi
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
while read -r module; do insmod "/lib/modules/$module"; done </lib/modules/order

number=$(sed -n 's/.*lab\.host=\([0-9]*\).*/\1/p' /proc/cmdline)
hostname "host$number"
echo '127.0.0.1 localhost' >/etc/hosts
for other in $(seq 1 9); do echo "10.78.0.$other host$other" >>/etc/hosts; done
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
# The private network is behind a bridge, so that taps of guests can be added to it.
brctl addbr br0
ip link set eth1 up
brctl addif br0 eth1
# Else it is the lowest of its ports' addresses, which changes when a tap comes or goes, and the other hosts talk to nobody.
ip link set br0 address "$(cat /sys/class/net/eth1/address)"
# Else it would be as small as the smallest tap's.
ip link set br0 mtu "$(cat /sys/class/net/eth1/mtu)"
ip addr add "10.78.0.$number/24" dev br0
ip addr add "fd78::$number/64" dev br0 nodad
ip link set br0 up
# What migrate asks for: see docs/operating.md.
echo 33554432 >/proc/sys/net/core/rmem_max
echo 33554432 >/proc/sys/net/core/wmem_max

lab agent
echo "the agent ended with $?: so does the host"
poweroff -f
