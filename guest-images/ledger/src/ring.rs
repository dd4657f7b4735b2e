//! A guest's account in a ring, as a host reads it.

use crate::model::mail::{Account, MAGIC, OUT_GPA, out};

/// How often a running guest's account is read anew because it changed meanwhile.
const TRIES: usize = 1000;

impl Account {
    /// Reads it from guest-physical memory, of a running guest too: as it was in one instant. `None` when there is none, or it
    /// never held still.
    ///
    /// # Errors
    /// As `read`.
    pub fn read<E>(read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<Option<Account>, E> {
        let mut word = |offset: usize| {
            let mut bytes = [0; 8];
            read(OUT_GPA + offset as u64, &mut bytes).map(|()| u64::from_le_bytes(bytes))
        };
        if word(out::MAGIC)? != MAGIC {
            return Ok(None);
        }
        for _ in 0..TRIES {
            let version = word(out::VERSION)?;
            let slot = out::SLOTS + (version % 2) as usize * out::SLOT_BYTES;
            let account = Account {
                balance: word(slot)?,
                sent: word(slot + 8)?,
                amount: word(slot + 16)?,
                received: word(slot + 24)?,
            };
            if word(out::VERSION)? == version {
                return Ok(Some(account));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::mail::Mail;

    fn mail(from: &Account, next: &Account) -> Mail {
        Mail { seq: from.sent, amount: from.amount, ack: next.received }
    }

    #[test]
    fn a_ring_neither_loses_nor_doubles_a_token_however_slow_the_mail_is() {
        let mut ring =
            [Account { balance: 1000, ..Account::default() }, Account::default(), Account::default()];
        let mut mails = [Mail::default(); 3];
        let mut random = 1_u64;
        for _ in 0..10_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (random >> 33) as usize % 3;
            if random >> 63 == 0 {
                ring[at] = ring[at].after(&mails[at]);
            } else {
                mails[at] = mail(&ring[(at + 2) % 3], &ring[(at + 1) % 3]);
            }
            let on_the_way = (0..3).map(|at| ring[at].on_the_way_to(&ring[(at + 1) % 3]).unwrap());
            let sum: u64 = on_the_way.sum::<u64>() + ring.iter().map(|account| account.balance).sum::<u64>();
            assert_eq!(sum, 1000);
        }
        assert!(ring.iter().all(|account| account.sent > 100));
    }

    #[test]
    fn accounts_of_different_instants_are_noticed() {
        let early = Account { balance: 5, sent: 3, amount: 2, received: 7 };
        let next = |received| Account { received, ..Account::default() };
        assert_eq!(early.on_the_way_to(&next(2)), Some(2));
        assert_eq!(early.on_the_way_to(&next(3)), Some(0));
        // It received what was sent later, or never received what was acknowledged.
        assert_eq!(early.on_the_way_to(&next(4)), None);
        assert_eq!(early.on_the_way_to(&next(1)), None);
        assert_eq!(Account { amount: 0, ..early }.on_the_way_to(&next(2)), None);
    }
}
