use std::{fs::File, io::Write, os::unix::fs::FileExt, path::Path, sync::atomic::Ordering};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::{
    ConsoleConfig, DiskConfig, MacAddress,
    block::Block,
    console::Console,
    disk::Disk,
    mock::{DATA, Descriptor, Driver, INDIRECT, MEMORY, NEXT, SIZE, WRITE, chain, entry, memory, part},
    net::Net,
    ring::{Segment, slices},
    rng::Rng,
    state::{Registers, Saved, SavedQueue},
};
use crate::device::Device;

/// Address, bytes, and whether the device may write them.
type Piece = (u64, u32, bool);

const SECTORS: u64 = 256;
const FLUSH: u64 = 1 << 9;
const READ_ONLY: u64 = 1 << 5;
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x800;
const BUFFER: u64 = DATA + 0x1000;

fn image(sectors: u64) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..sectors * 512).map(|byte| (byte / 512 * 7 + byte % 251) as u8).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn disk(path: &Path, readonly: bool) -> Disk {
    Disk::open(&DiskConfig { path: path.to_owned(), readonly }).unwrap()
}

fn block(path: &Path, readonly: bool) -> Driver {
    let mut disk = disk(path, readonly);
    disk.acquire().unwrap();
    let driver = Driver::new(memory(), Box::new(Block::new("disk0".into(), disk)));
    driver.handle.resume();
    driver
}

fn header(driver: &Driver, kind: u32, sector: u64) {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    driver.poke(HEADER, &bytes);
    driver.poke(STATUS, &[0xee]);
}

/// One request with its data in one piece; status and bytes written.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: Option<Piece>) -> (u8, u32) {
    header(driver, kind, sector);
    let pieces: Vec<_> =
        [Some((HEADER, 16, false)), data, Some((STATUS, 1, true))].into_iter().flatten().collect();
    let written = driver.request(0, &chain(0, &pieces));
    (driver.peek(STATUS, 1)[0], written)
}

#[test]
fn the_registers_are_those_of_a_modern_block_device() {
    let file = image(SECTORS);
    let mut driver = block(file.path(), false);
    assert_eq!([0x000, 0x004, 0x008].map(|register| driver.read(register)), [0x7472_6976, 2, 2]);
    assert_eq!(driver.read(0x034), 256);
    driver.write(0x030, 1);
    assert_eq!((driver.read(0x034), driver.read(0x044)), (0, 0));
    driver.write(0x014, 1);
    assert_eq!(driver.read(0x010), 1, "VIRTIO_F_VERSION_1");
    driver.write(0x014, 2);
    assert_eq!(driver.read(0x010), 0);
    assert_eq!((driver.read(0x100), driver.read(0x104)), (SECTORS as u32, 0));
    let mut beyond = [0; 8];
    driver.device.read(0x100 + 56, &mut beyond);
    assert_eq!(beyond, [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    driver.device.read(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0xff; 8]);
    assert_eq!(driver.start(FLUSH, true), 15);
    // Features that are not offered, or no version 1.
    assert_eq!(driver.start(READ_ONLY, true), 3, "FEATURES_OK does not stay");
    driver.write(0x070, 0);
    driver.write(0x070, 11);
    assert_eq!(driver.read(0x070), 3);
}

#[test]
fn requests_of_every_kind_are_answered() {
    for event_index in [false, true] {
        let file = image(SECTORS);
        let mut driver = block(file.path(), false);
        assert_eq!(driver.start(FLUSH | 1 << 13 | 1 << 14, event_index), 15);
        assert_eq!(request(&mut driver, 0, 3, Some((BUFFER, 1024, true))), (0, 1025));
        assert_eq!(driver.peek(BUFFER, 1024), std::fs::read(file.path()).unwrap()[3 * 512..5 * 512]);
        driver.poke(BUFFER, &[0xab; 512]);
        assert_eq!(request(&mut driver, 1, SECTORS - 1, Some((BUFFER, 512, false))), (0, 1));
        assert_eq!(std::fs::read(file.path()).unwrap()[(SECTORS as usize - 1) * 512..], [0xab; 512]);
        assert_eq!(request(&mut driver, 4, 0, None), (0, 1), "flush");
        assert_eq!(request(&mut driver, 8, 0, Some((BUFFER, 20, true))), (0, 21), "identity");
        assert_eq!(driver.peek(BUFFER, 8), b"disk0\0\0\0");
        for (kind, flags, expected) in [(11, 0, 0), (13, 0, 0), (13, 1, 0), (11, 1, 2), (13, 2, 2)] {
            let mut range = 8_u64.to_le_bytes().to_vec();
            range.extend(8_u32.to_le_bytes());
            range.extend(u32::to_le_bytes(flags));
            driver.poke(BUFFER, &range);
            assert_eq!(
                request(&mut driver, kind, 0, Some((BUFFER, 16, false))),
                (expected, 1),
                "{kind} {flags}"
            );
        }
        assert_eq!(std::fs::read(file.path()).unwrap()[8 * 512..16 * 512], [0; 8 * 512]);
        driver.wait("as many interrupts", |driver| driver.interrupts.load(Ordering::SeqCst) == 9);
        assert_eq!(driver.read(0x060), 1);
        driver.write(0x064, 1);
        assert_eq!(driver.read(0x060), 0);
        // The length of the image is what it was.
        assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * 512);
    }
}

#[test]
fn requests_that_cannot_be_are_answered_with_an_error() {
    let file = image(SECTORS);
    let before = std::fs::read(file.path()).unwrap();
    let mut driver = block(file.path(), false);
    driver.start(FLUSH | 1 << 13, true);
    let cases: [(u32, u64, Option<Piece>, u8); 9] = [
        (0, SECTORS, Some((BUFFER, 512, true)), 1),
        (0, SECTORS - 1, Some((BUFFER, 1024, true)), 1),
        (0, u64::MAX, Some((BUFFER, 512, true)), 1),
        (0, 0, Some((BUFFER, 511, true)), 1),
        (1, u64::MAX / 512, Some((BUFFER, 512, false)), 1),
        (1, 0, Some((BUFFER, 100, false)), 1),
        (11, 0, Some((BUFFER, 15, false)), 1),
        (11, 0, Some((BUFFER, 512, false)), 1),
        (99, 0, None, 2),
    ];
    driver.poke(BUFFER, &[0xff; 1024]);
    for (kind, sector, data, status) in cases {
        assert_eq!(request(&mut driver, kind, sector, data).0, status, "{kind} {sector:#x} {data:?}");
    }
    assert!(std::fs::read(file.path()).unwrap() == before);
    let mut driver = block(image(8).path(), true);
    driver.start(READ_ONLY | FLUSH, true);
    assert_eq!(request(&mut driver, 1, 0, Some((BUFFER, 512, false))).0, 1, "a write to a read-only disk");
    assert_eq!(request(&mut driver, 13, 0, Some((BUFFER, 16, false))).0, 2);
    assert_eq!(request(&mut driver, 0, 0, Some((BUFFER, 512, true))).0, 0);
}

#[test]
fn chains_may_be_cut_anywhere_and_be_indirect() {
    let file = image(SECTORS);
    let mut driver = block(file.path(), false);
    driver.start(FLUSH, true);
    header(&driver, 0, 1);
    let pieces = [
        (HEADER, 3, false),
        (HEADER + 3, 13, false),
        (BUFFER + 100, 700, true),
        (BUFFER + 5000, 323, true),
        (BUFFER + 9000, 1, true),
        // The status comes at the end of a longer piece.
    ];
    let table: Vec<u8> = chain(0, &pieces).into_iter().flat_map(entry).collect();
    driver.poke(DATA + 0x8000, &table);
    let answer = driver.request(0, &[(DATA + 0x8000, table.len() as u32, INDIRECT, 0)]);
    let disk = std::fs::read(file.path()).unwrap();
    // 1023 bytes of data are no whole sectors.
    assert_eq!((answer, driver.peek(BUFFER + 9000, 1)), (1, vec![1]));
    let mut pieces = pieces.to_vec();
    pieces[4].1 = 2;
    let table: Vec<u8> = chain(0, &pieces).into_iter().flat_map(entry).collect();
    driver.poke(DATA + 0x8000, &table);
    let answer = driver.request(0, &[(DATA + 0x8000, table.len() as u32, INDIRECT, 0)]);
    assert_eq!((answer, driver.peek(BUFFER + 9001, 1)), (1025, vec![0]));
    let read =
        [driver.peek(BUFFER + 100, 700), driver.peek(BUFFER + 5000, 323), driver.peek(BUFFER + 9000, 1)];
    assert!(read.concat() == disk[512..1536]);
}

/// Every page that changed behind the driver's back is marked, and no device writes where it need not.
#[test]
fn every_byte_that_a_device_wrote_is_in_a_marked_page() {
    let file = image(SECTORS);
    let mut driver = block(file.path(), false);
    driver.start(FLUSH, true);
    driver.marked();
    let before = driver.peek(0, MEMORY as usize);
    // Eleven sectors in pieces over page boundaries, far apart.
    header(&driver, 0, 2);
    let pieces = [
        (HEADER, 16, false),
        (0x20_0ffe, 5000, true),
        (0x30_0001, 500, true),
        (0x3f_ff00, 132, true),
        (STATUS, 1, true),
    ];
    assert_eq!(driver.request(0, &chain(0, &pieces)), 5633);
    let after = driver.peek(0, MEMORY as usize);
    let marked = driver.marked();
    let changed: Vec<u64> = (0..MEMORY / 4096)
        .filter(|page| {
            let page = *page as usize * 4096..(*page as usize + 1) * 4096;
            before[page.clone()] != after[page]
        })
        .collect();
    let of_driver = [HEADER / 4096, part(0, 0) / 4096, part(0, 1) / 4096];
    for page in &changed {
        assert!(marked.contains(page) || of_driver.contains(page), "page {page:#x}");
    }
    let expected = [part(0, 2), STATUS, 0x20_0000, 0x20_1000, 0x20_2000, 0x30_0000, 0x3f_f000];
    assert_eq!(marked, expected.map(|address| address / 4096));
    // The same for random bytes, which come through a buffer.
    let mut driver = Driver::new(memory(), Box::new(Rng));
    driver.handle.resume();
    driver.start(0, false);
    driver.marked();
    assert_eq!(driver.request(0, &chain(0, &[(BUFFER + 4000, 200, true)])), 200);
    assert_ne!(driver.peek(BUFFER + 4000, 200), [0; 200]);
    assert_eq!(driver.marked(), [part(0, 2), BUFFER, BUFFER + 4096].map(|address| address / 4096));
}

#[test]
fn a_driver_that_breaks_the_rules_needs_a_reset_and_gets_one() {
    let file = image(SECTORS);
    let mut driver = block(file.path(), false);
    let good = chain(0, &[(HEADER, 16, false), (STATUS, 1, true)]);
    let long: Vec<(u64, u32, bool)> = vec![(HEADER, 1, false); usize::from(SIZE)];
    let mut loops = chain(0, &long);
    loops[15] = (HEADER, 1, NEXT, 0);
    let nested = entry((DATA + 0x8000, 16, INDIRECT, 0));
    driver.poke(DATA + 0x8000, &nested);
    let cases: Vec<(&str, Vec<Descriptor>)> = vec![
        ("a loop", loops),
        ("a loop of one", vec![(HEADER, 16, NEXT, 0)]),
        ("a next that is not there", vec![(HEADER, 16, NEXT, 500)]),
        ("an address beyond memory", vec![(MEMORY - 8, 16, 0, 0)]),
        ("an address that overflows", vec![(u64::MAX - 8, 16, 0, 0)]),
        ("4 GiB", vec![(0, u32::MAX, WRITE, 0)]),
        ("written before read", vec![(STATUS, 1, WRITE | NEXT, 1), (HEADER, 16, 0, 0)]),
        ("no status", chain(0, &[(HEADER, 16, false)])),
        ("no header", chain(0, &[(STATUS, 1, true)])),
        ("a short header", chain(0, &[(HEADER, 15, false), (STATUS, 1, true)])),
        ("indirect in indirect", vec![(DATA + 0x8000, 16, INDIRECT, 0)]),
        ("an indirect table of 3 bytes", vec![(DATA + 0x8000, 3, INDIRECT, 0)]),
        ("an indirect table that is not there", vec![(MEMORY, 16, INDIRECT, 0)]),
    ];
    for (what, bad) in cases {
        assert_eq!(driver.start(FLUSH, true), 15);
        driver.submit(0, 0, &bad);
        driver.notify(0);
        driver.wait(what, |driver| driver.read(0x070) == 15 | 0x40);
        assert_eq!(driver.read(0x060) & 2, 2, "{what}: a configuration interrupt");
        assert_eq!(driver.answers(0), [], "{what}");
        // And again as if nothing had been.
        driver.start(FLUSH, true);
        header(&driver, 4, 0);
        assert_eq!(driver.request(0, &good), 1, "{what}");
    }
    // An index that is far ahead, and a queue outside memory.
    driver.start(FLUSH, true);
    driver.poke(part(0, 1) + 2, &1000_u16.to_le_bytes());
    driver.notify(0);
    driver.wait("an index", |driver| driver.read(0x070) & 0x40 != 0);
    driver.write(0x070, 0);
    for status in [1, 3, 11, 15] {
        driver.write(0x024, 1);
        driver.write(0x020, 1);
        driver.write(0x070, status);
    }
    assert_eq!(driver.read(0x070), 15 | 0x40, "no queue is set up");
}

/// How many requests the moving test makes, and with which seeds.
const WRITES: u16 = 15;

/// Requests lie in the ring while the device is paused, saved, restored elsewhere and goes on: each is answered once.
#[test]
fn a_device_that_moves_loses_and_doubles_no_request() {
    for delay in [0, 20, 50, 100, 200, 400, 800] {
        let file = image(SECTORS);
        let mut driver = block(file.path(), false);
        driver.start(FLUSH, true);
        // Three descriptors each would not fit: one indirect descriptor each.
        for index in 0..WRITES {
            let at = BUFFER + 0x2000 * u64::from(index);
            let mut header = 1_u32.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(u64::from(index).to_le_bytes());
            driver.poke(at, &header);
            driver.poke(at + 0x1000, &[index as u8 + 1; 512]);
            let pieces = [(at, 16, false), (at + 0x1000, 512, false), (at + 0x800, 1, true)];
            let table: Vec<u8> = chain(0, &pieces).into_iter().flat_map(entry).collect();
            driver.poke(at + 0x100, &table);
            driver.submit(0, index, &[(at + 0x100, 48, INDIRECT, 0)]);
        }
        driver.notify(0);
        std::thread::sleep(std::time::Duration::from_micros(delay));
        driver.handle.ask_pause();
        driver.handle.wait_paused();
        let saved = driver.device.save().unwrap();
        let memory_then = driver.peek(0, MEMORY as usize);
        driver.handle.release().unwrap();
        let Driver { available, used, .. } = driver;
        // Elsewhere, with a copy of the memory.
        let mut other = Driver::new(memory(), Box::new(Block::new("disk0".into(), disk(file.path(), false))));
        other.poke(0, &memory_then);
        other.device.restore(1, &saved).unwrap();
        assert_eq!(other.device.save().unwrap(), saved);
        other.handle.acquire().unwrap();
        (other.available, other.used) = (available, used);
        other.handle.resume();
        let mut answers = Vec::new();
        other.wait("all answers", |other| {
            answers.extend(other.answers(0));
            answers.len() >= usize::from(WRITES)
        });
        std::thread::sleep(std::time::Duration::from_millis(2));
        answers.extend(other.answers(0));
        let heads: Vec<u32> = answers.iter().map(|(head, _)| *head).collect();
        assert_eq!(heads, (0..u32::from(WRITES)).collect::<Vec<_>>());
        let disk = std::fs::read(file.path()).unwrap();
        for index in 0..usize::from(WRITES) {
            assert_eq!(disk[index * 512..][..512], [index as u8 + 1; 512]);
        }
        // The source, had the move failed, would go on likewise.
        assert!(other.read(0x060) & 1 == 1);
    }
}

#[test]
fn a_paused_device_takes_up_nothing_until_it_goes_on() {
    let file = image(SECTORS);
    let mut driver = block(file.path(), false);
    driver.start(FLUSH, true);
    driver.handle.ask_pause();
    driver.handle.wait_paused();
    driver.marked();
    header(&driver, 0, 0);
    driver.submit(0, 0, &chain(0, &[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]));
    driver.notify(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((driver.answers(0), driver.marked()), (Vec::new(), Vec::new()));
    let raised = driver.interrupts.load(Ordering::SeqCst);
    driver.handle.resume();
    driver.wait("the request", |driver| !driver.answers(0).is_empty());
    assert!(driver.interrupts.load(Ordering::SeqCst) > raised);
}

fn sample() -> Saved {
    let queue = SavedQueue {
        size: 16,
        ready: true,
        descriptors: part(0, 0),
        available: part(0, 1),
        used: part(0, 2),
        next_available: 0xfffe,
        next_used: 0xfffd,
    };
    Saved {
        kind: 2,
        interrupt_status: 1,
        broken: false,
        registers: Registers {
            status: 15,
            device_features_select: 1,
            driver_features_select: 0,
            driver_features: 1 << 32 | FLUSH,
            queue_select: 0,
            queues: vec![queue],
        },
    }
}

/// The bytes of version 1: they must not change, or a VM of today does not arrive tomorrow.
const GOLDEN: [u8; 30] = [
    2, 1, 0, 15, 1, 0, 128, 132, 128, 128, 16, 0, 1, 16, 1, 128, 128, 4, 128, 160, 4, 128, 192, 4, 254, 255,
    3, 253, 255, 3,
];

#[test]
fn the_state_has_its_bytes() {
    let bytes = crate::state::encode(&sample()).unwrap();
    assert_eq!(bytes, GOLDEN);
    assert_eq!(Saved::decode(&bytes).unwrap(), sample());
    let file = image(SECTORS);
    let mut device = block(file.path(), false).device;
    device.restore(1, &bytes).unwrap();
    assert_eq!(device.save().unwrap(), bytes);
    assert!(device.restore(2, &bytes).is_err());
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    type Change = fn(&mut Saved);
    let file = image(SECTORS);
    let mut device = block(file.path(), false).device;
    let good = crate::state::encode(&sample()).unwrap();
    device.restore(1, &good).unwrap();
    let cases: [(&str, Change); 11] = [
        ("kind", |saved| saved.kind = 1),
        ("features", |saved| saved.registers.driver_features |= READ_ONLY),
        ("no version 1", |saved| saved.registers.driver_features = 0),
        ("status", |saved| saved.registers.status = 0x20),
        ("ready without features", |saved| saved.registers.status = 4),
        ("queues", |saved| saved.registers.queues.clear()),
        ("size", |saved| saved.registers.queues[0].size = 17),
        ("size 0", |saved| saved.registers.queues[0].size = 0),
        ("outside", |saved| saved.registers.queues[0].used = MEMORY),
        ("alignment", |saved| saved.registers.queues[0].descriptors += 8),
        ("not ready", |saved| saved.registers.queues[0].ready = false),
    ];
    for (what, change) in cases {
        let mut bad = sample();
        change(&mut bad);
        let error = device.restore(1, &crate::state::encode(&bad).unwrap()).unwrap_err().to_string();
        assert!(error.contains("device0"), "{what}: {error}");
        assert_eq!(device.save().unwrap(), good, "{what}");
    }
}

#[test]
fn disks_that_cannot_be_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, readonly| {
        Disk::open(&DiskConfig { path: folder.path().join(name), readonly }).unwrap_err().to_string()
    };
    std::fs::write(folder.path().join("odd"), [0; 513]).unwrap();
    std::fs::write(folder.path().join("empty"), []).unwrap();
    for (name, says) in
        [("missing", "does not exist"), ("odd", "513"), ("empty", "0 bytes"), (".", "directory")]
    {
        let error = open(name, false);
        assert!(error.contains(name) && error.contains(says), "{error}");
    }
    assert!(open(".", true).contains("neither a file nor a block device"));
    let device =
        Disk::open(&DiskConfig { path: "/dev/null".into(), readonly: false }).unwrap_err().to_string();
    assert!(device.contains("/dev/null") && device.contains("neither"), "{device}");
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let file = image(8);
    let mut first = disk(file.path(), false);
    first.acquire().unwrap();
    first.acquire().unwrap();
    let mut second = disk(file.path(), false);
    let mut reader = disk(file.path(), true);
    for other in [&mut second, &mut reader] {
        let error = other.acquire().unwrap_err().to_string();
        assert!(error.contains("in use") && error.contains(&*file.path().to_string_lossy()), "{error}");
    }
    first.release().unwrap();
    reader.acquire().unwrap();
    disk(file.path(), true).acquire().unwrap();
    assert!(second.acquire().is_err());
    drop(reader);
    second.acquire().unwrap();
}

/// What changes a disk, and what copies it.
#[derive(Debug, Clone)]
enum Change {
    Write(u64, u8),
    Discard(u64, u64),
    Zeroes(u64, u64, bool),
    /// Takes the marks, and copies what is marked in some of the pages; the rest stays marked.
    Copy(u64),
}

fn change() -> impl Strategy<Value = Change> {
    let range = || (0..SECTORS, 1..40_u64).prop_map(|(at, sectors)| (at, sectors.min(SECTORS - at)));
    prop_oneof![
        (0..SECTORS, any::<u8>()).prop_map(|(sector, byte)| Change::Write(sector, byte)),
        range().prop_map(|(at, sectors)| Change::Discard(at, sectors)),
        (range(), any::<bool>()).prop_map(|((at, sectors), unmap)| Change::Zeroes(at, sectors, unmap)),
        any::<u64>().prop_map(Change::Copy),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whoever copies a disk once, and then what is marked, has the disk.
    #[test]
    fn whatever_changes_a_disk_marks_its_pages(changes in prop::collection::vec(change(), 1..60)) {
        let file = image(SECTORS);
        let memory = memory();
        let mut disk = disk(file.path(), false);
        let shared = disk.image().clone();
        let mut copy = std::fs::read(file.path()).unwrap();
        let mut marked = vec![0; 1];
        prop_assert_eq!(shared.pages(), SECTORS / 8);
        for change in changes.into_iter().chain([Change::Copy(u64::MAX)]) {
            match change {
                Change::Write(sector, byte) => {
                    memory.write(BUFFER, &[byte; 512]).unwrap();
                    let segment = Segment { address: GuestAddress(BUFFER), bytes: 512 };
                    disk.write(sector * 512, &slices(&memory, &[segment])).unwrap();
                }
                Change::Discard(at, sectors) => disk.discard(at * 512, sectors * 512).unwrap(),
                Change::Zeroes(at, sectors, unmap) => disk.write_zeroes(at * 512, sectors * 512, unmap).unwrap(),
                Change::Copy(of) => {
                    shared.drain_writes(&mut marked);
                    let now = std::fs::read(file.path()).unwrap();
                    for page in (0..64).filter(|page| marked[0] & of & 1 << page != 0) {
                        copy[page * 4096..][..4096].copy_from_slice(&now[page * 4096..][..4096]);
                    }
                    marked[0] &= !of;
                }
            }
        }
        prop_assert!(copy == std::fs::read(file.path()).unwrap());
    }
}

/// What a hostile driver does in one step.
#[derive(Debug, Clone)]
enum Step {
    Register(u64, u32),
    Odd(u64, Vec<u8>),
    Start(bool),
    Descriptor(u16, Descriptor),
    Memory(u64, Vec<u8>),
    Offer(u16),
    Index(u16),
    Notify(u32),
    Read(u64, usize),
    Move,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let address = prop_oneof![
        DATA..DATA + 0x4000,
        0..MEMORY + 4096,
        part(0, 0)..part(1, 0),
        (0_u64..64).prop_map(|back| u64::MAX - back),
    ];
    let length = prop_oneof![0_u32..64, Just(512), Just(4096), any::<u32>()];
    let bytes = prop::collection::vec(any::<u8>(), 1..32);
    let step = prop_oneof![
        (0_u64..0x120, any::<u32>()).prop_map(|(register, value)| Step::Register(register & !3, value)),
        (0_u64..0x200, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, bytes)| Step::Odd(at, bytes)),
        any::<bool>().prop_map(Step::Start),
        (0..SIZE, (address, length, 0_u16..8, 0..SIZE + 2))
            .prop_map(|(at, entry)| Step::Descriptor(at, entry)),
        (0..MEMORY - 64, bytes).prop_map(|(at, bytes)| Step::Memory(at, bytes)),
        (0..SIZE + 2).prop_map(Step::Offer),
        any::<u16>().prop_map(Step::Index),
        (0_u32..3).prop_map(Step::Notify),
        (0_u64..0x200, 0_usize..9).prop_map(|(at, bytes)| Step::Read(at, bytes)),
        Just(Step::Move),
    ];
    prop::collection::vec(step, 1..60)
}

fn take(driver: &mut Driver, queue: u32, step: Step) {
    match step {
        Step::Register(register, value) => driver.write(register, value),
        Step::Odd(at, bytes) => {
            driver.device.write(at, &bytes);
        }
        Step::Start(event_index) => {
            driver.start(0, event_index);
        }
        Step::Descriptor(at, descriptor) => {
            driver.poke(part(queue, 0) + 16 * u64::from(at), &entry(descriptor));
        }
        Step::Memory(at, bytes) => driver.poke(at, &bytes),
        Step::Offer(head) => {
            driver.offer(queue, head);
            driver.notify(queue);
        }
        Step::Index(index) => driver.poke(part(queue, 1) + 2, &index.to_le_bytes()),
        Step::Notify(queue) => driver.notify(queue),
        Step::Read(at, bytes) => driver.device.read(at, &mut vec![0; bytes]),
        Step::Move => {
            driver.handle.ask_pause();
            driver.handle.wait_paused();
            let saved = driver.device.save().unwrap();
            driver.device.restore(1, &saved).unwrap();
            assert_eq!(driver.device.save().unwrap(), saved);
            driver.handle.resume();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever a driver does: the device goes on behind a reset, and the image keeps its length.
    #[test]
    fn a_hostile_driver_harms_its_own_device_only(steps in steps()) {
        let file = image(SECTORS);
        let mut driver = block(file.path(), false);
        driver.start(0, true);
        for step in steps {
            take(&mut driver, 0, step);
        }
        prop_assert_eq!(driver.start(FLUSH, true), 15);
        prop_assert_eq!(request(&mut driver, 0, 3, Some((BUFFER, 512, true))), (0, 513));
        let mut disk = vec![0; 512];
        file.as_file().read_exact_at(&mut disk, 3 * 512).unwrap();
        prop_assert_eq!(driver.peek(BUFFER, 512), disk);
        prop_assert_eq!(File::open(file.path()).unwrap().metadata().unwrap().len(), SECTORS * 512);
    }

    #[test]
    fn a_hostile_driver_of_a_network_card_harms_nobody_else(steps in steps(), queue in 0_u32..2) {
        let net = Net::new("net0".into(), "none".into(), MacAddress([2; 6]));
        let mut driver = Driver::new(memory(), Box::new(net));
        driver.handle.resume();
        driver.start(0, true);
        for step in steps {
            take(&mut driver, queue, step);
        }
        prop_assert_eq!(driver.start(0, true), 15);
        prop_assert_eq!(driver.request(1, &chain(0, &[(BUFFER, 100, false)])), 0);
    }

    #[test]
    fn a_hostile_driver_of_a_console_harms_nobody_else(steps in steps(), queue in 0_u32..2) {
        use std::io::Read as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.sock");
        let console = Console::new("console0".into(), Some(ConsoleConfig::Socket(path.clone())));
        let mut driver = Driver::new(memory(), Box::new(console));
        driver.handle.acquire().unwrap();
        driver.handle.resume();
        let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let reader = std::thread::spawn(move || client.read_to_end(&mut Vec::new()));
        driver.start(0, true);
        for step in steps {
            take(&mut driver, queue, step);
        }
        prop_assert_eq!(driver.start(0, true), 15);
        prop_assert_eq!(driver.request(1, &chain(0, &[(BUFFER, 100, false)])), 0);
        driver.handle.ask_pause();
        driver.handle.wait_paused();
        driver.handle.release().unwrap();
        prop_assert!(reader.join().unwrap().is_ok());
    }

    #[test]
    fn a_damaged_state_never_panics(at in 0_usize..30, value: u8, cut in 0_usize..30, extra in prop::collection::vec(any::<u8>(), 0..40)) {
        let file = image(8);
        let mut device = block(file.path(), false).device;
        let mut bytes = crate::state::encode(&sample()).unwrap();
        bytes[at] = value;
        let _ = device.restore(1, &bytes);
        let _ = device.restore(1, &bytes[..cut]);
        let _ = device.restore(1, &extra);
        bytes.push(0);
        prop_assert!(device.restore(1, &bytes).is_err());
    }
}
