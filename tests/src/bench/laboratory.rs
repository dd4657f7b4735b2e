//! Linux guests in a laboratory: ours beside QEMU's microvm in the same host, and beside the ledger. An emulated host is slow, so only
//! ratios within one run mean anything.

use super::Options;
use super::figures::{described, summary};
use super::targets::{self, verdict};
use crate::Host;
use crate::host::{Bench, Place, introduce};
use crate::lab::keeper::READY;
use crate::lab::{Lab, image};
use serde_json::{Value, json};
use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What QEMU's microvm needs of its own, beside its program (Debian's qemu-system-data and seabios).
const FIRMWARE: &[&str] = &["bios-microvm.bin", "linuxboot_dma.bin", "kvmvapic.bin"];

/// A disk is written and read as a whole, a MiB at a time, past the guest's cache; of three passes the best counts. The guest says when each began
/// and ended, on its own clock.
const DISK: &str = "
now() { cut -d ' ' -f 1 /proc/uptime; }
for pass in 1 2 3; do
  begun=$(now); dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct; echo \"write $begun $(now)\"
  begun=$(now); dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct; echo \"read $begun $(now)\"
done
echo measured";

/// Megabytes a second that both guests dirty while they move, in 16 MiB.
const DIRTY_MB_PER_S: u32 = 4;

/// The bounds: disk throughput by QEMU's, downtime by the ledger's, boot by a microvm's, CPU of a VMM whose guest is idle.
const DISK_SHARE: f64 = 0.7;
const DOWNTIME_SHARE: f64 = 1.5;
const BOOT_SHARE: f64 = 1.2;
const IDLE_PERCENT: f64 = 1.0;

/// A laboratory of two hosts, as long as this lives.
struct Site {
    hosts: [Host; 2],
    // Last: the hosts end in it what they left running.
    _keeper: Keeper,
}

/// Ends the laboratory when it is dropped.
struct Keeper {
    process: Child,
    folder: PathBuf,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The end of its input is the keeper's.
        drop(self.process.stdin.take());
        self.process.wait().ok();
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

impl Site {
    fn up(program: &Path) -> Self {
        let own = std::env::current_exe().expect("the benchmark's own file");
        let beside = |name: &str| own.with_file_name(name);
        let folder = std::env::temp_dir().join(format!("migrate-e2e-{}-bench-lab", std::process::id()));
        let mut command = Command::new(beside("lab"));
        command.arg("--folder").arg(&folder).args(["keep", "--discard", "--hours", "1"]);
        for (name, path) in [("migrate", program), ("lab-load", &beside("lab-load"))] {
            command.arg("--program").arg(format!("{name}={}", path.display()));
        }
        command.args(["--program", "/usr/bin/qemu-system-x86_64"]);
        let process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let process = process.expect("the laboratory's program can be started");
        let mut keeper = Keeper { process, folder: folder.clone() };
        let said = std::io::BufReader::new(keeper.process.stdout.take().expect("stdout is piped"));
        let ready = said.lines().map_while(Result::ok).any(|line| line == READY);
        assert!(ready, "the laboratory does not come up");
        let lab = Lab::open(&folder).expect("it is up");
        let hosts = [0, 1].map(|index| {
            let host = &lab.hosts[index];
            Host::new(program).moved_to(Place::Machine(Bench {
                program: beside("lab"),
                folder: folder.clone(),
                machine: host.name.clone(),
                ip: host.ip.clone(),
            }))
        });
        introduce(&hosts[0], &hosts[1]);
        let site = Self { hosts, _keeper: keeper };
        site.sh("mkdir -p /bench && truncate -s 64M /bench/disk");
        for name in FIRMWARE {
            lab.put(&lab.hosts[0], &Path::new("/usr/share/qemu").join(name), "/bench").expect("firmware");
        }
        let scratch = tempfile::tempdir().expect("a directory");
        let dirty = format!("lab-load dirty 16 {DIRTY_MB_PER_S}");
        let load = image::Program { name: "lab-load".into(), path: beside("lab-load") };
        for (name, script, programs) in
            [("idle", "sleep 100000", &[][..]), ("disk", DISK, &[]), ("dirty", &*dirty, &[load])]
        {
            let addition = image::script(script, programs, scratch.path()).expect("an archive");
            let file = scratch.path().join(format!("{name}.cpio"));
            std::fs::write(&file, addition).expect("a file");
            lab.put(&lab.hosts[0], &file, "/bench").expect("an addition");
            site.sh(&format!("cat /boot/initramfs /bench/{name}.cpio >/bench/{name}.img"));
        }
        site
    }

    /// A shell's output on the first host.
    fn sh(&self, script: &str) -> String {
        let mut command = self.hosts[0].there(Path::new("sh"));
        let done = command.args(["-c", script]).stdin(Stdio::null()).output().expect("it can be started");
        assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// Starts a guest with this image, waits until its console says so, does what `then` says, and ends it.
    fn guest(&self, vmm: &str, image: &str, says: &str, then: &str) -> String {
        let line = "console=ttyS0 quiet panic=-1";
        let command = match vmm {
            "ours" => format!(
                "migrate vm run --name bench --runtime-dir /bench/run --memory 256MiB --kernel /boot/vmlinuz --initrd {image} \
                 --cmdline '{line}' --serial /bench/console --disk /bench/disk"
            ),
            _ => format!(
                "qemu-system-x86_64 -L /bench -nodefaults -no-user-config -display none -no-reboot -machine microvm -accel kvm \
                 -cpu host,-svm -m 256 -kernel /boot/vmlinuz -initrd {image} -append '{line}' -serial file:/bench/console \
                 -drive id=d,file=/bench/disk,format=raw,if=none -device virtio-blk-device,drive=d"
            ),
        };
        self.sh(&format!(
            "now() {{ cut -d ' ' -f 1 /proc/uptime; }}
             cpu() {{ set -- $(sed 's/.*) //' /proc/$vmm/stat); echo $((${{12}} + ${{13}})); }}
             rm -rf /bench/run /bench/console; mkdir -m 700 /bench/run
             begun=$(now)
             {command} >/bench/said 2>&1 &
             vmm=$!
             until grep -q '{says}' /bench/console 2>/dev/null; do
               if ! kill -0 $vmm; then cat /bench/said /bench/console >&2; exit 1; fi
               sleep 0.05
             done
             up=$(now)
             {then}
             kill -KILL $vmm"
        ))
    }

    /// How long a guest takes to its userspace, and how much of a processor its VMM takes when it is idle.
    fn boot(&self, vmm: &str) -> Value {
        let then = "sleep 3; before=$(cpu); sleep 10; echo $begun $up $before $(cpu)";
        let said = self.guest(vmm, "/bench/idle.img", "guest: up", then);
        let numbers: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [begun, up, before, after] = numbers[..] else { panic!("no figures: {said}") };
        // A hundredth of a second is a tick (USER_HZ), and ten seconds a thousand of them.
        json!({"boot_ms": ((up - begun) * 1e3).round(), "idle_cpu_percent": (after - before) / 10.0})
    }

    fn disk(&self, vmm: &str) -> Value {
        let said = self.guest(vmm, "/bench/disk.img", "measured", "cat /bench/console");
        let best = |kind: &str| {
            let seconds = said.lines().filter_map(|line| {
                let (begun, ended) = line.trim().strip_prefix(kind)?.split_once(' ')?;
                Some(ended.parse::<f64>().ok()? - begun.parse::<f64>().ok()?)
            });
            let least = seconds.fold(f64::INFINITY, f64::min);
            assert!(least.is_finite(), "no figures: {said}");
            f64::from(64 << 20) / 1e6 / least
        };
        json!({"write_mb_per_s": best("write "), "read_mb_per_s": best("read ")})
    }

    /// The downtime of one move from the first host to the second.
    fn downtime(&self, linux: bool) -> Value {
        let [a, b] = &self.hosts;
        if linux {
            let fixed =
                ["vm", "run", "--detach", "--name", "v", "--memory", "192MiB", "--kernel", "/boot/vmlinuz"];
            let more = ["--initrd", "/bench/dirty.img", "--cmdline", "console=ttyS0 quiet panic=-1"];
            a.run(&[&fixed[..], &more].concat()).success();
            let until = std::time::Instant::now() + a.step_limit();
            while !a.log("v").contains("dirtying") {
                assert!(std::time::Instant::now() < until, "the guest does not come up: {}", a.log("v"));
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        } else {
            let line = format!("fill=16M ws=16M rate={DIRTY_MB_PER_S}");
            a.run_ledger("v", "192MiB", &line, &[]);
            a.wait_ledger_running("v");
        }
        let (receiver, address) = b.receive(&[]);
        let limits = ["--downtime", "500ms", "--max-rounds", "8", "--on-timeout", "force"];
        let sent = a.run(&[&["send", "v", &address][..], &limits].concat()).success();
        receiver.finish().success();
        b.run(&["vm", "stop", "v"]).success();
        b.wait_phase("v", None);
        let report = sent.event("report").expect("a report");
        json!({
            "downtime_us": report["downtime_us"],
            "total_us": report["total_us"],
            "rounds": report["rounds"].as_array().map(Vec::len),
        })
    }
}

/// Measures in turn, and says whether what was aimed at is met.
pub(super) fn run(options: &Options) -> Value {
    let site = Site::up(&options.program);
    let names = ["boot-ours", "boot-qemu", "disk-ours", "disk-qemu", "downtime-linux", "downtime-ledger"];
    let wanted: Vec<_> = names.into_iter().filter(|name| options.wants(name)).collect();
    let mut samples = vec![Vec::new(); wanted.len()];
    for run in 0..options.runs {
        for (name, samples) in wanted.iter().zip(&mut samples) {
            let sample = match *name {
                "boot-ours" => site.boot("ours"),
                "boot-qemu" => site.boot("qemu"),
                "disk-ours" => site.disk("ours"),
                "disk-qemu" => site.disk("qemu"),
                name => site.downtime(name == "downtime-linux"),
            };
            eprintln!("{name} run {run}: {sample}");
            samples.push(sample);
        }
    }
    let results: Value =
        wanted.iter().zip(&samples).map(|(name, all)| ((*name).to_owned(), summary(all))).collect();
    let verdicts = judge(&results);
    if !options.json {
        targets::print(&verdicts);
    }
    let samples: Value =
        wanted.iter().zip(samples).map(|(name, all)| ((*name).to_owned(), Value::from(all))).collect();
    described(options, &json!({"laboratory": results, "samples": samples, "targets": verdicts}))
}

fn judge(results: &Value) -> Vec<Value> {
    let median = |case: &str, name: &str| results[case][name]["median"].as_f64();
    let share = |case: &str, name: &str, share: f64| median(case, name).map(|other| other * share);
    [
        verdict(
            "time to Linux userspace, by QEMU microvm's",
            "ms",
            median("boot-ours", "boot_ms"),
            share("boot-qemu", "boot_ms", BOOT_SHARE),
            false,
        ),
        verdict(
            "CPU of the VMM of an idle Linux",
            "%",
            median("boot-ours", "idle_cpu_percent"),
            Some(IDLE_PERCENT),
            false,
        ),
        verdict(
            "disk writes, by QEMU's",
            "MB/s",
            median("disk-ours", "write_mb_per_s"),
            share("disk-qemu", "write_mb_per_s", DISK_SHARE),
            true,
        ),
        verdict(
            "disk reads, by QEMU's",
            "MB/s",
            median("disk-ours", "read_mb_per_s"),
            share("disk-qemu", "read_mb_per_s", DISK_SHARE),
            true,
        ),
        verdict(
            "downtime of Linux, by the ledger's",
            "us",
            median("downtime-linux", "downtime_us"),
            share("downtime-ledger", "downtime_us", DOWNTIME_SHARE),
            false,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_is_a_share_of_the_other_s_figure() {
        let of = |name: &str, median: f64| {
            let mut figures = json!({});
            figures[name] = json!({ "median": median });
            figures
        };
        let results = json!({
            "boot-ours": of("boot_ms", 1190.0), "boot-qemu": of("boot_ms", 1000.0),
            "disk-ours": of("read_mb_per_s", 69.0), "disk-qemu": of("read_mb_per_s", 100.0),
            "downtime-linux": of("downtime_us", 151.0), "downtime-ledger": of("downtime_us", 100.0),
        });
        let met: Vec<_> = judge(&results).iter().map(|verdict| verdict["met"] == true).collect();
        assert_eq!(met, [true, false, false]);
    }
}
