use super::*;
use crate::identity::{Identity, TrustStore};
use bytes::Bytes;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

const SHORT: Duration = Duration::from_secs(5);

/// Two hosts' key directories.
struct Hosts {
    tmp: tempfile::TempDir,
}

impl Hosts {
    fn strangers() -> Self {
        let hosts = Self { tmp: tempfile::tempdir().unwrap() };
        for name in ["a", "b"] {
            Identity::init(&hosts.dir(name), name, false).unwrap();
        }
        hosts
    }

    fn friends() -> Self {
        let hosts = Self::strangers();
        hosts.trust("a", "b");
        hosts.trust("b", "a");
        hosts
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    fn identity(&self, name: &str) -> Identity {
        Identity::load(&self.dir(name)).unwrap()
    }

    fn trust(&self, who: &str, whom: &str) {
        let key = self.identity(whom).fingerprint();
        TrustStore::load(&self.dir(who)).unwrap().add(whom, key).unwrap();
    }

    fn listen(&self, settings: &Settings) -> Listener {
        Listener::bind(any_port(), &self.dir("b"), settings.clone()).unwrap()
    }

    fn dial(&self, to: SocketAddr, settings: &Settings) -> Result<QuicLink> {
        let trust = TrustStore::load(&self.dir("a")).unwrap();
        dial(&to.to_string(), &self.identity("a"), &trust, settings, SHORT)
    }

    /// A connected pair: the dialler, the listener's end, the listener.
    fn pair(&self, settings: &Settings) -> (Box<QuicLink>, Box<QuicLink>, Listener) {
        let mut listener = self.listen(settings);
        let dialler = self.dial(listener.local_addr(), settings).unwrap();
        let accepted = listener.accept(SHORT).unwrap();
        (Box::new(dialler), Box::new(accepted), listener)
    }
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// Small windows and buffers, so that limits are reached quickly.
fn quick() -> Settings {
    Settings {
        idle_timeout: Duration::from_millis(600),
        keep_alive: Duration::from_millis(150),
        stall_timeout: Duration::from_millis(700),
        ..Settings::default()
    }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let step = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 56) as u8
    };
    (0..len).map(|_| step(&mut state)).collect()
}

#[test]
fn hosts_that_trust_each_other_talk_both_ways() {
    let hosts = Hosts::friends();
    let (mut a, mut b, _listener) = hosts.pair(&quick());
    assert!(b.peer().starts_with("a at 127.0.0.1:"), "{}", b.peer());
    assert!(a.peer().contains(&hosts.identity("b").fingerprint().to_string()), "{}", a.peer());
    a.write(b"hello", SHORT).unwrap();
    let mut five = [0; 5];
    b.read_exact(&mut five, "a greeting", SHORT).unwrap();
    assert_eq!(&five, b"hello");
    b.write(b"world", SHORT).unwrap();
    a.read_exact(&mut five, "an answer", SHORT).unwrap();
    assert_eq!(&five, b"world");
    let stats = a.stats();
    assert!(stats.sent_wire_bytes > 0 && stats.mtu_bytes >= 1200, "{stats:?}");
}

#[test]
fn a_host_that_the_destination_does_not_trust_is_told_what_to_run_there() {
    let hosts = Hosts::strangers();
    hosts.trust("a", "b");
    let mut listener = hosts.listen(&quick());
    let error = hosts.dial(listener.local_addr(), &quick()).err().unwrap();
    let own = hosts.identity("a").fingerprint().to_string();
    assert!(matches!(error, Error::Identity(_)), "{error}");
    let text = error.to_string();
    assert!(text.contains("does not trust this host") && text.contains(&own), "{text}");
    assert!(text.contains("migrate keys trust"), "{text}");
    assert!(matches!(listener.accept(Duration::from_millis(100)), Err(Error::TimedOut { .. })));
}

#[test]
fn a_destination_that_is_not_trusted_is_not_talked_to() {
    let hosts = Hosts::strangers();
    hosts.trust("b", "a");
    let mut listener = hosts.listen(&quick());
    let error = hosts.dial(listener.local_addr(), &quick()).err().unwrap();
    let text = error.to_string();
    assert!(matches!(error, Error::Identity(_)), "{text}");
    assert!(text.contains(&hosts.identity("b").fingerprint().to_string()), "{text}");
    assert!(listener.accept(Duration::from_millis(100)).is_err());
}

#[test]
fn a_named_host_with_another_trusted_hosts_key_is_an_alarm() {
    let hosts = Hosts::friends();
    // The trust store says who 127.0.0.1 is, and it is not b.
    let key = hosts.identity("a").fingerprint();
    TrustStore::load(&hosts.dir("a")).unwrap().add("127.0.0.1", key).unwrap();
    let listener = hosts.listen(&quick());
    let text = hosts.dial(listener.local_addr(), &quick()).err().unwrap().to_string();
    assert!(text.contains("IS NOT THE TRUSTED ONE"), "{text}");
}

#[test]
fn a_revoked_host_is_refused_from_then_on() {
    let hosts = Hosts::friends();
    let mut listener = hosts.listen(&quick());
    hosts.dial(listener.local_addr(), &quick()).unwrap();
    drop(listener.accept(SHORT).unwrap());
    TrustStore::load(&hosts.dir("b")).unwrap().revoke("a").unwrap();
    let error = hosts.dial(listener.local_addr(), &quick()).err().unwrap();
    assert!(matches!(error, Error::Identity(_)), "{error}");
    hosts.trust("b", "a");
    hosts.dial(listener.local_addr(), &quick()).unwrap();
}

/// A quinn client that shows no certificate.
fn connect_nameless(to: SocketAddr, alpn: &[u8]) -> quinn::ConnectionError {
    let gate = tls::Gate::new(Vec::new());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(gate)))
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let runtime = runtime(&quick()).unwrap();
    runtime.block_on(async {
        let endpoint = Endpoint::client(any_port()).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(config));
        match endpoint.connect_with(config, to, "x").unwrap().await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        }
    })
}

/// Trusts every server, as no code outside tests may.
#[derive(Debug)]
struct Anyone(Arc<tls::Gate>);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> std::result::Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::client::danger::ServerCertVerifier::verify_tls12_signature(&*self.0, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::client::danger::ServerCertVerifier::verify_tls13_signature(&*self.0, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::client::danger::ServerCertVerifier::supported_verify_schemes(&*self.0)
    }
}

#[test]
fn who_shows_no_key_or_speaks_another_version_is_refused() {
    let hosts = Hosts::friends();
    let mut listener = hosts.listen(&quick());
    let own = hosts.identity("a").fingerprint();
    let ends = Ends { peer: "b".into(), own, idle_timeout: SHORT };
    let error = connect_nameless(listener.local_addr(), protocol::handshake::ALPN);
    assert!(ends.lost(&error).to_string().contains("showed no key"), "{error}");
    let error = connect_nameless(listener.local_addr(), b"migrate/0");
    assert!(ends.lost(&error).to_string().contains("same release"), "{error}");
    assert!(listener.accept(Duration::from_millis(50)).is_err());
    // And it still serves who may.
    hosts.dial(listener.local_addr(), &quick()).unwrap();
}

#[test]
fn garbage_on_the_port_harms_nobody() {
    let hosts = Hosts::friends();
    let (mut a, mut b, mut listener) = hosts.pair(&quick());
    let noise = UdpSocket::bind(any_port()).unwrap();
    for round in 0..300_usize {
        let mut bytes = pattern(round * 4 % 1500, round as u64);
        if let (Some(first), true) = (bytes.first_mut(), round % 3 == 0) {
            *first = 0xc0; // looks like an Initial packet
        }
        if bytes.len() > 5 && round % 6 == 0 {
            bytes[1..5].copy_from_slice(&1_u32.to_be_bytes());
        }
        noise.send_to(&bytes, listener.local_addr()).unwrap();
    }
    a.write(b"still here", SHORT).unwrap();
    let mut ten = [0; 10];
    b.read_exact(&mut ten, "a word", SHORT).unwrap();
    hosts.dial(listener.local_addr(), &quick()).unwrap();
    listener.accept(SHORT).unwrap();
}

#[test]
fn where_nobody_listens_the_error_says_so_soon() {
    let hosts = Hosts::friends();
    let free = UdpSocket::bind(any_port()).unwrap().local_addr().unwrap();
    let begun = Instant::now();
    let text = hosts.dial(free, &quick()).err().unwrap().to_string();
    assert!(text.contains("nothing answers") && text.contains("migrate receive"), "{text}");
    assert!(begun.elapsed() < SHORT / 2, "{:?}", begun.elapsed());
    // Somebody is there and says nothing.
    let mute = UdpSocket::bind(any_port()).unwrap();
    let trust = TrustStore::load(&hosts.dir("a")).unwrap();
    let address = mute.local_addr().unwrap().to_string();
    let limit = Duration::from_millis(300);
    let text = dial(&address, &hosts.identity("a"), &trust, &quick(), limit).err().unwrap().to_string();
    assert!(text.contains("nothing answers"), "{text}");
    for bad in ["", "host", ":1", "host:", "host:0", "host:99999"] {
        let error = dial(bad, &hosts.identity("a"), &trust, &quick(), limit).err().unwrap();
        assert!(matches!(error, Error::Usage(_)), "{bad}: {error}");
    }
    let error = dial("no-such-host.invalid:1", &hosts.identity("a"), &trust, &quick(), SHORT).err().unwrap();
    assert!(error.to_string().contains("no-such-host.invalid"), "{error}");
}

#[test]
fn a_port_in_use_is_named() {
    let hosts = Hosts::friends();
    let listener = hosts.listen(&quick());
    let error = Listener::bind(listener.local_addr(), &hosts.dir("b"), quick()).err().unwrap();
    assert!(matches!(&error, Error::Host(text) if text.contains("in use")), "{error}");
}

#[test]
fn a_peer_that_vanishes_is_noticed_after_the_idle_timeout() {
    let hosts = Hosts::friends();
    let mut listener = hosts.listen(&quick());
    // A relay stands for the network: when it stops, both ends hear nothing more, as with a cut cable.
    let relay = UdpSocket::bind(any_port()).unwrap();
    relay.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let (address, server) = (relay.local_addr().unwrap(), listener.local_addr());
    let cut = Arc::new(AtomicUsize::new(0));
    let stop = cut.clone();
    let carrier = thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        let mut client = None;
        while stop.load(Ordering::Relaxed) < 2 {
            let Ok((bytes, from)) = relay.recv_from(&mut buffer) else { continue };
            if from != server {
                client = Some(from);
            }
            let to = if from == server { client } else { Some(server) };
            if let (Some(to), 0) = (to, stop.load(Ordering::Relaxed)) {
                let _ = relay.send_to(&buffer[..bytes], to);
            }
        }
    });
    let mut a = hosts.dial(address, &quick()).unwrap();
    let mut b = listener.accept(SHORT).unwrap();
    a.write(b"x", SHORT).unwrap();
    b.read_exact(&mut [0], "x", SHORT).unwrap();
    // Idle, but alive: keep-alives hold the connection well over its idle timeout.
    thread::sleep(quick().idle_timeout * 2);
    a.write(b"y", SHORT).unwrap();
    b.read_exact(&mut [0], "y", SHORT).unwrap();
    cut.store(1, Ordering::Relaxed);
    let begun = Instant::now();
    for end in [&mut a, &mut b] {
        let error = end.read_exact(&mut [0], "a word", SHORT).unwrap_err();
        assert!(matches!(&error, Error::Link(text) if text.contains("sent nothing for 0.6 s")), "{error}");
    }
    assert!(begun.elapsed() < 3 * quick().idle_timeout, "{:?}", begun.elapsed());
    cut.store(2, Ordering::Relaxed);
    carrier.join().unwrap();
}

fn bulk(streams: usize) {
    const TOTAL: usize = 64 << 20;
    let hosts = Hosts::friends();
    let (mut a, mut b, _listener) = hosts.pair(&Settings::default());
    let each = TOTAL / streams;
    let writers: Vec<_> = (0..streams)
        .map(|seed| {
            let mut sender = a.open_page_stream().unwrap();
            thread::spawn(move || {
                let data = Bytes::from(pattern(each, seed as u64));
                // The first byte says which stream it is.
                sender.write(&mut [Bytes::copy_from_slice(&[seed as u8])]).unwrap();
                for at in (0..each).step_by(1 << 20) {
                    let half = at + (1 << 19);
                    sender.write(&mut [data.slice(at..half), data.slice(half..at + (1 << 20))]).unwrap();
                }
            })
        })
        .collect();
    let readers: Vec<_> = (0..streams)
        .map(|_| {
            let mut receiver = b.accept_page_stream(SHORT).unwrap();
            thread::spawn(move || {
                let mut got = Vec::with_capacity(each + 1);
                while let Some(bytes) = receiver.read().unwrap() {
                    got.extend_from_slice(&bytes);
                }
                assert_eq!(got.len(), each + 1);
                assert!(got[1..] == pattern(each, u64::from(got[0])), "stream {} differs", got[0]);
            })
        })
        .collect();
    for thread in writers.into_iter().chain(readers) {
        thread.join().unwrap();
    }
}

#[test]
fn bulk_arrives_intact_over_one_stream() {
    bulk(1);
}

#[test]
fn bulk_arrives_intact_over_four_streams() {
    bulk(4);
}

#[test]
fn a_read_that_timed_out_goes_on_where_it_stopped() {
    let hosts = Hosts::friends();
    let (mut a, mut b, _listener) = hosts.pair(&quick());
    let slice = Duration::from_millis(20);
    let mut buffer = [0; 8];
    let timed_out = |result| matches!(result, Err(Error::TimedOut { what: "eight bytes", .. }));
    assert!(timed_out(b.read_exact(&mut buffer, "eight bytes", slice)));
    a.write(b"abc", SHORT).unwrap();
    thread::sleep(slice);
    assert!(timed_out(b.read_exact(&mut buffer, "eight bytes", slice)));
    a.write(b"defghij", SHORT).unwrap();
    b.read_exact(&mut buffer, "eight bytes", SHORT).unwrap();
    assert_eq!(&buffer, b"abcdefgh");
    b.read_exact(&mut buffer[..2], "two bytes", SHORT).unwrap();
    assert_eq!(&buffer[..2], b"ij");
}

#[test]
fn a_receiver_that_does_not_read_bounds_the_sender_and_control_still_passes() {
    let hosts = Hosts::friends();
    let settings = Settings { window_bytes: 2 << 20, ..quick() };
    let (mut a, mut b, _listener) = hosts.pair(&settings);
    let mut sender = a.open_page_stream().unwrap();
    let block = Bytes::from(vec![7; 1 << 20]);
    let mut taken = 0;
    let error = loop {
        match sender.write(&mut [block.clone()]) {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
        assert!(taken < 16, "the sender is not held back");
    };
    assert!(matches!(error, Error::TimedOut { what: "the peer to take pages", .. }), "{error}");
    // Two windows at most: one at the receiver, one in the sender's own buffer.
    assert!(taken <= 4, "{taken} MiB");
    drop(sender);
    let mut receiver = b.accept_page_stream(SHORT).unwrap();
    let mut got = 0;
    while let Some(bytes) = receiver.read().unwrap() {
        got += bytes.len();
    }
    assert!(got >= taken << 20);
}

#[test]
fn close_delivers_what_was_written_and_gives_the_reason() {
    let hosts = Hosts::friends();
    let (mut a, mut b, _listener) = hosts.pair(&Settings::default());
    let mut sender = a.open_page_stream().unwrap();
    a.write(b"last words", SHORT).unwrap();
    let data = Bytes::from(pattern(4 << 20, 5));
    sender.write(&mut [data.clone()]).unwrap();
    drop(sender);
    let begun = Instant::now();
    a.close("all done\u{1b}[2J\nreally");
    assert!(begun.elapsed() < LINGER + SHORT / 10, "{:?}", begun.elapsed());
    let mut receiver = b.accept_page_stream(SHORT).unwrap();
    let mut got = Vec::new();
    while let Some(bytes) = receiver.read().unwrap() {
        got.extend_from_slice(&bytes);
    }
    assert!(got == data);
    let mut words = [0; 10];
    b.read_exact(&mut words, "last words", SHORT).unwrap();
    assert_eq!(&words, b"last words");
    let text =
        b.write(b"x", SHORT).and_then(|()| b.read_exact(&mut [0], "more", SHORT)).unwrap_err().to_string();
    assert!(text.contains("all done") || text.contains("ended its side"), "{text}");
    let text = b.open_page_stream().err().unwrap().to_string();
    assert!(text.contains("ended the connection: all done [2J really"), "{text}");
}

#[test]
fn a_dropped_link_is_told_to_the_peer_at_once() {
    let hosts = Hosts::friends();
    let (mut a, b, _listener) = hosts.pair(&Settings::default());
    let waiting = thread::spawn(move || {
        let begun = Instant::now();
        (a.read_exact(&mut [0], "a word", SHORT).unwrap_err().to_string(), begun.elapsed())
    });
    thread::sleep(Duration::from_millis(50));
    drop(b);
    let (text, after) = waiting.join().unwrap();
    assert!(text.contains("gave up"), "{text}");
    assert!(after < Duration::from_secs(1), "{after:?}");
}

#[test]
fn a_stream_in_use_ends_when_its_link_is_closed() {
    let hosts = Hosts::friends();
    let (mut a, b, _listener) = hosts.pair(&Settings::default());
    let mut sender = a.open_page_stream().unwrap();
    sender.write(&mut [Bytes::from_static(b"x")]).unwrap();
    let mut b = b;
    let mut receiver = b.accept_page_stream(SHORT).unwrap();
    assert!(receiver.read().unwrap().is_some());
    let reader = thread::spawn(move || receiver.read().unwrap_err().to_string());
    thread::sleep(Duration::from_millis(20));
    drop(b);
    assert!(reader.join().unwrap().contains("closed here"));
    let again = (0..100).find_map(|_| {
        thread::sleep(Duration::from_millis(5));
        sender.write(&mut [Bytes::from_static(b"y")]).err()
    });
    assert!(matches!(again, Some(Error::Link(_))), "{again:?}");
}

#[test]
fn a_listener_needs_a_key() {
    let error = Listener::bind(any_port(), Path::new("/nonexistent"), quick()).err().unwrap();
    assert!(error.to_string().contains("migrate keys init"), "{error}");
}
