//! Several connections to one peer as one link, so that one core is not the limit.
//!
//! The control stream is that of the first. Page streams are dealt out in turn: the *n*-th that is opened or taken is on
//! connection *n* modulo their number, at both ends alike. That holds for as many streams as were agreed on; what is
//! opened later is on the first connection alone.

use super::{Link, LinkStats, PageReceiver, PageSender};
use crate::error::Result;
use crate::identity::Fingerprint;
use std::time::Duration;

/// Several connections as one.
pub(crate) struct Bundle {
    first: Box<dyn Link>,
    further: Vec<Box<dyn Link>>,
    /// Page streams that are dealt out over all of them.
    streams: usize,
    /// How many of these have been.
    dealt: usize,
}

impl Bundle {
    /// `streams` page streams are spread over `first` and `further`.
    pub(crate) fn new(first: Box<dyn Link>, further: Vec<Box<dyn Link>>, streams: u16) -> Self {
        Self { first, further, streams: streams.into(), dealt: 0 }
    }

    /// Does something to the connection of the next page stream.
    fn deal<T>(&mut self, with: impl FnOnce(&mut dyn Link) -> Result<T>) -> Result<T> {
        if self.dealt == self.streams {
            return with(self.first.as_mut());
        }
        let at = self.dealt % (self.further.len() + 1);
        let link = match at.checked_sub(1).and_then(|at| self.further.get_mut(at)) {
            Some(link) => link,
            None => &mut self.first,
        };
        let done = with(link.as_mut())?;
        self.dealt += 1;
        Ok(done)
    }
}

impl Link for Bundle {
    fn peer(&self) -> String {
        self.first.peer()
    }

    fn peer_key(&self) -> Fingerprint {
        self.first.peer_key()
    }

    fn write(&mut self, bytes: &[u8], timeout: Duration) -> Result<()> {
        self.first.write(bytes, timeout)
    }

    fn read_exact(&mut self, buffer: &mut [u8], what: &'static str, timeout: Duration) -> Result<()> {
        self.first.read_exact(buffer, what, timeout)
    }

    fn open_page_stream(&mut self) -> Result<Box<dyn PageSender>> {
        self.deal(|link| link.open_page_stream())
    }

    fn open_urgent_stream(&mut self) -> Result<Box<dyn PageSender>> {
        self.first.open_urgent_stream()
    }

    fn accept_page_stream(&mut self, timeout: Duration) -> Result<Box<dyn PageReceiver>> {
        self.deal(|link| link.accept_page_stream(timeout))
    }

    /// What went over all of them; the path is the same, and the first one tells of it.
    fn stats(&self) -> LinkStats {
        self.further.iter().map(|link| link.stats()).fold(self.first.stats(), |all, one| LinkStats {
            sent_wire_bytes: all.sent_wire_bytes.saturating_add(one.sent_wire_bytes),
            lost_packets: all.lost_packets.saturating_add(one.lost_packets),
            ..all
        })
    }

    /// The first one first: its last words explain the end of the others.
    fn close(self: Box<Self>, reason: &str) {
        let Self { first, further, .. } = *self;
        first.close(reason);
        further.into_iter().for_each(|link| link.close(reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::duplex::{Duplex, Profile, pair};
    use bytes::Bytes;

    const SOON: Duration = Duration::from_secs(5);

    fn bundles(streams: u16) -> (Bundle, Bundle) {
        let pairs: Vec<(Duplex, Duplex)> =
            (0..3).map(|_| pair(&Profile::default(), None)).map(|(here, there, _)| (here, there)).collect();
        let (here, there): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let bundle = |ends: Vec<Duplex>| {
            let mut links = ends.into_iter().map(|end| Box::new(end) as Box<dyn Link>);
            Bundle::new(links.next().unwrap(), links.collect(), streams)
        };
        (bundle(here), bundle(there))
    }

    #[test]
    fn both_ends_deal_streams_out_alike_and_later_ones_go_over_the_first() {
        let (mut here, mut there) = bundles(5);
        for number in 0..5_u8 {
            let mut sender = here.open_page_stream().unwrap();
            sender.write(&mut [Bytes::from(vec![number])]).unwrap();
        }
        for number in 0..5_u8 {
            let mut receiver = there.accept_page_stream(SOON).unwrap();
            assert_eq!(
                receiver.read().unwrap(),
                Some(Bytes::from(vec![number])),
                "one of its own connection"
            );
        }
        let before = here.first.stats().sent_wire_bytes;
        here.open_page_stream().unwrap().write(&mut [Bytes::from("late")]).unwrap();
        here.open_urgent_stream().unwrap().write(&mut [Bytes::from("urgent")]).unwrap();
        assert_eq!(here.first.stats().sent_wire_bytes, before + 10);
        assert_eq!(here.stats().sent_wire_bytes, 15, "all of them are counted");
        let later: Vec<_> = (0..2).map(|_| there.accept_page_stream(SOON).unwrap().read().unwrap()).collect();
        assert_eq!(later, [Some(Bytes::from("late")), Some(Bytes::from("urgent"))]);
    }

    #[test]
    fn closing_it_closes_all() {
        let (mut here, there) = bundles(3);
        let _senders: Vec<_> = (0..3).map(|_| here.open_page_stream().unwrap()).collect();
        Box::new(there).close("done");
        for link in std::iter::once(&mut here.first).chain(&mut here.further) {
            assert!(link.write(b"x", SOON).is_err());
        }
    }
}
