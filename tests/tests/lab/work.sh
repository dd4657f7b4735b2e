# What a Linux guest does while it is moved: the words behind work= on its kernel's command line. It has a network card, and a disk if it is
# to write on one.
#
# Its console says: "T UPTIME EPOCH" twice a second; "checked N" when its memory held what it must; "packed N" when the same was compressed to
# the same; "wrote N" when file N is durable on its disk; and "BROKEN …" when anything is wrong. Port 5000 is a key-value server, port 5001 gives
# the kernel's log, port 5002 ends the guest.
work=$(sed -n 's/.*work=\([a-z,]*\).*/\1/p' /proc/cmdline)
does() {
  case ",$work," in *",$1,"*) return 0 ;; esac
  return 1
}

ip addr add 10.78.0.100/24 dev eth0
ip link set eth0 up

printf '#!/bin/sh\ndmesg\n' >/tmp/log
printf '#!/bin/sh\ntouch /tmp/stop\n' >/tmp/end
chmod +x /tmp/log /tmp/end
nc -ll -p 5001 -e /tmp/log &
nc -ll -p 5002 -e /tmp/end &

while sleep 0.5; do echo "T $(cut -d ' ' -f 1 /proc/uptime) $(date +%s)"; done &

if does serve; then lab-load serve 5000 & fi
if does memory; then lab-load memory 8 7 & fi

pack() { gzip -c </bin/busybox | sha256sum; }
if does compress; then
  was=$(pack)
  packed=0
  while :; do
    is=$(pack)
    packed=$((packed + 1))
    if [ "$is" = "$was" ]; then echo "packed $packed"; else echo "BROKEN compression: $is, not $was"; fi
  done &
fi

if does write; then
  mkdir -p /mnt
  mount /dev/vda /mnt || echo "BROKEN disk: it cannot be mounted"
fi
# The end of booting, for who reads the kernel's log.
echo "lab: at work" >/dev/kmsg
echo "at work"

file=0
while [ ! -e /tmp/stop ]; do
  if does write; then
    file=$((file + 1))
    head -c 65536 /dev/urandom >/tmp/next
    # fsync(2) before it is said.
    dd if=/tmp/next of="/mnt/$file" bs=64k conv=fsync 2>/dev/null || echo "BROKEN disk: file $file cannot be written"
    echo "$(sha256sum </tmp/next | cut -d ' ' -f 1)  $file" >>/mnt/sums
    echo "wrote $file"
  fi
  sleep 0.1
done
if does write; then
  # From the disk, not from memory.
  umount /mnt && mount /dev/vda /mnt || echo "BROKEN disk: it cannot be mounted again"
  echo "files: $(cd /mnt && sha256sum -c sums | grep -c ': OK$') of $file are right"
  umount /mnt
fi
