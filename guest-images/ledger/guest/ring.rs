//! The guest's account and its mail. Layout and rules: `model/mail.rs`.

use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence};

use crate::model::layout::PAGE_SIZE;
use crate::model::mail::{Account, IN_GPA, MAGIC, Mail, OUT_GPA, letter, out};

/// An account that is kept in the out page.
pub struct Ring {
    account: Account,
    version: u64,
}

fn pointer(page: u64, offset: usize) -> *mut u64 {
    assert!(offset.is_multiple_of(8) && offset < PAGE_SIZE as usize);
    ptr::with_exposed_provenance_mut(page as usize + offset)
}

fn put(offset: usize, value: u64) {
    // SAFETY: aligned, in the out page, which is mapped and which no Rust object occupies.
    unsafe { pointer(OUT_GPA, offset).write_volatile(value) };
}

fn get(offset: usize) -> u64 {
    // SAFETY: aligned, in the in page, which is mapped and which no Rust object occupies; any bytes are a valid integer.
    unsafe { pointer(IN_GPA, offset).read_volatile() }
}

impl Ring {
    /// Opens an account with so many tokens.
    pub fn open(tokens: u64) -> Ring {
        let mut ring = Ring { account: Account { balance: tokens, ..Account::default() }, version: 0 };
        ring.publish();
        put(out::MAGIC, MAGIC);
        ring
    }

    /// Reads the mail. Whether anything came of it.
    pub fn turn(&mut self) -> bool {
        // The number before the amount, which was written first.
        let (ack, seq) = (get(letter::ACK), get(letter::SEQ));
        compiler_fence(Ordering::SeqCst);
        let account = self.account.after(&Mail { seq, amount: get(letter::AMOUNT), ack });
        let changed = account != self.account;
        if changed {
            self.account = account;
            self.publish();
        }
        changed
    }

    /// Writes the slot that does not hold, then lets it hold: with one store.
    fn publish(&mut self) {
        self.version += 1;
        let slot = out::SLOTS + (self.version % 2) as usize * out::SLOT_BYTES;
        let Account { balance, sent, amount, received } = self.account;
        for (number, value) in [balance, sent, amount, received].into_iter().enumerate() {
            put(slot + number * 8, value);
        }
        compiler_fence(Ordering::SeqCst);
        put(out::VERSION, self.version);
    }
}
