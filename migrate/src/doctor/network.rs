//! The network: what a link's socket gets, and whether guests can have network cards.

use super::check::Check;
use super::files::Root;
use crate::link::quic::{Settings, SocketOffers, try_socket};
use crate::units::show_bytes;
use std::io;

const GROUP: &str = "network";

/// What was found.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// What a socket made as a link makes one got, or why there is none.
    socket: Result<SocketOffers, String>,
    /// The kernel's limits on buffers, in bytes.
    rmem_max: Option<u64>,
    wmem_max: Option<u64>,
    tun: Tun,
}

/// How the device of taps is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tun {
    Opens,
    /// Its driver is a module that was not needed so far.
    NotLoaded,
    None,
    Forbidden,
    Fails(io::ErrorKind),
}

/// Looks.
pub(super) fn look(root: &Root) -> Facts {
    Facts {
        socket: try_socket(&Settings::default()).map_err(|error| error.to_string()),
        rmem_max: root.number("proc/sys/net/core/rmem_max"),
        wmem_max: root.number("proc/sys/net/core/wmem_max"),
        tun: tun(root),
    }
}

/// What is opened and attached to nothing makes no network card.
fn tun(root: &Root) -> Tun {
    let device = "dev/net/tun";
    if root.path(device).exists() && !root.has_driver("tun") {
        return Tun::NotLoaded;
    }
    match root.may_open(device).map_err(|error| error.kind()) {
        Ok(()) => Tun::Opens,
        Err(io::ErrorKind::NotFound) => Tun::None,
        Err(io::ErrorKind::PermissionDenied) => Tun::Forbidden,
        Err(other) => Tun::Fails(other),
    }
}

/// Judges.
pub(super) fn judge(facts: &Facts) -> Vec<Check> {
    let mut checks = match &facts.socket {
        Ok(offers) => vec![buffers(facts, offers), segments(offers)],
        Err(why) => vec![no_socket(why)],
    };
    checks.push(tap(facts.tun));
    checks
}

fn socket(found: String) -> Check {
    Check::new(GROUP, "socket-buffers", "moving VMs, and losing no packets when links are fast", found)
        .required()
}

fn no_socket(why: &str) -> Check {
    socket(super::files::shown(why))
        .missing("let this user make UDP sockets on the loopback interface (ip link set lo up)")
}

fn buffers(facts: &Facts, offers: &SocketOffers) -> Check {
    let buffers = &offers.buffers;
    let show = |bytes: usize| show_bytes(bytes as u64);
    let found = format!(
        "{} to receive, {} to send; a link asks for {}",
        show(buffers.receive_bytes),
        show(buffers.send_bytes),
        show(buffers.asked_bytes)
    );
    socket(found)
        .figure("asked_bytes", buffers.asked_bytes)
        .figure("receive_bytes", buffers.receive_bytes)
        .figure("send_bytes", buffers.send_bytes)
        .figure("rmem_max_bytes", facts.rmem_max)
        .figure("wmem_max_bytes", facts.wmem_max)
        .limited_if(buffers.are_small(), buffers.remedy())
}

fn segments(offers: &SocketOffers) -> Check {
    let (send, receive) = (offers.send_segments, offers.receive_segments);
    let found = format!("{send} packets in a call to send (GSO), {receive} to receive (GRO)");
    Check::new(GROUP, "segmentation", "sending and receiving many packets at the price of one", found)
        .figure("send_segments", send)
        .figure("receive_segments", receive)
        .limited_if(
            send < 2 || receive < 2,
            "Linux 5.0 or newer does both; until then a link costs more of a core",
        )
}

fn tap(tun: Tun) -> Check {
    let found = match tun {
        Tun::Opens => "/dev/net/tun may be opened".into(),
        Tun::NotLoaded => "/dev/net/tun is there, its driver is not loaded yet".into(),
        Tun::None => "there is no /dev/net/tun".into(),
        Tun::Forbidden => "this user may not open /dev/net/tun".into(),
        Tun::Fails(kind) => format!("/dev/net/tun cannot be opened: {kind}"),
    };
    let check = Check::new(GROUP, "tap", "network cards of guests (--net tap=NAME)", found);
    match tun {
        Tun::Opens => check,
        Tun::NotLoaded => check.limited("as root: modprobe tun; the first tap that is made loads it, too"),
        Tun::None | Tun::Fails(_) => {
            check.missing("as root: modprobe tun; in a container, let it have the device")
        }
        Tun::Forbidden => {
            check.missing("run as root, or let this user read and write /dev/net/tun (usually mode 0666)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;
    use crate::link::quic::Buffers;

    fn offers(got: usize, held_by: &[&'static str]) -> SocketOffers {
        let buffers =
            Buffers { asked_bytes: 32 << 20, receive_bytes: got, send_bytes: got, held_by: held_by.to_vec() };
        SocketOffers { buffers, send_segments: 64, receive_segments: 64 }
    }

    fn host(socket: Result<SocketOffers, String>) -> Facts {
        Facts { socket, rmem_max: Some(212_992), wmem_max: None, tun: Tun::Opens }
    }

    #[test]
    fn small_buffers_are_named_with_the_settings_that_hold_them() {
        let checks = judge(&host(Ok(offers(64 << 20, &[]))));
        assert!(checks.iter().all(|check| check.verdict == Verdict::Ok), "{checks:?}");
        // Less than was asked for, and enough.
        let checks = judge(&host(Ok(offers(8 << 20, &["net.core.rmem_max"]))));
        assert_eq!(checks[0].verdict, Verdict::Ok);
        let checks = judge(&host(Ok(offers(425_984, &["net.core.rmem_max"]))));
        assert_eq!(checks[0].verdict, Verdict::Limited);
        let advice = checks[0].advice.as_ref().unwrap();
        assert!(advice.contains("net.core.rmem_max=33554432") && !advice.contains("wmem"), "{advice}");
        assert_eq!(checks[0].figures["rmem_max_bytes"], 212_992);
        assert!(checks[0].figures["wmem_max_bytes"].is_null());
    }

    #[test]
    fn a_host_without_sockets_is_unsuitable_and_one_without_offloads_is_slow() {
        let checks = judge(&host(Err("\x1bno".into())));
        assert_eq!((checks[0].verdict, checks[0].required), (Verdict::Missing, true));
        assert_eq!(checks[0].found, "?no");
        let slow = SocketOffers { send_segments: 1, ..offers(64 << 20, &[]) };
        let checks = judge(&host(Ok(slow)));
        assert_eq!((checks[1].name, checks[1].verdict), ("segmentation", Verdict::Limited));
    }

    #[test]
    fn a_tap_is_told_from_its_device() {
        for (tun, verdict, advice) in [
            (Tun::NotLoaded, Verdict::Limited, "modprobe"),
            (Tun::None, Verdict::Missing, "container"),
            (Tun::Forbidden, Verdict::Missing, "root"),
            (Tun::Fails(io::ErrorKind::Other), Verdict::Missing, "modprobe"),
        ] {
            let check = tap(tun);
            assert_eq!((check.verdict, check.required), (verdict, false));
            assert!(check.advice.unwrap().contains(advice), "{tun:?}");
        }
        let parent = tempfile::tempdir().unwrap();
        let root = Root::new(parent.path());
        assert_eq!(tun(&root), Tun::None);
        std::fs::create_dir_all(parent.path().join("dev/net")).unwrap();
        std::fs::write(parent.path().join("dev/net/tun"), "").unwrap();
        assert_eq!(tun(&root), Tun::Opens);
        std::fs::create_dir_all(parent.path().join("sys/class/misc/kvm")).unwrap();
        assert_eq!(tun(&root), Tun::NotLoaded);
    }
}
