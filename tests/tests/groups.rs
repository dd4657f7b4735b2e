//! Guests that pass tokens to each other are written down together: no token is lost, and none is there twice.
//!
//! # The ring
//!
//! Each guest has an account in its memory and sends part of it to the next one (`ledger::model::mail`). The network is this test: a
//! thread that copies what one guest says to where the next one reads its mail, through their memory files, for as long as it is told to.
//! It keeps no account of its own. A message stays with its sender until it is acknowledged, and is received once, because it has a
//! number; so the mail may be late, come twice, or be forgotten, and changes nothing. Whatever is in a mail page is a copy of what a sender
//! says, and cannot be more.
//!
//! # Why a cut of one instant keeps the sum, and any other one does not
//!
//! An account changes with one store, so in any instant each guest's account is before or behind a step, never in between. A token is, in
//! that instant, either in a balance or in the one message that its sender has not seen acknowledged; and if the next one has received that
//! message, it is in its balance: the two numbers tell. That is all, because the mail holds nothing of its own. So all balances and all
//! messages that were sent and not received make up what there was at the beginning, exactly.
//!
//! A checkpoint of the group has of every guest the memory it had while all of them stood still, so it is such an instant, and the
//! test's own writes do not matter: they touch only mail pages, before it, within it or behind it. While all stand still, what is copied
//! is what the accounts say in that instant. Memory files are written to behind KVM's back, so a mail page may also be restored as
//! it once was: that is mail that comes late.
//!
//! Without that instant, a guest that is frozen later may have received what one that was frozen earlier has yet to send (tokens are there
//! twice), or the sender is the later one and has forgotten what was acknowledged behind the other's checkpoint (tokens are lost). With
//! thousands of messages a second, milliseconds between two freezes are enough for the same test to find that.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Host, without_kvm};
use ledger::Account;
use ledger::model::mail::{IN_GPA, OUT_GPA, letter};
use migrate::vault::{SegmentReader, Unpacker, Vault};
use protocol::checkpoint::index::{At, Placed};
use protocol::checkpoint::name::CheckpointId;
use protocol::page::PAGE_SIZE;
use rustix::process::Signal;
use serde_json::Value;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// The guests: of different size and haste, so that each would be frozen at another time.
const GUESTS: [(&str, &str, &str); 3] = [
    ("a", "64MiB", "fill=8M ws=2M rate=4 ring=1000 tick_us=200"),
    ("b", "96MiB", "fill=32M ws=8M rate=20 ring=1000 tick_us=200"),
    ("c", "128MiB", "fill=64M ws=16M rate=40 ring=1000 tick_us=200"),
];

const TOKENS: u64 = 3000;

/// A guest's memory, from outside.
struct Memory(File);

impl Memory {
    fn of(host: &Host, name: &str) -> Self {
        let descriptors = format!("/proc/{}/fd", host.vm_pid(name));
        let found = std::fs::read_dir(descriptors).expect("its descriptors").flatten().find_map(|entry| {
            let to = std::fs::read_link(entry.path()).ok()?;
            to.to_string_lossy().starts_with("/memfd:guest-ram").then_some(())?;
            let file = File::options().read(true).write(true).open(entry.path()).ok()?;
            file.metadata().is_ok_and(|data| data.len() >= 64 << 20).then_some(file)
        });
        Self(found.expect("its memory"))
    }

    fn account(&self) -> Option<Account> {
        Account::read(&mut |address, bytes: &mut [u8]| self.0.read_exact_at(bytes, address))
            .expect("its memory")
    }

    fn put(&self, offset: usize, value: u64) {
        self.0.write_all_at(&value.to_le_bytes(), IN_GPA + offset as u64).expect("its mail");
    }
}

/// The network of a ring: carries mail until it is dropped.
struct Network {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Network {
    fn of(host: &Host) -> Self {
        let ring: Vec<Memory> = GUESTS.iter().map(|(name, ..)| Memory::of(host, name)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                for at in 0..ring.len() {
                    let (from, to) = (&ring[at], &ring[(at + 1) % ring.len()]);
                    if let Some(Account { sent, amount, .. }) =
                        from.account().filter(|account| account.amount > 0)
                    {
                        to.put(letter::AMOUNT, amount);
                        to.put(letter::SEQ, sent);
                    }
                    if let Some(Account { received, .. }) = to.account() {
                        from.put(letter::ACK, received);
                    }
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.take().expect("it runs").join();
        if !std::thread::panicking() {
            ended.expect("the network does not panic");
        }
    }
}

/// All tokens of a ring; `None` where two accounts cannot be of one instant.
fn tokens(ring: &[Account]) -> Option<u64> {
    let on_the_way = (0..ring.len()).map(|at| ring[at].on_the_way_to(&ring[(at + 1) % ring.len()]));
    Some(on_the_way.sum::<Option<u64>>()? + ring.iter().map(|account| account.balance).sum::<u64>())
}

/// The accounts once nothing changes any more, because nobody carries mail.
fn settled(host: &Host) -> Vec<Account> {
    let memories: Vec<Memory> = GUESTS.iter().map(|(name, ..)| Memory::of(host, name)).collect();
    let all = || memories.iter().map(Memory::account).collect::<Option<Vec<_>>>().expect("accounts");
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let before = all();
        std::thread::sleep(Duration::from_millis(100));
        if all() == before {
            return before;
        }
        assert!(Instant::now() < until, "the accounts change without mail: {before:?}");
    }
}

/// The account in a checkpoint, read from the store.
fn account_in(vault: &Vault, id: CheckpointId) -> Account {
    let page = OUT_GPA / PAGE_SIZE as u64;
    for link in vault.chain(id).expect("its chain") {
        let index = vault.index(&link.manifest).expect("its index");
        let found = index.runs.iter().find(|Placed { run, .. }| {
            run.space.0 == 0 && run.first <= page && page < run.first + u64::from(run.count)
        });
        let Some(Placed { run, at: At::Extent { extent, page: first } }) = found else {
            assert!(found.is_none(), "the account is zeros");
            continue;
        };
        let extent = &index.extents[*extent as usize];
        let segment = &link.manifest.segments[extent.segment as usize];
        let segment = SegmentReader::open(vault, segment).expect("its segment");
        let mut unpacker = Unpacker::default();
        let pages = segment.read(extent, &mut unpacker).expect("its pages");
        let at = (u64::from(*first) + page - run.first) as usize * PAGE_SIZE;
        let bytes = &pages[at..at + PAGE_SIZE];
        let account = Account::read(&mut |address, word: &mut [u8]| {
            let offset = (address - OUT_GPA) as usize;
            word.copy_from_slice(&bytes[offset..offset + word.len()]);
            Ok::<(), io::Error>(())
        });
        return account.expect("no errors").expect("an account");
    }
    panic!("{id} has no account");
}

/// The accounts in a group checkpoint, in the ring's order.
fn accounts_in(store: &str, group: &Value) -> Vec<Account> {
    let vault = Vault::open(migrate::store::open(store).expect("the store"), None).expect("the vault");
    let members = group["members"].as_array().unwrap_or_else(|| panic!("{group:#}"));
    let id = |name: &str| {
        let member = members.iter().find(|member| member["workload"] == name);
        member.and_then(|member| member["id"].as_str()).expect("its checkpoint").parse().expect("a name")
    };
    GUESTS.iter().map(|(name, ..)| account_in(&vault, id(name))).collect()
}

/// A host with the ring, and the place of a store that is not there yet.
fn scene() -> (Host, String) {
    let host = Host::new(Path::new(PROGRAM));
    for (name, memory, cmdline) in GUESTS {
        host.run_ledger(name, memory, cmdline, &[]);
    }
    for (name, ..) in GUESTS {
        host.wait_ledger_running(name);
    }
    let store = host.path("store").to_string_lossy().into_owned();
    (host, store)
}

const TAKE: [&str; 6] = ["checkpoint", "a", "b", "c", "--group", "ring"];

fn take(host: &Host, store: &str, more: &[&str]) -> Value {
    let taken = host.run(&[&TAKE[..], &["--store", store], more].concat()).success();
    taken.event("group").unwrap_or_else(|| panic!("{taken:#?}")).clone()
}

/// Waits until every guest has sent so many messages more.
fn wait_traffic(host: &Host, more: u64) {
    let memories: Vec<Memory> = GUESTS.iter().map(|(name, ..)| Memory::of(host, name)).collect();
    let sent = || memories.iter().map(|memory| memory.account().map_or(0, |account| account.sent));
    let wanted: Vec<u64> = sent().map(|sent| sent + more).collect();
    let until = Instant::now() + Duration::from_secs(30);
    while !sent().zip(&wanted).all(|(sent, wanted)| sent >= *wanted) {
        assert!(Instant::now() < until, "the ring stands still: {:?}", sent().collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_group_checkpoint_neither_loses_nor_doubles_a_token() {
    if without_kvm("a_group_checkpoint_neither_loses_nor_doubles_a_token") {
        return;
    }
    let (host, store) = scene();
    let network = Network::of(&host);
    wait_traffic(&host, 100);
    for round in 0..5 {
        let group = take(&host, &store, &[]);
        assert!(group["together_us"].as_u64() > Some(0), "{group:#}");
        eprintln!(
            "freezes within {} us, together {} us, longest pause {} us",
            group["freeze_spread_us"], group["together_us"], group["longest_pause_us"]
        );
        let accounts = accounts_in(&store, &group);
        assert_eq!(tokens(&accounts), Some(TOKENS), "round {round}: {accounts:?}");
        wait_traffic(&host, 20);
    }
    drop(network);
    assert_eq!(tokens(&settled(&host)), Some(TOKENS), "the ring itself is sound");
    for (name, ..) in GUESTS {
        host.run(&["vm", "stop", name]).success();
        host.wait_phase(name, None);
    }
    // All of them come back as they were, and go on.
    let restored = host.run(&["restore", "--store", &store, "--group", "ring"]).success();
    assert_eq!(restored.lines.iter().filter(|line| line["event"] == "restored").count(), 3, "{restored:#?}");
    assert_eq!(tokens(&settled(&host)), Some(TOKENS));
    let network = Network::of(&host);
    wait_traffic(&host, 100);
    drop(network);
    assert_eq!(tokens(&settled(&host)), Some(TOKENS));
    for (name, ..) in GUESTS {
        host.assert_sound(name);
    }
}

#[test]
fn without_the_barrier_the_same_test_finds_tokens_lost_or_doubled() {
    if without_kvm("without_the_barrier_the_same_test_finds_tokens_lost_or_doubled") {
        return;
    }
    let (host, store) = scene();
    let network = Network::of(&host);
    wait_traffic(&host, 100);
    let mut found = Vec::new();
    let inconsistent = (0..10).any(|_| {
        wait_traffic(&host, 20);
        let group = take(&host, &store, &["--no-barrier", "--full"]);
        found.push(tokens(&accounts_in(&store, &group)));
        found.last() != Some(&Some(TOKENS))
    });
    assert!(inconsistent, "ten checkpoints of no instant, and each adds up: {found:?}");
    drop(network);
    assert_eq!(tokens(&settled(&host)), Some(TOKENS), "the ring itself is sound");
}

#[test]
fn a_group_whose_engine_is_killed_has_no_checkpoint_and_goes_on() {
    if without_kvm("a_group_whose_engine_is_killed_has_no_checkpoint_and_goes_on") {
        return;
    }
    let (host, store) = scene();
    let network = Network::of(&host);
    let first = take(&host, &store, &[]);
    for phase in ["rounds", "freeze", "state", "write", "commit"] {
        let mut taking = host.start_held(&[&TAKE[..], &["--store", &store]].concat(), phase);
        taking.wait_held();
        taking.signal(Signal::KILL);
        taking.finish();
        for (name, ..) in GUESTS {
            host.wait_phase(name, Some("running"));
        }
        wait_traffic(&host, 20);
        // The newest that exists is the one before, whose members the next ones stand on.
        let next = take(&host, &store, &[]);
        let accounts = accounts_in(&store, &next);
        assert_eq!(tokens(&accounts), Some(TOKENS), "killed in {phase}: {accounts:?}");
        assert!(next["members"].as_array().unwrap().iter().all(|member| !member["parent"].is_null()));
    }
    drop(network);
    assert_eq!(tokens(&accounts_in(&store, &first)), Some(TOKENS));
    assert_eq!(tokens(&settled(&host)), Some(TOKENS));
}
