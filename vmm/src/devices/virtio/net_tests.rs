//! The network device between the mock driver and a real tap of this host.

use std::{cell::RefCell, net::UdpSocket, path::Path, process::Command, time::Duration};

use super::{
    MacAddress,
    mock::{DATA, Driver, MEMORY, chain, memory, part},
    net::Net,
    state::Saved,
    tap::{HEADER, Tap, check},
};
use crate::device::Device;

const MERGE: u64 = 1 << 15;
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// A tap with an address, gone with the test. Its neighbour is the guest.
struct Interface {
    name: String,
    host: String,
    guest: [u8; 4],
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

impl Interface {
    /// `None` where this process may not make one, and the test says so.
    fn make(number: u8) -> Option<Self> {
        let root = rustix::process::geteuid().is_root();
        if !root || !Path::new("/dev/net/tun").exists() {
            eprintln!("not tested: no tap can be made here");
            return None;
        }
        let pid = std::process::id();
        let name = format!("mig{pid}n{number}");
        // Of 198.18.0.0/15, which is for tests (RFC 2544), four addresses by process and test, of which there are at most eight.
        assert!(number < 8);
        let net = [18 + (pid >> 11 & 1) as u8, (pid >> 3) as u8, (pid << 5) as u8 | number << 2];
        let guest = [198, net[0], net[1], net[2] + 2];
        let host = format!("198.{}.{}.{}", net[0], net[1], net[2] + 1);
        ip(&format!("tuntap add {name} mode tap"));
        let interface = Self { name, host, guest };
        let name = &interface.name;
        ip(&format!("addr add {}/30 dev {name}", interface.host));
        ip(&format!("link set {name} up"));
        let [a, b, c, d] = guest;
        ip(&format!("neigh add {a}.{b}.{c}.{d} lladdr 02:00:00:00:00:07 dev {name} nud permanent"));
        Some(interface)
    }

    fn driver(&self) -> Driver {
        let net = Net::new("net0".into(), self.name.clone(), MacAddress(MAC));
        Driver::new(memory(), Box::new(net))
    }

    fn socket(&self) -> UdpSocket {
        let socket = UdpSocket::bind((self.host.as_str(), 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    }

    /// Hears what comes out of the tap on this host's side.
    fn capture(&self) -> Capture {
        Capture::of(&self.name)
    }

    fn mac(&self) -> [u8; 6] {
        let text = std::fs::read_to_string(format!("/sys/class/net/{}/address", self.name)).unwrap();
        text.trim().parse::<MacAddress>().unwrap().0
    }

    /// A datagram from the guest, with its virtio header.
    fn frame(&self, port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; HEADER];
        frame.extend(self.mac());
        frame.extend(MAC);
        frame.extend([8, 0]);
        let mut header = vec![0x45, 0];
        header.extend((28 + payload.len() as u16).to_be_bytes());
        header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        header.extend(self.guest);
        header.extend(self.host.split('.').map(|part| part.parse::<u8>().unwrap()));
        let sum: u32 = header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(header);
        frame.extend(4000_u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend((8 + payload.len() as u16).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(payload);
        frame
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        ip(&format!("tuntap del {} mode tap", self.name));
    }
}

/// A bridge with the tap, and what is passed on from there to another tap.
struct Capture {
    bridge: String,
    name: String,
    tap: Tap,
    frames: RefCell<Vec<Vec<u8>>>,
}

impl Capture {
    fn of(tap: &str) -> Self {
        let (bridge, name) = (format!("{tap}b"), format!("{tap}w"));
        ip(&format!("link add {bridge} type bridge"));
        ip(&format!("tuntap add {name} mode tap"));
        let captured = Tap::open(&name).unwrap();
        for port in [tap, &name] {
            ip(&format!("link set {port} master {bridge} up"));
        }
        ip(&format!("link set {bridge} up"));
        Self { bridge, name, tap: captured, frames: RefCell::default() }
    }

    /// How many frames came that begin so.
    fn heard(&self, start: &[u8]) -> usize {
        let mut buffer = [0; 2048];
        let mut frames = self.frames.borrow_mut();
        while let Some(bytes) = self.tap.receive(&mut buffer).unwrap() {
            frames.push(buffer[HEADER..bytes].to_vec());
        }
        frames.iter().filter(|frame| frame.starts_with(start)).count()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        ip(&format!("link del {}", self.bridge));
        // Its tap is still open.
        ip(&format!("link del {}", self.name));
    }
}

/// Where the datagram begins behind the headers of Ethernet, IPv4 and UDP.
const PAYLOAD: usize = HEADER + 14 + 20 + 8;

fn datagram(driver: &Driver, at: u64, bytes: u32) -> Option<Vec<u8>> {
    let frame = driver.peek(at, bytes as usize);
    (frame.get(HEADER + 12..HEADER + 14) == Some(&[8, 0]) && frame.get(HEADER + 23) == Some(&17))
        .then(|| frame[PAYLOAD..].to_vec())
}

/// Waits for a datagram in one of the buffers, which lie one after another; others' frames are ignored.
fn wait_for_datagram(driver: &mut Driver, buffer_bytes: u64) -> Vec<u8> {
    let mut found = None;
    driver.wait("a datagram", |driver| {
        for (head, bytes) in driver.answers(RECEIVE) {
            found = found.take().or_else(|| datagram(driver, DATA + u64::from(head) * buffer_bytes, bytes));
        }
        found.is_some()
    });
    found.unwrap()
}

fn offer_buffers(driver: &mut Driver, count: u16, bytes: u64) {
    for head in 0..count {
        driver.submit(RECEIVE, head, &chain(head, &[(DATA + u64::from(head) * bytes, bytes as u32, true)]));
    }
    driver.notify(RECEIVE);
}

#[test]
fn frames_go_both_ways_and_are_marked() {
    let Some(interface) = Interface::make(0) else { return };
    let mut driver = interface.driver();
    driver.handle.acquire().unwrap();
    driver.handle.resume();
    assert_eq!(driver.start(MERGE, true), 15);
    let mut mac = [0; 6];
    driver.device.read(0x100, &mut mac);
    assert_eq!(mac, MAC);
    let socket = interface.socket();
    let frame = interface.frame(socket.local_addr().unwrap().port(), b"from the guest");
    driver.poke(DATA + 0x10_0000, &frame);
    let pieces = [(DATA + 0x10_0000, 12, false), (DATA + 0x10_000c, frame.len() as u32 - 12, false)];
    driver.submit(TRANSMIT, 0, &chain(0, &pieces));
    driver.notify(TRANSMIT);
    let mut buffer = [0; 64];
    let (bytes, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..bytes], b"from the guest");
    // Sent before there is room: it waits, in the tap or in the device.
    socket.send_to(b"to the guest", from).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    driver.marked();
    offer_buffers(&mut driver, 8, 2048);
    assert_eq!(wait_for_datagram(&mut driver, 2048), b"to the guest");
    assert!(driver.marked().contains(&(DATA / 4096)) && part(0, 2) < DATA);
}

#[test]
fn a_frame_is_spread_over_buffers_where_that_was_agreed_on() {
    let Some(interface) = Interface::make(1) else { return };
    let mut driver = interface.driver();
    driver.handle.acquire().unwrap();
    driver.handle.resume();
    let socket = interface.socket();
    let [a, b, c, d] = interface.guest;
    let guest = format!("{a}.{b}.{c}.{d}:4000");
    let payload: Vec<u8> = (0..1200_u32).map(|byte| byte as u8).collect();
    for event_index in [false, true] {
        driver.start(MERGE, event_index);
        socket.send_to(&payload, &guest).unwrap();
        // Five buffers are not enough for 1254 bytes; the sixth comes later.
        offer_buffers(&mut driver, 5, 212);
        std::thread::sleep(Duration::from_millis(10));
        let mut got = Vec::new();
        driver.submit(RECEIVE, 5, &chain(5, &[(DATA + 5 * 212, 212, true)]));
        driver.notify(RECEIVE);
        driver.wait("six buffers", |driver| {
            got.extend(driver.answers(RECEIVE));
            got.len() >= 6 || got.first().is_some_and(|(_, bytes)| *bytes < 212)
        });
        // The kernel may have sent a short frame of its own in between, and then the datagram had too little room.
        if got.len() == 6 {
            let all = driver.peek(DATA, 6 * 212);
            assert_eq!(u16::from_le_bytes([all[10], all[11]]), 6);
            assert_eq!(got.iter().map(|(_, bytes)| bytes).sum::<u32>() as usize, PAYLOAD + payload.len());
            assert_eq!(all[PAYLOAD..PAYLOAD + payload.len()], payload);
        }
    }
    // Without the agreement one buffer must do; what does not fit is lost, and the next one comes.
    driver.start(0, true);
    offer_buffers(&mut driver, 1, 100);
    socket.send_to(&payload, &guest).unwrap();
    socket.send_to(b"small", &guest).unwrap();
    assert_eq!(wait_for_datagram(&mut driver, 100), b"small");
}

#[test]
fn a_guest_that_arrived_is_announced_and_announces_itself() {
    const ANNOUNCES: u64 = 1 << 21 | 1 << 17 | 1 << 16;
    const CONTROL: u32 = 2;
    let Some(interface) = Interface::make(4) else { return };
    let status = |driver: &mut Driver| {
        let mut status = [0; 2];
        driver.device.read(0x106, &mut status);
        u16::from_le_bytes(status)
    };
    // Where it begins there is nothing to announce.
    let mut source = interface.driver();
    source.handle.acquire().unwrap();
    source.handle.resume();
    assert_eq!(source.start(MERGE | ANNOUNCES, true), 15);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((status(&mut source), source.read(0x060)), (1, 0));
    source.handle.ask_pause();
    source.handle.wait_paused();
    source.handle.release().unwrap();
    let state = source.device.save().unwrap();

    let net = Net::new("net0".into(), interface.name.clone(), MacAddress(MAC));
    let mut driver = Driver::new(source.memory.clone(), Box::new(net));
    driver.device.restore(driver.device.state_version(), &state).unwrap();
    let capture = interface.capture();
    driver.handle.acquire().unwrap();
    driver.handle.resume();
    driver.wait("the guest to be asked", |driver| status(driver) == 3);
    let generation = driver.read(0x0fc);
    assert_eq!(driver.read(0x060) & 2, 2, "a change of the configuration is an interrupt");
    // RARP; Ethernet and IPv4; a request; of and for this card.
    let rarp = [&[0xff; 6][..], &MAC, &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], &MAC].concat();
    driver.wait("two announcements behind the bridge", |_| capture.heard(&rarp) >= 2);
    // Something else than an acknowledgement, one that is cut short, and one.
    let command = |driver: &mut Driver, bytes: &[u8]| {
        driver.poke(DATA, bytes);
        driver.poke(DATA + 0x100, &[7]);
        let pieces = [(DATA, bytes.len() as u32, false), (DATA + 0x100, 1, true)];
        assert_eq!(driver.request(CONTROL, &chain(0, &pieces)), 1);
        driver.peek(DATA + 0x100, 1)[0]
    };
    for bad in [&[3, 1][..], &[3], &[0, 0, 1]] {
        assert_eq!((command(&mut driver, bad), status(&mut driver)), (1, 3), "{bad:?}");
    }
    assert_eq!(command(&mut driver, &[3, 0]), 0);
    assert_ne!(driver.read(0x0fc), generation);
    // The first of the six may come too early for the bridge; behind the last it is not asked any more.
    driver.wait("the last announcement", |driver| {
        command(driver, &[3, 0]);
        capture.heard(&rarp) >= 5
    });
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((command(&mut driver, &[3, 0]), status(&mut driver)), (0, 1));
    // Whoever did not agree on it is not asked.
    driver.start(MERGE, true);
    assert_eq!(status(&mut driver), 1);
}

#[test]
fn a_device_with_fewer_queues_is_restored_as_older_releases_saved_it() {
    let Some(interface) = Interface::make(5) else { return };
    let mut source = interface.driver();
    assert_eq!(source.start(MERGE, true), 15);
    let mut saved = Saved::decode(&source.device.save().unwrap()).unwrap();
    saved.registers.queues.truncate(2);
    let mut driver = interface.driver();
    let restore = |driver: &mut Driver, saved: &Saved| {
        driver.device.restore(driver.device.state_version(), &crate::state::encode(saved).unwrap())
    };
    restore(&mut driver, &saved).unwrap();
    driver.write(0x030, 2);
    assert_eq!((driver.read(0x034), driver.read(0x044)), (64, 0));
    saved.registers.queues.truncate(1);
    let error = restore(&mut driver, &saved).unwrap_err().to_string();
    assert!(error.contains("1 queues"), "{error}");
    // With the feature the third is needed.
    assert_eq!(source.start(MERGE | 1 << 17, true), 15);
    let mut saved = Saved::decode(&source.device.save().unwrap()).unwrap();
    saved.registers.queues.truncate(2);
    restore(&mut driver, &saved).unwrap_err();
}

#[test]
fn a_tap_is_handed_over_and_whoever_has_none_is_refused_by_name() {
    let Some(interface) = Interface::make(2) else { return };
    let (mut here, mut there) = (interface.driver(), interface.driver());
    here.handle.acquire().unwrap();
    let error = there.handle.acquire().unwrap_err().to_string();
    assert!(error.contains("in use") && error.contains(&interface.name), "{error}");
    // Its worker waits for frames, and none comes.
    here.handle.resume();
    assert_eq!(here.start(MERGE, true), 15);
    std::thread::sleep(Duration::from_millis(20));
    here.handle.ask_pause();
    here.handle.wait_paused();
    here.handle.release().unwrap();
    // Another test that starts a program just now has a copy of everything for a moment.
    there.wait("the tap", |there| there.handle.acquire().is_ok());
    for (name, says) in
        [("nosuchtap", "does not exist"), ("lo", "no tap"), ("a/b", "no name"), ("", "no name")]
    {
        let error = check(name).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn garbage_in_both_rings_breaks_the_device_and_not_the_host() {
    let Some(interface) = Interface::make(3) else { return };
    let mut driver = interface.driver();
    driver.handle.acquire().unwrap();
    driver.handle.resume();
    for queue in [RECEIVE, TRANSMIT] {
        driver.start(MERGE, false);
        driver.submit(queue, 0, &[(MEMORY, 4096, 2, 0)]);
        driver.notify(queue);
        // A receive buffer is looked at when there is a frame for it.
        let [a, b, c, d] = interface.guest;
        interface.socket().send_to(b"x", format!("{a}.{b}.{c}.{d}:1")).unwrap();
        driver.wait("a reset to be needed", |driver| driver.read(0x070) & 0x40 != 0);
    }
    // Frames too short, too long, or with a header that means nothing: all are taken, none is an error.
    driver.start(MERGE, true);
    driver.poke(DATA, &[0xff; 0x2_0000]);
    for bytes in [0, 1, 12, 13, 14, 60, 2000, 0x1_ffff] {
        driver.submit(TRANSMIT, 0, &chain(0, &[(DATA, bytes, false)]));
        driver.notify(TRANSMIT);
        driver.wait("the frame to be taken", |driver| !driver.answers(TRANSMIT).is_empty());
    }
    assert_eq!(driver.read(0x070), 15);
}

#[test]
fn addresses_of_cards_are_read() {
    assert_eq!("02:00:00:00:00:07".parse(), Ok(MacAddress(MAC)));
    assert_eq!(MacAddress::random().unwrap().0[0] & 3, 2);
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:07:08",
        "01:00:00:00:00:07",
        "00:00:00:00:00:00",
        "2:0:0:0:0:7",
        "+2:00:00:00:00:07",
    ] {
        assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
    }
}
