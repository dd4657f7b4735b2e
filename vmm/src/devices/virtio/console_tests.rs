//! The console device between the mock driver and programs of this host.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use super::{
    console::{Console, ConsoleConfig},
    mock::{DATA, Driver, MEMORY, WRITE, chain, memory, part},
};
use crate::device::Device;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

fn driver(config: ConsoleConfig) -> Driver {
    let driver = Driver::new(memory(), Box::new(Console::new("console0".into(), Some(config))));
    driver.handle.acquire().unwrap();
    driver.handle.resume();
    driver
}

fn at(path: &Path) -> Driver {
    let mut driver = driver(ConsoleConfig::Socket(path.into()));
    assert_eq!(driver.start(0, true), 15);
    driver
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn read(stream: &mut UnixStream, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    stream.read_exact(&mut buffer).unwrap();
    buffer
}

#[test]
fn bytes_go_both_ways_in_order_and_are_marked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.sock");
    let mut driver = at(&path);
    let mut client = connect(&path);
    // Input before there is room waits.
    client.write_all(b"hello guest").unwrap();
    driver.submit(RECEIVE, 0, &chain(0, &[(DATA, 5, true)]));
    driver.submit(RECEIVE, 1, &chain(1, &[(DATA + 0x1000, 0, true)]));
    driver.submit(RECEIVE, 2, &chain(2, &[(DATA + 0x2000, 64, true)]));
    driver.marked();
    driver.notify(RECEIVE);
    let mut got = Vec::new();
    driver.wait("the input", |driver| {
        got.extend(driver.answers(RECEIVE));
        got.len() == 3
    });
    assert_eq!(got, [(0, 5), (1, 0), (2, 6)]);
    assert_eq!(
        (driver.peek(DATA, 5), driver.peek(DATA + 0x2000, 6)),
        (b"hello".to_vec(), b" guest".to_vec())
    );
    assert!(driver.marked().contains(&(DATA / 4096)) && part(0, 2) < DATA);
    driver.poke(DATA, b"hello host");
    assert_eq!(driver.request(TRANSMIT, &chain(0, &[(DATA, 5, false), (DATA + 5, 5, false)])), 0);
    assert_eq!(read(&mut client, 10), b"hello host");
    // A second client is turned away, the next one is let in.
    assert_eq!(connect(&path).read(&mut [0; 1]).unwrap(), 0);
    drop(client);
    driver.submit(RECEIVE, 0, &chain(0, &[(DATA, 16, true)]));
    driver.notify(RECEIVE);
    driver.wait("another client to be heard", |driver| {
        let mut next = connect(&path);
        let _ = next.write_all(b"next");
        std::thread::sleep(Duration::from_millis(5));
        driver.answers(RECEIVE) == [(0, 4)]
    });
}

#[test]
fn a_slow_reader_slows_the_writer_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.sock");
    let mut driver = at(&path);
    let mut client = connect(&path);
    driver.poke(DATA, b"?");
    driver.request(TRANSMIT, &chain(0, &[(DATA, 1, false)]));
    driver.wait("the client to be there", |driver| {
        driver.request(TRANSMIT, &chain(0, &[(DATA, 1, false)]));
        client.set_nonblocking(true).unwrap();
        let heard = matches!(client.read(&mut [0; 64]), Ok(1..));
        client.set_nonblocking(false).unwrap();
        heard
    });
    // More than a socket holds, in one buffer.
    let bytes: Vec<u8> = (0..1_u32 << 20).map(|byte| (byte % 253) as u8 | 1).collect();
    driver.poke(DATA, &bytes);
    driver.submit(TRANSMIT, 0, &chain(0, &[(DATA, 1 << 20, false)]));
    driver.notify(TRANSMIT);
    std::thread::sleep(Duration::from_millis(30));
    assert!(driver.answers(TRANSMIT).is_empty());
    // A pause in between changes nothing.
    driver.handle.ask_pause();
    driver.handle.wait_paused();
    driver.handle.resume();
    let mut got = read(&mut client, bytes.len());
    // What was left of the single bytes comes first.
    let rest = got.iter().take_while(|byte| **byte == b'?').count();
    got.drain(..rest);
    got.extend(read(&mut client, rest));
    assert!(got == bytes);
    driver.wait("the answer", |driver| driver.answers(TRANSMIT) == [(0, 0)]);
}

#[test]
fn a_move_is_the_end_of_a_connection_and_loses_no_buffer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.sock");
    let mut source = at(&path);
    let mut client = connect(&path);
    client.write_all(b"read").unwrap();
    source.submit(RECEIVE, 0, &chain(0, &[(DATA + 0x1000, 16, true)]));
    source.notify(RECEIVE);
    source.wait("the client to be there", |driver| driver.answers(RECEIVE) == [(0, 4)]);
    let bytes = vec![b'x'; 1 << 20];
    source.poke(DATA + 0x10_0000, &bytes);
    source.submit(TRANSMIT, 0, &chain(0, &[(DATA + 0x10_0000, 1 << 20, false)]));
    source.notify(TRANSMIT);
    assert_eq!(read(&mut client, 16), [b'x'; 16]);
    source.handle.ask_pause();
    source.handle.wait_paused();
    source.handle.release().unwrap();
    assert!(!path.exists());
    let state = source.device.save().unwrap();

    let console = Console::new("console0".into(), Some(ConsoleConfig::Socket(path.clone())));
    let mut target = Driver::new(source.memory.clone(), Box::new(console));
    (target.available, target.used) = (source.available, source.used);
    target.device.restore(target.device.state_version(), &state).unwrap();
    target.handle.acquire().unwrap();
    let mut next = connect(&path);
    target.handle.resume();
    assert_eq!(read(&mut next, bytes.len()), bytes);
    target.wait("the answer", |driver| driver.answers(TRANSMIT) == [(0, 0)]);
    // One who reads nothing of the end hears of it all the same.
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
}

#[test]
fn a_file_gets_it_and_without_an_end_it_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut driver = driver(path.to_str().unwrap().parse().unwrap());
    driver.start(0, false);
    driver.poke(DATA, b"line\n");
    driver.request(TRANSMIT, &chain(0, &[(DATA, 5, false)]));
    assert_eq!(std::fs::read(&path).unwrap(), b"line\n");
    let mut nowhere = Driver::new(memory(), Box::new(Console::new("console0".into(), None)));
    nowhere.handle.acquire().unwrap();
    nowhere.handle.resume();
    nowhere.start(0, true);
    nowhere.request(TRANSMIT, &chain(0, &[(DATA, 5, false)]));
    let mut bad = Console::new("console0".into(), Some("/nonexistent/log".parse().unwrap()));
    let error = super::Backend::acquire(&mut bad).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/log"), "{error}");
    assert!("".parse::<ConsoleConfig>().is_err() && "socket:".parse::<ConsoleConfig>().is_err());
    let socket: ConsoleConfig = "socket:/a".parse().unwrap();
    assert_eq!(socket.to_string(), "socket:/a");
}

#[test]
fn what_lies_outside_memory_breaks_the_device_and_a_reset_mends_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.sock");
    let mut driver = at(&path);
    let mut client = connect(&path);
    for (queue, flags) in [(RECEIVE, WRITE), (TRANSMIT, 0)] {
        driver.submit(queue, 0, &[(MEMORY - 1, 2, flags, 0)]);
        driver.notify(queue);
        driver.wait("a reset to be needed", |driver| driver.read(0x070) & 0x40 != 0);
        assert_eq!(driver.start(0, true), 15);
    }
    driver.poke(DATA, b"well");
    driver.request(TRANSMIT, &chain(0, &[(DATA, 4, false)]));
    assert_eq!(read(&mut client, 4), b"well");
}
