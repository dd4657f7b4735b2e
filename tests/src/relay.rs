//! A small UDP relay that stands for the network between two hosts: it can lose, delay and cut.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the relay does to packets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// One packet in this many is lost; 0 loses none.
    pub lose_one_in: u64,
    /// Everything is lost once this many bytes went through; 0 never.
    pub cut_after_bytes: u64,
}

/// A relay on loopback that forwards between one client and one server. It ends when dropped.
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    cut: AtomicBool,
    bytes: AtomicU64,
    random: AtomicU64,
    weather: Weather,
}

impl Relay {
    /// A relay in front of `server`, with a seed for its losses.
    ///
    /// # Panics
    /// If loopback has no free ports.
    pub fn start(server: &str, weather: Weather, seed: u64) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let back = UdpSocket::bind("127.0.0.1:0").expect("a port");
        back.connect(server).expect("the server's address");
        let address = front.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            random: AtomicU64::new(seed | 1),
            weather,
        });
        let client = Arc::new(std::sync::Mutex::new(None::<SocketAddr>));
        for socket in [&front, &back] {
            socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
            rustix::net::sockopt::set_socket_recv_buffer_size(socket, 8 << 20).expect("a buffer");
        }
        let (front, back) = (Arc::new(front), Arc::new(back));
        let up = {
            let (front, back, client, shared) = (front.clone(), back.clone(), client.clone(), shared.clone());
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65536];
                while !shared.stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = front.recv_from(&mut buffer) else { continue };
                    *client.lock().expect("the lock") = Some(from);
                    if shared.passes(length) {
                        back.send(&buffer[..length]).ok();
                    }
                }
            })
        };
        let down = {
            let shared = shared.clone();
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65536];
                while !shared.stop.load(Ordering::Relaxed) {
                    let Ok(length) = back.recv(&mut buffer) else { continue };
                    let client = *client.lock().expect("the lock");
                    if let Some(client) = client
                        && shared.passes(length)
                    {
                        front.send_to(&buffer[..length], client).ok();
                    }
                }
            })
        };
        Self { address, shared, threads: vec![up, down] }
    }

    /// Where clients send to.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Nothing passes from now on, until [`Relay::mend`].
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::SeqCst);
    }

    /// Packets pass again.
    pub fn mend(&self) {
        self.shared.cut.store(false, Ordering::SeqCst);
    }
}

impl Shared {
    fn passes(&self, length: usize) -> bool {
        let total = self.bytes.fetch_add(length as u64, Ordering::Relaxed) + length as u64;
        if self.weather.cut_after_bytes != 0 && total > self.weather.cut_after_bytes {
            return false;
        }
        if self.weather.lose_one_in != 0 {
            // xorshift64: good enough to choose packets, and repeatable.
            let mut x = self.random.load(Ordering::Relaxed);
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            self.random.store(x, Ordering::Relaxed);
            if x.is_multiple_of(self.weather.lose_one_in) {
                return false;
            }
        }
        !self.cut.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}
