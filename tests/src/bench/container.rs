//! The pause of a container that moves: by our rounds, and by hand, which is to write all of it down, copy that, and make it anew.
//!
//! Both ends are on this machine and nothing is copied over a network by hand, so what is compared with is as good as it can be: images go
//! from one directory in memory to another.

use crate::containers::Yard;
use crate::trusting_pair;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What the process has, in MiB, and how many pages it writes a second: 20 MB/s.
const MIB: u64 = 512;
const PAGES_PER_S: u64 = 5000;

/// How long it runs before it moves, and behind that.
const QUIET: Duration = Duration::from_secs(1);

/// How a container is moved.
#[derive(Debug, Clone, Copy)]
pub(super) enum How {
    /// `migrate send`.
    Rounds,
    /// The same, where the kernel does not tell what is written.
    Digests,
    /// runc checkpoint, cp, runc restore.
    ByHand,
}

impl How {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::Rounds, Self::Digests, Self::ByHand];

    /// Its name in results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rounds => "rounds",
            Self::Digests => "digests",
            Self::ByHand => "by-hand",
        }
    }
}

/// One move: the longest gap between two ticks of the process, in microseconds, what the move took, and, of a move by rounds, how many pages were sent
/// after the first one, and how many the process wrote from the beginning of the move to its end: more than it wrote between the looks of the first
/// round and of the last, by what it wrote before and behind them.
///
/// # Panics
/// If it does not arrive, or not whole.
pub(super) fn measure(program: &Path, how: How) -> Value {
    let (a, b) = trusting_pair(program);
    let (from, to) = (Yard::new(), Yard::new());
    let (id, name) = (Yard::name(), Yard::name());
    let tenant = program.with_file_name("tenant");
    from.start(&id, &tenant, &format!("{MIB} {PAGES_PER_S}"));
    std::thread::sleep(QUIET);
    let before = from.words(&id)[0].longest_gap_us;
    let written = |word: &crate::containers::Word| word.written;
    let written_before = from.words(&id).first().map(written);
    let begun = Instant::now();
    let mut sent_again = None;
    match how {
        How::ByHand => by_hand(&from, &to, &id, &name),
        How::Rounds | How::Digests => {
            let bundles = to.bundles().to_string_lossy().into_owned();
            let theirs = to.arguments();
            let mut receives = vec!["--once", "--name", &name, "--containers", &bundles];
            receives.extend(theirs.iter().map(String::as_str));
            let (receiver, address) = b.receive(&receives);
            let ours = from.arguments();
            let mut sends = vec!["send", "--container", &id, &address];
            if matches!(how, How::Digests) {
                sends.extend(["--tracking", "digests"]);
            }
            sends.extend(ours.iter().map(String::as_str));
            let sent = a.run(&sends).success();
            let rounds = sent.event("report").and_then(|report| report["rounds"].as_array());
            let pages = |round: &Value| round["sent_pages"].as_u64().unwrap_or(0);
            sent_again = rounds.map(|rounds| rounds.iter().skip(1).map(pages).sum::<u64>());
            receiver.finish().success();
        }
    }
    let total_us = begun.elapsed().as_micros() as u64;
    let written_after = from.words(&id).first().map(written);
    std::thread::sleep(QUIET);
    from.assert_sound(&id);
    let longest = from.words(&id)[0].longest_gap_us;
    assert!(longest > before, "it moved and did not notice");
    let mut sample = json!({"gap_us": longest, "gap_undisturbed_us": before, "total_us": total_us});
    if let (Some(sent), Some(before), Some(after)) = (sent_again, written_before, written_after) {
        sample["sent_again_pages"] = json!(sent);
        sample["written_pages"] = json!(after - before);
    }
    sample
}

fn by_hand(from: &Yard, to: &Yard, id: &str, name: &str) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("memory for images");
    let (there, here) = (folder.path().join("there"), folder.path().join("here"));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let done = |command: &mut Command| {
        let status = command.status();
        assert!(status.is_ok_and(|status| status.success()), "{command:?} did not work");
    };
    done(&mut from.with_criu(&[
        "checkpoint",
        "--image-path",
        &text(&there),
        "--work-path",
        &text(&there),
        id,
    ]));
    done(Command::new("cp").arg("-r").arg(&there).arg(&here));
    let (bundle, work) = (text(&from.bundle(id)), text(folder.path()));
    done(&mut to.with_criu(&[
        "restore",
        "--detach",
        "--image-path",
        &text(&here),
        "--work-path",
        &work,
        "--bundle",
        &bundle,
        name,
    ]));
}
