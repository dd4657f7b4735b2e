//! A small UDP relay that stands for the network between two hosts: it loses, delays, reorders, doubles, holds and cuts.
//!
//! ```text
//! client ─▶ front ─▶ fate ─▶ (queue) ─▶ back, one socket a client ─▶ server
//!        ◀─────── (queue) ◀─ fate ◀──────
//! ```
//!
//! Every client has a socket of its own towards the server, as behind a NAT, so that several connections do not mix.

use crate::random::Random;
use std::collections::{BinaryHeap, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread of the relay sleeps before it looks whether it shall end.
const LOOK: Duration = Duration::from_millis(20);

/// The most bytes that wait in the relay; more are lost, as in any router.
const QUEUE_BYTES: usize = 64 << 20;

/// What the relay does to packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weather {
    /// One packet in this many is lost; 0 loses none.
    pub lose_one_in: u64,
    /// One packet in this many arrives twice; 0 doubles none.
    pub double_one_in: u64,
    /// Every packet comes this much later.
    pub delay_us: u64,
    /// And up to this much more, each by itself: so they overtake each other.
    pub jitter_us: u64,
    /// No more than this passes each way; 0 is no limit.
    pub bytes_per_s: u64,
    /// Everything is lost once this many bytes went through; 0 never.
    pub cut_after_bytes: u64,
}

/// Which way packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the client to the server: from `migrate send` to `migrate receive`.
    Down,
    /// Back.
    Up,
    /// Either.
    Both,
}

impl Way {
    fn covers(self, other: Way) -> bool {
        self == Way::Both || self == other
    }
}

/// A relay that forwards between clients and one server. It ends when dropped.
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    bytes: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    weather: Weather,
    random: Random,
    cut: Option<Way>,
    held: bool,
    queue: BinaryHeap<Packet>,
    queued_bytes: usize,
    /// When the line is free again, down and up, where the rate is limited.
    free_at: [Instant; 2],
    serial: u64,
}

/// A packet that waits.
struct Packet {
    due: Instant,
    serial: u64,
    bytes: Vec<u8>,
    over: Arc<UdpSocket>,
    to: Option<SocketAddr>,
}

impl PartialEq for Packet {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Packet {}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Packet {
    /// The heap gives the greatest first, and that is to be the earliest.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.due, other.serial).cmp(&(self.due, self.serial))
    }
}

impl Packet {
    fn send(&self) {
        send(&self.over, self.to, &self.bytes);
    }
}

/// A packet that cannot be sent is a packet that was lost.
fn send(over: &UdpSocket, to: Option<SocketAddr>, bytes: &[u8]) {
    match to {
        Some(to) => over.send_to(bytes, to).ok(),
        None => over.send(bytes).ok(),
    };
}

impl Relay {
    /// A relay on loopback in front of `server`, with a seed for its weather.
    ///
    /// # Panics
    /// If loopback has no free ports.
    pub fn start(server: &str, weather: Weather, seed: u64) -> Self {
        Self::start_at("127.0.0.1", server, weather, seed)
    }

    /// A relay at this address in front of `server`. Its sockets are in the network namespace of the calling thread.
    ///
    /// # Panics
    /// If there are no free ports.
    pub fn start_at(ip: &str, server: &str, weather: Weather, seed: u64) -> Self {
        let front = Arc::new(socket(ip));
        let address = front.local_addr().expect("an address");
        let server: SocketAddr = server.parse().expect("the server's address");
        let now = Instant::now();
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            state: Mutex::new(State {
                weather,
                random: Random::new(seed),
                cut: None,
                held: false,
                queue: BinaryHeap::new(),
                queued_bytes: 0,
                free_at: [now; 2],
                serial: 0,
            }),
            changed: Condvar::new(),
        });
        // Threads start in the namespace of the thread that starts them, so the sockets they make are there, too.
        let ip = ip.to_owned();
        let down = {
            let shared = shared.clone();
            std::thread::spawn(move || shared.forward_down(&front, server, &ip))
        };
        let post = {
            let shared = shared.clone();
            std::thread::spawn(move || shared.post())
        };
        Self { address, shared, threads: vec![down, post] }
    }

    /// Where clients send to.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Nothing passes this way from now on, until [`Relay::mend`].
    pub fn cut(&self, way: Way) {
        let mut state = self.shared.state();
        state.cut = Some(way);
        // What waits inside is lost with the cable.
        state.queue.clear();
        state.queued_bytes = 0;
    }

    /// Packets are kept from now on, until [`Relay::mend`] lets them go on.
    pub fn hold(&self) {
        self.shared.state().held = true;
    }

    /// Other weather from now on.
    pub fn weather(&self, weather: Weather) {
        self.shared.state().weather = weather;
    }

    /// Packets pass again, in fair weather.
    pub fn mend(&self) {
        let mut state = self.shared.state();
        state.cut = None;
        state.held = false;
        state.weather = Weather::default();
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Bytes that came to the relay so far, both ways.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }
}

fn socket(ip: &str) -> UdpSocket {
    let socket = UdpSocket::bind(format!("{ip}:0")).expect("a port");
    socket.set_read_timeout(Some(LOOK)).expect("a timeout");
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 8 << 20).expect("a buffer");
    socket
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the lock")
    }

    fn forward_down(self: &Arc<Self>, front: &Arc<UdpSocket>, server: SocketAddr, ip: &str) {
        let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut ups = Vec::new();
        let mut buffer = vec![0; 65536];
        while !self.stop.load(Ordering::Relaxed) {
            let Ok((length, client)) = front.recv_from(&mut buffer) else { continue };
            let back = backs.entry(client).or_insert_with(|| {
                let back = Arc::new(socket(ip));
                back.connect(server).expect("the server's address");
                let (shared, front, up) = (self.clone(), front.clone(), back.clone());
                ups.push(std::thread::spawn(move || shared.forward_up(&front, &up, client)));
                back
            });
            self.pass(Way::Down, back, None, &buffer[..length]);
        }
        for up in ups {
            up.join().ok();
        }
    }

    fn forward_up(&self, front: &Arc<UdpSocket>, back: &UdpSocket, client: SocketAddr) {
        let mut buffer = vec![0; 65536];
        while !self.stop.load(Ordering::Relaxed) {
            let Ok(length) = back.recv(&mut buffer) else { continue };
            self.pass(Way::Up, front, Some(client), &buffer[..length]);
        }
    }

    /// Decides what becomes of a packet: lost, sent at once, or queued, once or twice.
    fn pass(&self, way: Way, over: &Arc<UdpSocket>, to: Option<SocketAddr>, bytes: &[u8]) {
        let total = self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        let mut state = self.state();
        let weather = state.weather;
        let cut = state.cut.is_some_and(|cut| cut.covers(way));
        if cut || (weather.cut_after_bytes != 0 && total > weather.cut_after_bytes) {
            return;
        }
        let mut one_in = |number: u64| number != 0 && state.random.below(number) == 0;
        if one_in(weather.lose_one_in) {
            return;
        }
        let copies = if one_in(weather.double_one_in) { 2 } else { 1 };
        let fair = weather.delay_us == 0 && weather.jitter_us == 0 && weather.bytes_per_s == 0;
        for _ in 0..copies {
            // What comes behind a packet that waits must not overtake it where no jitter was asked for.
            if fair && !state.held && state.queue.is_empty() {
                send(over, to, bytes);
            } else {
                state.queue(way, over, to, bytes);
            }
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Sends what waits when it is due.
    fn post(&self) {
        let mut state = self.state();
        while !self.stop.load(Ordering::Relaxed) {
            let wait = match state.queue.peek() {
                Some(packet) if !state.held => packet.due.saturating_duration_since(Instant::now()),
                _ => LOOK,
            };
            if wait.is_zero() {
                if let Some(packet) = state.queue.pop() {
                    state.queued_bytes -= packet.bytes.len();
                    packet.send();
                }
                continue;
            }
            state = self.changed.wait_timeout(state, wait.min(LOOK)).expect("the lock").0;
        }
    }
}

impl State {
    fn queue(&mut self, way: Way, over: &Arc<UdpSocket>, to: Option<SocketAddr>, bytes: &[u8]) {
        if self.queued_bytes + bytes.len() > QUEUE_BYTES {
            return;
        }
        let mut due = Instant::now();
        if let Some(ns) = (bytes.len() as u64 * 1_000_000_000).checked_div(self.weather.bytes_per_s) {
            let free_at = &mut self.free_at[usize::from(way == Way::Up)];
            due = due.max(*free_at) + Duration::from_nanos(ns);
            *free_at = due;
        }
        let late_us = self.weather.delay_us + self.random.below(self.weather.jitter_us);
        due += Duration::from_micros(late_us);
        self.serial += 1;
        self.queued_bytes += bytes.len();
        self.queue.push(Packet { due, serial: self.serial, bytes: bytes.to_vec(), over: over.clone(), to });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}
