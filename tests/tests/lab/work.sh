# What a Linux guest does while it is moved. It has a network card, and a disk if it is to write on one.
#
# Its console says: "T UPTIME EPOCH" twice a second; "kept N" when its memory held what was in it, and "BROKEN …" when not; "wrote N" when
# file N is durable on its disk. Port 5000 echoes, port 5001 gives the kernel's log, port 5002 ends the guest.
ip addr add 10.78.0.100/24 dev eth0
ip link set eth0 up

printf '#!/bin/sh\ndmesg\n' >/tmp/log
printf '#!/bin/sh\ntouch /tmp/stop\n' >/tmp/end
chmod +x /tmp/log /tmp/end
nc -ll -p 5000 -e /bin/cat &
nc -ll -p 5001 -e /tmp/log &
nc -ll -p 5002 -e /tmp/end &

while sleep 0.5; do echo "T $(cut -d ' ' -f 1 /proc/uptime) $(date +%s)"; done &

head -c 4194304 /dev/urandom >/tmp/kept
was=$(sha256sum </tmp/kept)
checked=0
while sleep 1; do
  checked=$((checked + 1))
  is=$(sha256sum </tmp/kept)
  if [ "$is" = "$was" ]; then echo "kept $checked"; else echo "BROKEN memory: $is, not $was"; fi
done &

if [ -b /dev/vda ]; then
  mkdir -p /mnt
  mount /dev/vda /mnt || echo "BROKEN disk: it cannot be mounted"
fi
# The end of booting, for who reads the kernel's log.
echo "lab: at work" >/dev/kmsg
echo "at work"

file=0
while [ ! -e /tmp/stop ]; do
  if [ -b /dev/vda ]; then
    file=$((file + 1))
    head -c 65536 /dev/urandom >"/mnt/$file"
    (cd /mnt && sha256sum "$file") >>/mnt/sums
    sync
    echo "wrote $file"
  fi
  sleep 0.1
done
if [ -b /dev/vda ]; then
  # From the disk, not from memory.
  umount /mnt && mount /dev/vda /mnt || echo "BROKEN disk: it cannot be mounted again"
  echo "files: $(cd /mnt && sha256sum -c sums | grep -c ': OK$') of $file are right"
  umount /mnt
fi
