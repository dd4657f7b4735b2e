//! What runs in a container under test whose files go with it: it changes them all the time, and knows what they should be.
//!
//! ```text
//! archivist OUT MIB RATE LIMIT
//! ```
//!
//! In the directory /data it makes MIB of files that stay, and then does RATE things a second, LIMIT in all: it appends to a log with fsync(2), and begins it
//! anew under its old name when it is long; rewrites pages of a mapped file (and one of them every 2 ms besides); makes, renames, removes, links and changes files; makes symbolic links,
//! pipes, directories; gives modes and attributes; and writes into a file that is mostly a hole. In between it compares everything with what it remembers. Ten times a second
//! it writes its record to the start of OUT, as the tenant does: ticks, longest gap between two in microseconds, things done, comparisons of
//! everything, and what was not as it should be in them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a program of tests: it fails by ending, and says why"
)]

use rustix::fs::{FileType, Mode, XattrFlags, mknodat};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const RECORD: usize = 128;
const TICK: Duration = Duration::from_millis(2);
const SAY: Duration = Duration::from_millis(100);

/// How long the log may become, in lines.
const LINES: u64 = 2000;

/// Pages of the mapped file, and of the stock's files.
const MAPPED: usize = 256;
const STOCK: usize = 16;

/// Names that things have.
const NAMES: u64 = 60;

/// The size of the file that is mostly a hole.
const SPARSE: u64 = 1 << 30;

/// A generator of which only the sequence matters (MMIX).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What is under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Thing {
    /// The content of this file.
    File(u64),
    Symlink(String),
    Pipe,
    Folder,
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Content {
    seed: u64,
    bytes: usize,
    mode: u32,
    note: Option<String>,
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        (0..self.bytes).map(|at| (self.seed.wrapping_mul(31).wrapping_add(at as u64 / 7)) as u8).collect()
    }
}

struct Archive {
    folder: PathBuf,
    random: Random,
    things: BTreeMap<String, Thing>,
    contents: BTreeMap<u64, Content>,
    log: File,
    lines: u64,
    generation: u64,
    mapped: &'static [AtomicU64],
    versions: Vec<u64>,
    stock: Vec<u64>,
    holes: BTreeMap<u64, u64>,
    next: u64,
}

fn word(page: usize, version: u64, at: usize) -> u64 {
    ((page as u64) << 32 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(at as u64)
}

fn page(page: usize, version: u64) -> Vec<u8> {
    (0..PAGE / 8).flat_map(|at| word(page, version, at).to_le_bytes()).collect()
}

impl Archive {
    fn new(folder: &Path, mib: usize) -> Self {
        fs::create_dir_all(folder.join("things")).expect("a directory");
        fs::create_dir_all(folder.join("stock")).expect("a directory");
        let files = mib * (1 << 20) / (STOCK * PAGE);
        for file in 0..files {
            let bytes: Vec<u8> = (0..STOCK).flat_map(|at| page(file * STOCK + at, 0)).collect();
            fs::write(folder.join(format!("stock/{file}")), bytes).expect("it is written");
        }
        let path = folder.join("mapped");
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(path).expect("a file");
        file.set_len((MAPPED * PAGE) as u64).expect("room for it");
        // SAFETY: a new mapping touches no memory that is known here.
        let memory = unsafe {
            mmap(
                std::ptr::null_mut(),
                MAPPED * PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        let memory = memory.expect("a mapping").cast::<AtomicU64>();
        // SAFETY: it is as long, is never taken away, and whatever bytes it has are numbers; nobody makes the file shorter.
        let mapped = unsafe { std::slice::from_raw_parts(memory, MAPPED * PAGE / 8) };
        let sparse = File::create(folder.join("sparse")).expect("a file");
        sparse.set_len(SPARSE).expect("room for it");
        let archive = Self {
            folder: folder.into(),
            random: Random(7),
            things: BTreeMap::new(),
            contents: BTreeMap::new(),
            log: File::options().append(true).create(true).open(folder.join("log")).expect("a log"),
            lines: 0,
            generation: 0,
            mapped,
            versions: vec![0; MAPPED],
            stock: vec![0; files * STOCK],
            holes: BTreeMap::new(),
            next: 0,
        };
        (0..MAPPED).for_each(|page| archive.map(page));
        archive
    }

    fn map(&self, page: usize) {
        for at in 0..PAGE / 8 {
            self.mapped[page * PAGE / 8 + at].store(word(page, self.versions[page], at), Ordering::Relaxed);
        }
    }

    fn write_mapped(&mut self) {
        let page = self.random.below(MAPPED as u64) as usize;
        self.versions[page] += 1;
        self.map(page);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join("things").join(name)
    }

    fn line(&self, number: u64) -> String {
        format!("{}: line {number} of the log\n", self.generation)
    }

    fn append(&mut self) {
        if self.lines == LINES {
            fs::rename(self.folder.join("log"), self.folder.join("log.1")).expect("a new name");
            self.log =
                File::options().append(true).create(true).open(self.folder.join("log")).expect("a log");
            (self.lines, self.generation) = (0, self.generation + 1);
        }
        self.log.write_all(self.line(self.lines).as_bytes()).expect("a line");
        self.log.sync_all().expect("it is safe");
        self.lines += 1;
    }

    /// Takes away what a name has.
    fn remove(&mut self, name: &str) {
        let path = self.path(name);
        match self.things.remove(name) {
            None => {}
            Some(Thing::Folder) => fs::remove_dir(path).expect("it is empty"),
            Some(Thing::File(file)) => {
                fs::remove_file(path).expect("it is there");
                if !self.things.values().any(|thing| *thing == Thing::File(file)) {
                    self.contents.remove(&file);
                }
            }
            Some(_) => fs::remove_file(path).expect("it is there"),
        }
    }

    fn any_file(&mut self) -> Option<(String, u64)> {
        let files: Vec<_> = self
            .things
            .iter()
            .filter_map(|(name, thing)| match thing {
                Thing::File(file) => Some((name.clone(), *file)),
                _ => None,
            })
            .collect();
        if files.is_empty() {
            return None;
        }
        let at = self.random.below(files.len() as u64) as usize;
        files.into_iter().nth(at)
    }

    fn one_more(&mut self) {
        let name = format!("thing-{}", self.random.below(NAMES));
        let path = self.path(&name);
        match self.random.below(14) {
            0..=2 => self.append(),
            3 | 4 => self.write_mapped(),
            5 => {
                self.remove(&name);
                self.next += 1;
                let content = Content {
                    seed: self.next,
                    bytes: self.random.below(20_000) as usize,
                    mode: 0o600,
                    note: None,
                };
                fs::write(&path, content.bytes()).expect("a file");
                fs::set_permissions(&path, fs::Permissions::from_mode(content.mode)).expect("a mode");
                self.contents.insert(self.next, content);
                self.things.insert(name, Thing::File(self.next));
            }
            6 => {
                if let Some((from, file)) = self.any_file()
                    && from != name
                {
                    self.remove(&name);
                    fs::rename(self.path(&from), &path).expect("a new name");
                    self.things.remove(&from);
                    self.things.insert(name, Thing::File(file));
                }
            }
            7 => {
                if let Some((from, file)) = self.any_file()
                    && from != name
                {
                    self.remove(&name);
                    fs::hard_link(self.path(&from), &path).expect("a link");
                    self.things.insert(name, Thing::File(file));
                }
            }
            8 => {
                self.remove(&name);
                let target = format!("../nowhere/{}", self.random.below(1000));
                symlink(&target, &path).expect("a link");
                self.things.insert(name, Thing::Symlink(target));
            }
            9 => {
                self.remove(&name);
                let made = mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0);
                made.expect("a pipe");
                self.things.insert(name, Thing::Pipe);
            }
            10 => {
                self.remove(&name);
                fs::create_dir(&path).expect("a directory");
                self.things.insert(name, Thing::Folder);
            }
            11 => {
                // In its place, shorter or longer than it was.
                if let Some((name, file)) = self.any_file() {
                    let path = self.path(&name);
                    let bytes = self.random.below(20_000) as usize;
                    let seed = self.next;
                    let mode = [0o600, 0o640, 0o755][self.random.below(3) as usize];
                    let note = format!("note {seed}");
                    let content = Content { seed, bytes, mode, note: Some(note.clone()) };
                    fs::write(&path, content.bytes()).expect("it is written");
                    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
                    rustix::fs::setxattr(&path, "user.note", note.as_bytes(), XattrFlags::empty())
                        .expect("an attribute");
                    self.contents.insert(file, content);
                }
            }
            12 => {
                let at = self.random.below(SPARSE / PAGE as u64);
                self.next += 1;
                let file = File::options().write(true).open(self.folder.join("sparse")).expect("it is there");
                if self.holes.len() < 40 {
                    file.write_all_at(&page(at as usize, self.next), at * PAGE as u64)
                        .expect("it is written");
                    self.holes.insert(at, self.next);
                } else {
                    file.set_len(0).expect("it is empty");
                    file.set_len(SPARSE).expect("it is a hole");
                    self.holes.clear();
                }
            }
            _ => {
                if !self.stock.is_empty() {
                    let at = self.random.below(self.stock.len() as u64) as usize;
                    self.stock[at] += 1;
                    let path = self.folder.join(format!("stock/{}", at / STOCK));
                    let file = File::options().write(true).open(path).expect("it is there");
                    let offset = (at % STOCK * PAGE) as u64;
                    file.write_all_at(&page(at, self.stock[at]), offset).expect("it is written");
                }
            }
        }
    }

    /// Compares everything with what it should be. Says what is not.
    fn look(&self) -> u64 {
        let mut wrong = Vec::new();
        let mut check = |what: String, is_right: bool| {
            if !is_right {
                wrong.push(what);
            }
        };
        let text = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let expected: String = (0..self.lines).map(|number| self.line(number)).collect();
        check("the log".into(), text == expected);
        let mapped = fs::read(self.folder.join("mapped")).unwrap_or_default();
        for (at, version) in self.versions.iter().enumerate() {
            let expected = page(at, *version);
            check(
                format!("page {at} of the mapped file"),
                mapped.get(at * PAGE..(at + 1) * PAGE) == Some(&expected),
            );
            let words = &self.mapped[at * PAGE / 8..(at + 1) * PAGE / 8];
            let is_right = (0..)
                .zip(words)
                .all(|(index, found)| found.load(Ordering::Relaxed) == word(at, *version, index));
            check(format!("page {at} of the mapping"), is_right);
        }
        for (file, versions) in self.stock.chunks(STOCK).enumerate() {
            let found = fs::read(self.folder.join(format!("stock/{file}"))).unwrap_or_default();
            let expected: Vec<u8> =
                (0..).zip(versions).flat_map(|(at, version)| page(file * STOCK + at, *version)).collect();
            check(format!("file {file} of the stock"), found == expected);
        }
        let sparse = File::open(self.folder.join("sparse")).expect("it is there");
        let metadata = sparse.metadata().expect("its size");
        check("the size of the hole".into(), metadata.len() == SPARSE);
        check("the hole".into(), metadata.blocks() * 512 < 16 << 20);
        let mut buffer = vec![0; PAGE];
        for (at, version) in &self.holes {
            sparse.read_exact_at(&mut buffer, at * PAGE as u64).expect("a page");
            check(format!("page {at} in the hole"), buffer == page(*at as usize, *version));
            let next = (at + 1) % (SPARSE / PAGE as u64);
            if !self.holes.contains_key(&next) {
                sparse.read_exact_at(&mut buffer, next * PAGE as u64).expect("a page");
                check(format!("page {next} of the hole"), buffer.iter().all(|byte| *byte == 0));
            }
        }
        let names: BTreeSet<String> = fs::read_dir(self.folder.join("things"))
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        check(format!("names {names:?}"), names.iter().eq(self.things.keys()));
        for (name, thing) in &self.things {
            let path = self.path(name);
            let Ok(found) = fs::symlink_metadata(&path) else {
                check(name.clone(), false);
                continue;
            };
            let is_right = match thing {
                Thing::Symlink(target) => fs::read_link(&path).is_ok_and(|found| found == Path::new(target)),
                Thing::Pipe => FileType::from_raw_mode(found.mode()) == FileType::Fifo,
                Thing::Folder => found.is_dir(),
                Thing::File(file) => {
                    let expected = &self.contents[file];
                    let links = self.things.values().filter(|thing| **thing == Thing::File(*file)).count();
                    let mut note = [0; 100];
                    let note = rustix::fs::getxattr(&path, "user.note", &mut note[..])
                        .ok()
                        .and_then(|bytes| String::from_utf8(note[..bytes].to_vec()).ok());
                    found.is_file()
                        && found.nlink() == links as u64
                        && found.mode() & 0o7777 == expected.mode
                        && note == expected.note
                        && fs::read(&path).is_ok_and(|bytes| bytes == expected.bytes())
                }
            };
            check(format!("{name}: {thing:?}"), is_right);
        }
        if !wrong.is_empty() {
            let path = self.folder.join("wrong");
            let mut file = File::options().append(true).create(true).open(path).expect("a file");
            writeln!(file, "{wrong:?}").expect("it is written");
        }
        wrong.len() as u64
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments[at].parse::<u64>().expect("a number");
    let mut out = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&arguments[1])
        .expect("its file");
    out.set_len(RECORD as u64).expect("room for its record");
    let mut archive = Archive::new(Path::new("/data"), number(2) as usize);
    let (rate, limit) = (number(3) as f64, number(4));
    let (mut ticks, mut longest, mut done, mut looks, mut wrong) =
        (0_u64, Duration::ZERO, 0_u64, 0_u64, 0_u64);
    let (begun, mut last, mut said) = (Instant::now(), Instant::now(), Instant::now());
    let mut due = 0.0;
    while begun.elapsed() < Duration::from_secs(600) {
        std::thread::sleep(TICK);
        let gap = last.elapsed();
        last = Instant::now();
        longest = longest.max(gap);
        ticks += 1;
        if done < limit {
            // Often: between the last look at a running container and the one at its files while it stands still there are some 10 ms.
            archive.write_mapped();
        }
        due += rate * gap.as_secs_f64().min(0.05);
        while due >= 1.0 && done < limit {
            due -= 1.0;
            archive.one_more();
            done += 1;
        }
        if said.elapsed() >= SAY {
            said = Instant::now();
            wrong += archive.look();
            looks += 1;
            // What was said before is a file, too.
            let mut before = String::new();
            out.seek(SeekFrom::Start(0)).expect("its place");
            out.read_to_string(&mut before).expect("what was said");
            wrong += u64::from(before.len() != RECORD);
            let record = format!("{ticks} {} {done} {looks} {wrong}", longest.as_micros());
            out.seek(SeekFrom::Start(0)).expect("its place");
            writeln!(out, "{record:<width$}", width = RECORD - 1).expect("it is written");
        }
    }
}
