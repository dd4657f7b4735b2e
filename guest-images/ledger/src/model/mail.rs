//! Tokens that guests pass around a ring: what a checkpoint of several guests must neither lose nor double.
//!
//! A guest holds a balance and sends part of it to the next one, one message at a time: the next one only once this one is
//! acknowledged. It writes its account to one page, and reads the mail of others from another, which it never writes. Who carries the
//! mail is not its business.
//!
//! ```text
//! out page: what this guest says        in page: what it is told
//!   balance, sent, amount, received       seq, amount: the neighbour's message; ack: what the next one has received
//! ```
//!
//! An account changes in one instant: it has two slots, and a version whose last bit says which of them holds.

/// Where a guest keeps its account, one page.
pub const OUT_GPA: u64 = 0x0021_0000;

/// Where it finds its mail, one page.
pub const IN_GPA: u64 = 0x0022_0000;

/// "LDGRRING" in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LDGRRING");

/// The most tokens that a guest may begin with: the sum of any ring fits its counters.
pub const MAX_TOKENS: u64 = 1 << 40;

/// Offsets in the out page in bytes; all fields are `u64`.
pub mod out {
    /// [`MAGIC`](super::MAGIC), once there is an account.
    pub const MAGIC: usize = 0x00;
    /// How often the account has changed; its last bit is the slot that holds.
    pub const VERSION: usize = 0x08;
    /// Two slots: balance, sent, amount, received.
    pub const SLOTS: usize = 0x40;
    /// Bytes of a slot.
    pub const SLOT_BYTES: usize = 0x40;
}

/// Offsets in the in page in bytes; all fields are `u64`.
pub mod letter {
    /// The number of the message.
    pub const SEQ: usize = 0x00;
    /// Its tokens: to be written before its number.
    pub const AMOUNT: usize = 0x08;
    /// The last message of this guest that the next one received.
    pub const ACK: usize = 0x10;
}

/// An account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Tokens it holds.
    pub balance: u64,
    /// The number of the last message it sent; 0 is none.
    pub sent: u64,
    /// The tokens in that message; 0 once it is acknowledged.
    pub amount: u64,
    /// The number of the last message it received.
    pub received: u64,
}

/// What the in page says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mail {
    /// The number of the neighbour's last message.
    pub seq: u64,
    /// Its tokens.
    pub amount: u64,
    /// The last message that the next one received.
    pub ack: u64,
}

impl Account {
    /// The account behind this mail: what is acknowledged is forgotten, what is new is received, and if nothing is on its way,
    /// something is sent.
    #[must_use]
    pub fn after(mut self, mail: &Mail) -> Account {
        if mail.ack == self.sent {
            self.amount = 0;
        }
        if mail.seq == self.received.wrapping_add(1) {
            self.balance = self.balance.wrapping_add(mail.amount);
            self.received += 1;
        }
        if self.amount == 0 && self.balance > 0 {
            // Knuth's multiplicative hash: any amount will do, as long as it is not always the same.
            self.amount = 1 + self.sent.wrapping_mul(0x9E37_79B9_7F4A_7C15) % self.balance;
            self.balance -= self.amount;
            self.sent += 1;
        }
        self
    }

    /// The tokens on their way from this guest to the next one; `None` when the two accounts cannot be of the same instant: the
    /// next one has received what was never sent, or never received what was acknowledged.
    pub fn on_the_way_to(&self, next: &Account) -> Option<u64> {
        if self.sent == next.received {
            Some(0)
        } else if next.received.checked_add(1) == Some(self.sent) && self.amount > 0 {
            Some(self.amount)
        } else {
            None
        }
    }
}
