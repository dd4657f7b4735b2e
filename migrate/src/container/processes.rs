//! The processes of a container and their memory.

use super::pagemap;
use crate::error::{Error, Result};
use crate::sys::inject;
use crate::sys::written::{self, PRESENT, SWAPPED, Scan, WP_ALLOWED, WRITTEN, ZERO_PAGE};
use protocol::page::PAGE_SIZE;
use rustix::io::Errno;
use std::cell::Cell;
use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// One process.
pub(crate) struct Process {
    /// Its number inside of the container.
    pub(crate) inside: u32,
    /// Its number on this host.
    pub(crate) pid: i32,
    pub(crate) memory: File,
    pagemap: File,
    /// Whether the kernel can be asked for ranges of pages (PAGEMAP_SCAN, Linux 6.7).
    can_scan: bool,
    /// Which program's memory that is: after execve(2) the files above are still those of what was before.
    program: Option<Program>,
    /// Whether its soft-dirty bits were cleared once: until then they tell nothing.
    is_cleared: Cell<bool>,
    /// Once it is tracked.
    userfaultfd: Option<OwnedFd>,
    /// Somebody else tracks some of its memory: who makes pages clean there takes them away from the other.
    is_shared: Cell<bool>,
}

/// What is known of an area's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// All that are there.
    All,
    /// Those that were written since they were clean.
    Written,
}

impl Process {
    fn open(pid: i32) -> io::Result<Self> {
        let open = |file: &str| File::open(format!("/proc/{pid}/{file}"));
        // First: one that begins another program meanwhile is found by the next look.
        let program = program(pid);
        let (memory, pagemap) = (open("mem")?, open("pagemap")?);
        let inside = inside(pid)?;
        let can_scan = can_scan(&pagemap).is_ok();
        Ok(Self {
            inside,
            pid,
            memory,
            pagemap,
            can_scan,
            program,
            is_cleared: Cell::new(false),
            userfaultfd: None,
            is_shared: Cell::new(false),
        })
    }

    /// Begins to track what it writes. Every page counts as written.
    ///
    /// # Errors
    /// `Host` saying why it cannot be.
    pub(crate) fn track(&mut self) -> Result<()> {
        if self.userfaultfd.is_none() {
            let descriptor = inject::userfaultfd(self.pid)?;
            let too_old = |error: Errno| {
                Error::Host(format!(
                    "this kernel cannot tell what processes write (userfaultfd write protection and PAGEMAP_SCAN, Linux 6.7): {error}"
                ))
            };
            written::begin(&descriptor).map_err(too_old)?;
            can_scan(&self.pagemap).map_err(too_old)?;
            self.userfaultfd = Some(descriptor);
            let gone =
                |error: io::Error| Error::Host(format!("process {} cannot be watched: {error}", self.pid));
            for (start, end) in areas(self.pid).map_err(gone)? {
                self.protect_anew(start, end).map_err(gone)?;
            }
            if self.is_shared.get() {
                self.userfaultfd = None;
                return Err(Error::Host(format!(
                    "what process {} writes is watched already, by another migrate or through a process that has the same memory",
                    self.pid
                )));
            }
        }
        Ok(())
    }

    /// Whether it is tracked; if not, all of its pages count as written.
    pub(crate) fn is_tracked(&self) -> bool {
        self.userfaultfd.is_some() && !self.is_shared.get()
    }

    /// Tells its pages of private memory that no file stands behind, by first page and number, ascending.
    ///
    /// # Errors
    /// The kernel's; `NotFound` or `ESRCH` when it has ended.
    pub(crate) fn pages(&self, which: Which, tell: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        for (start, end) in areas(self.pid)? {
            if !self.can_scan {
                let is_so = |entry| entry & (pagemap::PRESENT | pagemap::SWAPPED) != 0;
                pagemap::runs(&self.pagemap, start, end, is_so, tell)?;
                continue;
            }
            let tracked = which == Which::Written && self.is_tracked() && self.protect_anew(start, end)?;
            let all = if tracked { WRITTEN } else { 0 };
            let what =
                Scan { all, any: PRESENT | SWAPPED, none: ZERO_PAGE, tell: PRESENT, ..Scan::default() };
            let mut tell = |start: u64, end: u64, _| tell(start / PAGE_BYTES, (end - start) / PAGE_BYTES);
            written::scan(&self.pagemap, start, end, what, &mut tell)?;
        }
        Ok(())
    }

    /// Tells its pages that were written since the last time, as `pages` does, and lets all count as clean: for a process that stands still, where the
    /// kernel keeps soft-dirty bits. The first time that is all of them: a child begins with the bits of who started it.
    ///
    /// # Errors
    /// As for `pages`.
    pub(crate) fn soft_dirty(&self, clear: bool, tell: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let wanted = if self.is_cleared.get() { pagemap::SOFT_DIRTY } else { 0 };
        let is_so = |entry| entry & (pagemap::PRESENT | pagemap::SWAPPED) != 0 && entry & wanted == wanted;
        for (start, end) in areas(self.pid)? {
            pagemap::runs(&self.pagemap, start, end, is_so, tell)?;
        }
        if clear {
            pagemap::clear_soft_dirty(self.pid)?;
            self.is_cleared.set(true);
        }
        Ok(())
    }

    /// Sees to it that writes to an area are noticed. All of it counts as written if they were not until now: a mapping that was moved
    /// there may have brought the marks of another place. Answers whether they are noticed.
    fn protect_anew(&self, start: u64, end: u64) -> io::Result<bool> {
        let Some(descriptor) = &self.userfaultfd else { return Ok(false) };
        let mut is_new = false;
        let foreign = Scan { any: PRESENT | SWAPPED, none: WP_ALLOWED, tell: PRESENT, ..Scan::default() };
        written::scan(&self.pagemap, start, end, foreign, &mut |_, _, _| is_new = true)?;
        match written::register(descriptor, start, end - start) {
            Ok(()) => {}
            // It cannot be protected, or it is gone by now.
            Err(Errno::INVAL | Errno::PERM | Errno::NOMEM | Errno::SRCH) => return Ok(false),
            Err(Errno::BUSY) => {
                self.is_shared.set(true);
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        if is_new {
            match written::protect(descriptor, start, end - start, false) {
                // A hole was made in it meanwhile: what is around it is looked at the next time.
                Ok(()) | Err(Errno::NOENT | Errno::AGAIN | Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Pages are clean from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn clean(&self, first: u64, count: u64) -> io::Result<()> {
        if !self.is_tracked() {
            return Ok(());
        }
        let (start, end) = (first * PAGE_BYTES, (first + count) * PAGE_BYTES);
        let what = Scan { all: WRITTEN, tell: WRITTEN, clean: true, ..Scan::default() };
        match written::scan(&self.pagemap, start, end, what, &mut |_, _, _| {}) {
            // It has ended, and what it held is not wanted any more.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether the kernel can be asked for ranges of pages.
fn can_scan(pagemap: &File) -> std::result::Result<(), Errno> {
    let nothing = Scan { all: WRITTEN, tell: WRITTEN, ..Scan::default() };
    written::scan(pagemap, 0, PAGE_BYTES, nothing, &mut |_, _, _| {})
}

/// The right to use the soft-dirty bits of a container: there is one set of them, and who clears it takes it away from everybody else.
pub(crate) struct SoftDirty {
    _lock: File,
}

impl SoftDirty {
    /// For the container of this first process, with a lock in a folder.
    ///
    /// # Errors
    /// `Host` when another has it, or the kernel keeps no such bits.
    pub(crate) fn begin(folder: &Path, first: i32) -> Result<Self> {
        let cannot = |error: io::Error| Error::Host(format!("soft-dirty bits cannot be used: {error}"));
        crate::doctor::try_soft_dirty()
            .map_err(|why| Error::Host(format!("this kernel keeps no soft-dirty bits: {why}")))?;
        std::fs::create_dir_all(folder).map_err(cannot)?;
        let lock = File::create(folder.join(format!("{first}.soft-dirty"))).map_err(cannot)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                Err(Error::Host("what the container writes is watched already, by another migrate".into()))
            }
            Err(TryLockError::Error(error)) => Err(cannot(error)),
        }
    }
}

/// All processes of a container.
#[derive(Default)]
pub(crate) struct Tree {
    /// Its first process, on this host.
    first: i32,
    pub(crate) processes: Vec<Process>,
}

impl Tree {
    /// The tree below the first process of a container.
    ///
    /// # Errors
    /// `Workload` when there is none.
    pub(crate) fn of(first: i32) -> Result<Self> {
        let mut tree = Self { first, processes: Vec::new() };
        tree.look()?;
        if tree.processes.is_empty() {
            return Err(Error::Workload(format!("the container has no process: {first} has ended")));
        }
        Ok(tree)
    }

    /// Looks which processes there are now. Answers whether some are new.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn look(&mut self) -> Result<bool> {
        let pids = descendants(self.first);
        let there: HashSet<i32> = pids.iter().copied().collect();
        // One that has begun another program is another one: all of its memory is.
        let is_same = |process: &Process| process.program == program(process.pid);
        self.processes.retain(|process| there.contains(&process.pid) && is_same(process));
        let known: HashSet<i32> = self.processes.iter().map(|process| process.pid).collect();
        let mut is_new = false;
        for pid in pids.into_iter().filter(|pid| !known.contains(pid)) {
            match Process::open(pid) {
                Ok(process) => self.processes.push(process),
                // It has ended since.
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    return Err(Error::Host(format!("the memory of process {pid} cannot be read: {error}")));
                }
            }
            is_new = true;
        }
        Ok(is_new)
    }
}

/// Whether an error says that a process is not there any more.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(error) == Some(Errno::SRCH)
}

/// What the kernel gave a program when it began: random bytes, by which two of them are told apart that have the same addresses, as after
/// vfork(2) a child and who started it have, until the child begins its own (`AT_RANDOM` in getauxval(3)).
type Program = [u8; 16];

/// `AT_RANDOM` (include/uapi/linux/auxvec.h).
const AT_RANDOM: u64 = 25;

/// Which program a process runs; `None` if it does not tell.
fn program(pid: i32) -> Option<Program> {
    let auxiliary = std::fs::read(format!("/proc/{pid}/auxv")).ok()?;
    let number = |bytes: &[u8; 8]| u64::from_ne_bytes(*bytes);
    let words: Vec<u64> = auxiliary.as_chunks::<8>().0.iter().map(number).collect();
    let (_, address) = words
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[key, value]| (*key, *value))
        .find(|(key, _)| *key == AT_RANDOM)?;
    let mut random = Program::default();
    File::open(format!("/proc/{pid}/mem")).ok()?.read_exact_at(&mut random, address).ok()?;
    Some(random)
}

/// A process and everything that it started, and they: those that CRIU would write down.
fn descendants(first: i32) -> Vec<i32> {
    let mut found = vec![first];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        }
    }
    // One that ended and is not waited for has no memory.
    found.retain(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok());
    found
}

/// The number of a process in its innermost PID namespace (proc_pid_status(5)).
fn inside(pid: i32) -> io::Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let number = status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last());
    number
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| io::Error::other("the kernel does not tell its number in the container"))
}

/// The address ranges of a process's private memory that no file stands behind: what CRIU can leave in place (`vma_entry_can_be_lazy` in its
/// criu/include/vma.h).
fn areas(pid: i32) -> io::Result<Vec<(u64, u64)>> {
    // What a process calls its files can be anything.
    let maps = std::fs::read(format!("/proc/{pid}/maps"))?;
    Ok(maps.split(|byte| *byte == b'\n').filter_map(area).collect())
}

/// The addresses in a line of proc_pid_maps(5), if they are private memory: `start-end perms offset dev inode name`.
fn area(line: &[u8]) -> Option<(u64, u64)> {
    let line = str::from_utf8(line).ok()?;
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (permissions, inode) = (words.next()?, words.nth(2)?);
    let is_memory = match words.next() {
        None | Some("[heap]" | "[stack]") => true,
        Some(name) => name.starts_with("[anon:") || name.starts_with("[stack:"),
    };
    let is_private = permissions.ends_with('p') && inode == "0";
    let number = |text| u64::from_str_radix(text, 16).ok().filter(|address| address % PAGE_BYTES == 0);
    (is_memory && is_private).then_some((number(start)?, number(end)?)).filter(|(start, end)| start < end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn private_memory_is_told_from_everything_else() {
        let heap = "08ec6000-08ee8000 rw-p 00000000 00:00 0                                  [heap]";
        assert_eq!(area(heap.as_bytes()), Some((0x08ec6000, 0x08ee8000)));
        for memory in ["1000-2000 rw-p 0 00:00 0", "1000-2000 ---p 0 00:00 0 [anon:a b]"] {
            assert_eq!(area(memory.as_bytes()), Some((0x1000, 0x2000)), "{memory}");
        }
        for other in [
            "",
            "1000-2000",
            "1000-2000 rw-s 0 00:01 5 /dev/zero (deleted)",
            "1000-2000 rw-p 0 08:01 77 /SYSV",
            "1000-2000 r--p 0 00:00 0 [vvar]",
            "1000-2000 r-xp 0 00:00 0 [vdso]",
            "2000-1000 rw-p 0 00:00 0",
            "1001-2000 rw-p 0 00:00 0",
            "x-2000 rw-p 0 00:00 0",
        ] {
            assert_eq!(area(other.as_bytes()), None, "{other}");
        }
        assert_eq!(area(b"1000-2000 rw-p 0 08:01 77 /\xff"), None);
    }

    #[test]
    fn another_program_in_a_process_is_another_process() {
        let child = Command::new("sh")
            .args(["-c", "read line; echo $line; read line; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut child = Killed(child);
        let pid = child.0.id() as i32;
        let mut output = io::BufReader::new(child.0.stdout.take().unwrap());
        let mut say = |line: &str| {
            io::Write::write_all(child.0.stdin.as_mut().unwrap(), line.as_bytes()).unwrap();
            let mut heard = String::new();
            io::BufRead::read_line(&mut output, &mut heard).unwrap();
            heard
        };
        assert_eq!(say("sh runs\n"), "sh runs\n");
        let mut tree = Tree::of(pid).unwrap();
        assert!(!tree.look().unwrap());
        // All bits count as set until they were cleared, whatever they are.
        let count = |tree: &Tree| {
            let mut count = 0;
            tree.processes[0].soft_dirty(false, &mut |_, pages| count += pages).unwrap();
            count
        };
        assert!(count(&tree) > 0);
        assert_eq!(say("\ncat runs\n"), "cat runs\n");
        // What was opened before is nobody's memory any more, and says so.
        let mut tell = |_, _| panic!("there is nothing");
        let stale = tree.processes[0].soft_dirty(false, &mut tell).unwrap_err();
        assert!(is_gone(&stale), "{stale}");
        assert!(tree.look().unwrap(), "it is another one");
        assert_eq!((tree.processes.len(), tree.processes[0].pid), (1, pid));
        assert!(count(&tree) > 0);
        assert!(!tree.look().unwrap());
    }

    #[test]
    fn a_tree_is_found_and_its_writes_are() {
        let script = "sleep 60 & while read line; do echo $line; done";
        let child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut child = Killed(child);
        std::thread::sleep(std::time::Duration::from_millis(200));
        let pid = child.0.id() as i32;
        let mut tree = Tree::of(pid).unwrap();
        assert_eq!(tree.processes.len(), 2, "the shell, and what it started");
        assert!(!tree.look().unwrap());
        let shell = tree.processes.iter_mut().find(|process| process.pid == pid).unwrap();
        assert_eq!(shell.inside, child.0.id());
        let count = |shell: &Process, which| {
            let mut count = 0;
            shell.pages(which, &mut |_, pages| count += pages).unwrap();
            count
        };
        let all = count(shell, Which::All);
        assert!(all > 3);
        if let Err(error) = shell.track() {
            // Only where the kernel is too old for it.
            assert!(error.to_string().contains("Linux 6.7"), "{error}");
            return;
        }
        assert_eq!(count(shell, Which::Written), all);
        // Whoever comes second must not take away what the first one has to find.
        let mut again = Process::open(pid).unwrap();
        assert!(again.track().unwrap_err().to_string().contains("watched already"));
        again.clean(0, 1 << 35).unwrap();
        let mut counted = 0;
        again.pages(Which::Written, &mut |_, pages| counted += pages).unwrap();
        assert_eq!((counted, count(shell, Which::Written)), (all, all));
        let mut pages = Vec::new();
        shell.pages(Which::All, &mut |first, count| pages.push((first, count))).unwrap();
        pages.iter().for_each(|(first, count)| shell.clean(*first, *count).unwrap());
        assert_eq!(count(shell, Which::Written), 0);
        let input = child.0.stdin.as_mut().unwrap();
        io::Write::write_all(input, b"hello\n").unwrap();
        let mut output = io::BufReader::new(child.0.stdout.as_mut().unwrap());
        io::BufRead::read_line(&mut output, &mut String::new()).unwrap();
        let written = count(shell, Which::Written);
        assert!(written > 0 && written <= all, "{written} of {all}");
    }
}
