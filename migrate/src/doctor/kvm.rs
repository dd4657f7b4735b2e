//! KVM: whether it is here, and what it offers.

use super::check::Check;
use super::files::{Root, shown};
use vmm::dirty::LogMode;
use vmm::host::{Host, KVM_PATH, Offers};

const GROUP: &str = "kvm";

/// Time sources of the kernel that are the TSC itself: with others KVM does not say of which moment a guest's clock is
/// (`gtod_is_based_on_tsc`, arch/x86/kvm/x86.c).
const TSC_SOURCES: [&str; 2] = ["tsc", "hyperv_clocksource_tsc_page"];

/// Modules of KVM that can have guests in guests, as /sys/module has them.
const MODULES: [&str; 2] = ["kvm_amd", "kvm_intel"];

/// What was found.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// What KVM offers, or why it does not.
    offers: Result<Offers, Trouble>,
    /// What the processor calls its virtualisation: `svm`, `vmx`, or nothing.
    virtualisation: Option<&'static str>,
    /// The module, and its parameter `nested`.
    nested: Option<(&'static str, String)>,
    /// What the kernel tells the time by.
    clock_source: Option<String>,
}

/// Why there is no KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Trouble {
    /// No device node.
    NoNode,
    /// A node without a driver behind it.
    NoDriver,
    /// This user may not open it.
    Forbidden,
    /// It is there, and no VM can be made.
    Fails(String),
}

/// Looks.
pub(super) fn look(root: &Root) -> Facts {
    let device = KVM_PATH.trim_start_matches('/');
    let nested = MODULES
        .into_iter()
        .find_map(|module| Some((module, root.line(&format!("sys/module/{module}/parameters/nested"))?)));
    Facts {
        offers: open(root, device),
        virtualisation: virtualisation(&root.read("proc/cpuinfo").unwrap_or_default()),
        nested,
        clock_source: root.line("sys/devices/system/clocksource/clocksource0/current_clocksource"),
    }
}

fn open(root: &Root, device: &str) -> Result<Offers, Trouble> {
    let path = root.path(device);
    if path.exists() && !root.has_driver("kvm") {
        return Err(Trouble::NoDriver);
    }
    Host::open_at(&path).and_then(|host| host.offers()).map_err(|error| match error {
        vmm::Error::NoKvm(_) => Trouble::NoNode,
        vmm::Error::KvmPermission(_) => Trouble::Forbidden,
        other => Trouble::Fails(other.to_string()),
    })
}

/// By the first processor's flags in /proc/cpuinfo.
fn virtualisation(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["svm", "vmx"].into_iter().find(|flag| flags.split_ascii_whitespace().any(|word| word == *flag))
}

/// Judges.
pub(super) fn judge(facts: &Facts) -> Vec<Check> {
    let offers = match &facts.offers {
        Ok(offers) => offers,
        Err(trouble) => return vec![unusable(facts, trouble)],
    };
    vec![usable(offers), dirty_log(offers), tsc(offers), clock(facts, offers), nesting(facts, offers)]
}

fn usable(offers: &Offers) -> Check {
    let found = format!("API version {}, up to {} vCPUs in a VM", offers.api_version, offers.max_vcpus);
    kvm(found).figure("api_version", offers.api_version).figure("max_vcpus", offers.max_vcpus)
}

fn kvm(found: String) -> Check {
    Check::new(GROUP, "kvm", "running a VM", found).required()
}

fn unusable(facts: &Facts, trouble: &Trouble) -> Check {
    let found = match trouble {
        Trouble::NoNode => format!("there is no {KVM_PATH}"),
        Trouble::NoDriver => format!("{KVM_PATH} is there, but no driver behind it"),
        Trouble::Forbidden => format!("this user may not open {KVM_PATH}"),
        Trouble::Fails(why) => shown(why),
    };
    kvm(found).missing(match (trouble, facts.virtualisation) {
        (Trouble::Forbidden, _) => {
            "as root, add the user to the group that owns it (usermod -aG kvm USER), and log in anew; or run as root"
        }
        (Trouble::Fails(_), _) => "end other hypervisors, which may hold the processor; else use a newer kernel",
        (_, Some("svm")) => "load the module, as root: modprobe kvm-amd",
        (_, Some(_)) => "load the module, as root: modprobe kvm-intel",
        (_, None) => {
            "the processor shows neither SVM nor VMX: switch virtualisation on in the firmware; in a VM, let its host offer nested \
             virtualisation; in a container, let it have the device"
        }
    })
}

fn dirty_log(offers: &Offers) -> Check {
    let (word, found, advice) = match offers.dirty_log {
        LogMode::ManualInitiallySet => {
            ("manual-initially-set", "cleared by ranges, and costs nothing to begin", None)
        }
        LogMode::Manual => (
            "manual",
            "cleared by ranges; to begin, all memory is write-protected at once",
            Some("Linux 5.7 or newer begins a move without that pause"),
        ),
        LogMode::Plain => (
            "plain",
            "cleared as a whole when it is read",
            Some("Linux 5.2 or newer clears it by ranges, just before pages are read: fewer are sent twice"),
        ),
    };
    let check =
        Check::new(GROUP, "dirty-log", "finding what a VM writes while it moves", found).figure("mode", word);
    match advice {
        Some(advice) => check.limited(advice),
        None => check,
    }
}

fn tsc(offers: &Offers) -> Check {
    let found = match (offers.tsc_scaling, offers.tsc_deadline) {
        (true, true) => "can run at another rate than the host's; deadline timer",
        (true, false) => "can run at another rate than the host's; no deadline timer",
        (false, true) => "runs at the host's rate alone; deadline timer",
        (false, false) => "runs at the host's rate alone; no deadline timer",
    };
    Check::new(GROUP, "tsc", "taking VMs from hosts whose TSC has another frequency", found)
        .figure("scaling", offers.tsc_scaling)
        .figure("deadline_timer", offers.tsc_deadline)
        .limited_if(
            !offers.tsc_scaling,
            "the processor decides: take VMs from hosts with the same TSC frequency only; others are refused before the first page",
        )
}

fn clock(facts: &Facts, offers: &Offers) -> Check {
    let source = facts.clock_source.as_deref().unwrap_or("unknown");
    let trusted = TSC_SOURCES.contains(&source);
    let exact = offers.clock_realtime && trusted;
    let advice = match offers.clock_realtime {
        false => "Linux 5.16 or newer says of which moment a guest's clock is",
        true => {
            "the kernel does not tell the time by the TSC: dmesg says why, if it was found unstable; in a VM its host decides"
        }
    };
    let known = if offers.clock_realtime { "known" } else { "not known" };
    let found =
        format!("the moment of a guest's clock is {known} to KVM, the host's time comes from {source}");
    Check::new(GROUP, "clock", "a guest's clock and TSC that go on exactly behind a move", found)
        .figure("realtime", offers.clock_realtime)
        .figure("source", source)
        .limited_if(!exact, advice)
}

fn nesting(facts: &Facts, offers: &Offers) -> Check {
    let parameter = facts.nested.as_ref().map(|(module, value)| format!("{module} nested={value}"));
    let found = match (offers.nesting, &parameter) {
        (true, Some(parameter)) => format!("guests may have guests ({parameter})"),
        (true, None) => "guests may have guests".into(),
        (false, Some(parameter)) => format!("guests cannot have guests ({parameter})"),
        (false, None) => "guests cannot have guests".into(),
    };
    let advice = match &facts.nested {
        Some((module, value)) if !matches!(value.as_str(), "Y" | "1") => {
            format!("while no VM runs, load the module {module} with nested=1 (a line in /etc/modprobe.d)")
        }
        _ => "this host's KVM has no nested state: run guests with --nested elsewhere".into(),
    };
    let check = Check::new(GROUP, "nesting", "vm run --nested, and taking such VMs", found)
        .figure("offered", offers.nesting)
        .limited_if(!offers.nesting, advice);
    match &facts.nested {
        Some((_, value)) => check.figure("parameter", value.as_str()),
        None => check,
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::super::files;
    use super::*;

    fn offers() -> Offers {
        Offers {
            api_version: 12,
            max_vcpus: 1024,
            dirty_log: LogMode::ManualInitiallySet,
            tsc_scaling: true,
            tsc_deadline: true,
            clock_realtime: true,
            nesting: true,
        }
    }

    fn host(offers: Offers) -> Facts {
        Facts {
            offers: Ok(offers),
            virtualisation: Some("svm"),
            nested: Some(("kvm_amd", "1".into())),
            clock_source: Some("tsc".into()),
        }
    }

    fn check(facts: &Facts, name: &str) -> Check {
        judge(facts).into_iter().find(|check| check.name == name).unwrap()
    }

    #[test]
    fn a_host_that_has_everything_is_well() {
        let checks = judge(&host(offers()));
        assert_eq!(checks.len(), 5);
        for check in checks {
            assert_eq!((check.verdict, check.advice), (Verdict::Ok, None), "{}", check.name);
        }
    }

    #[test]
    fn without_kvm_there_is_one_check_and_it_says_what_to_do() {
        for (trouble, virtualisation, found, advice) in [
            (Trouble::NoNode, Some("svm"), "no /dev/kvm", "kvm-amd"),
            (Trouble::NoDriver, Some("vmx"), "no driver", "kvm-intel"),
            (Trouble::NoDriver, None, "no driver", "firmware"),
            (Trouble::NoNode, None, "no /dev/kvm", "neither SVM nor VMX"),
            (Trouble::Forbidden, None, "may not open", "group"),
            (Trouble::Fails("busy\x1b".into()), Some("vmx"), "busy?", "other hypervisors"),
        ] {
            let facts = Facts { offers: Err(trouble), virtualisation, ..host(offers()) };
            let checks = judge(&facts);
            assert_eq!(checks.len(), 1);
            let check = &checks[0];
            assert_eq!((check.name, check.verdict, check.required), ("kvm", Verdict::Missing, true));
            assert!(check.found.contains(found), "{check:?}");
            assert!(check.advice.as_ref().unwrap().contains(advice), "{check:?}");
        }
    }

    #[test]
    fn what_kvm_lacks_limits_it() {
        for (lacking, name, advice) in [
            (Offers { dirty_log: LogMode::Manual, ..offers() }, "dirty-log", "5.7"),
            (Offers { dirty_log: LogMode::Plain, ..offers() }, "dirty-log", "5.2"),
            (Offers { tsc_scaling: false, ..offers() }, "tsc", "same TSC frequency"),
            (Offers { clock_realtime: false, ..offers() }, "clock", "5.16"),
            (Offers { nesting: false, ..offers() }, "nesting", "no nested state"),
        ] {
            let facts = host(lacking);
            for check in judge(&facts) {
                let expected = if check.name == name { Verdict::Limited } else { Verdict::Ok };
                assert_eq!(check.verdict, expected, "{check:?}");
            }
            assert!(check(&facts, name).advice.unwrap().contains(advice));
        }
        for source in [None, Some("kvm-clock".to_owned())] {
            let facts = Facts { clock_source: source, ..host(offers()) };
            assert_eq!(check(&facts, "clock").verdict, Verdict::Limited);
        }
        let nested = Some(("kvm_intel", "N".to_owned()));
        let facts = Facts { nested, ..host(Offers { nesting: false, ..offers() }) };
        assert!(check(&facts, "nesting").advice.unwrap().contains("kvm_intel with nested=1"));
    }

    #[test]
    fn a_processor_is_known_by_its_flags() {
        assert_eq!(virtualisation("vendor_id: x\nflags\t\t: fpu svm sse\nflags: vmx\n"), Some("svm"));
        assert_eq!(virtualisation("vmx flags: vmx\nflags : fpu vmx"), Some("vmx"));
        for text in ["", "flags", "flags: svmx svm_lock", "bugs: vmx"] {
            assert_eq!(virtualisation(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_files_of_another_host_are_read() {
        let parent = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| files::write(parent.path(), path, text);
        write("proc/cpuinfo", "flags : vmx\n");
        write("sys/module/kvm_intel/parameters/nested", "Y\n");
        write("sys/class/misc/tun/dev", "10:200\n");
        let facts = look(&Root::new(parent.path()));
        assert_eq!(facts.offers, Err(Trouble::NoNode));
        assert_eq!(facts.virtualisation, Some("vmx"));
        assert_eq!(facts.nested, Some(("kvm_intel", "Y".into())));
        write("dev/kvm", "");
        assert_eq!(look(&Root::new(parent.path())).offers, Err(Trouble::NoDriver));
        write("sys/class/misc/kvm/dev", "10:232\n");
        assert!(
            matches!(look(&Root::new(parent.path())).offers, Err(Trouble::Fails(_))),
            "a file that is not KVM"
        );
    }
}
