//! Timers in CRIU's `files.img`, of which it loses some.
//!
//! ```text
//! u32 0x54564319  u32 of this image                       the marks of an image, and of this one
//! u32 bytes       file { 12: timer { … } … }              protocol buffers, each behind its length
//! ```
//!
//! A periodic timer of timerfd_create(2) that expires while its process stands still is not started again by the kernel before somebody reads it, so
//! nothing is left until it expires next; CRIU writes that down, and makes a timer anew that never expires (seen with CRIU 4.2.1 on Linux 6.18). How
//! often it has expired is kept. (images/fdinfo.proto and images/timerfd.proto of CRIU 3.17 to 4.2.)

use prost::Message;

/// The first mark.
const MAGIC: [u8; 4] = [0x19, 0x43, 0x56, 0x54];

/// Bytes of both marks.
const HEAD_BYTES: usize = 8;

/// A file, of which only a timer is of interest: of a field that is there twice, the last is meant.
#[derive(Clone, PartialEq, Eq, Message)]
struct FileMessage {
    #[prost(message, optional, tag = "12")]
    timer: Option<TimerMessage>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct TimerMessage {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    /// A message, as it is.
    #[prost(bytes = "vec", required, tag = "3")]
    owner: Vec<u8>,
    #[prost(uint32, required, tag = "4")]
    clock: u32,
    #[prost(uint64, required, tag = "5")]
    ticks: u64,
    #[prost(uint32, required, tag = "6")]
    settime_flags: u32,
    #[prost(uint64, required, tag = "7")]
    left_s: u64,
    #[prost(uint64, required, tag = "8")]
    left_ns: u64,
    #[prost(uint64, required, tag = "9")]
    interval_s: u64,
    #[prost(uint64, required, tag = "10")]
    interval_ns: u64,
}

/// Lets every such timer in a `files.img` expire one interval after it is made anew, and answers how many there were. An image that is not
/// understood stays as it is: it is CRIU that has to understand it.
pub fn start_again(image: &mut Vec<u8>) -> usize {
    if !image.starts_with(&MAGIC) {
        return 0;
    }
    let mut fixed = image.get(..HEAD_BYTES).unwrap_or(&[]).to_vec();
    let mut rest = image.get(HEAD_BYTES..).unwrap_or(&[]);
    let mut count = 0;
    while let Some((length, behind)) = rest.split_first_chunk::<4>() {
        let Some((file, next)) = usize::try_from(u32::from_le_bytes(*length))
            .ok()
            .and_then(|length| behind.split_at_checked(length))
        else {
            return 0;
        };
        let addition = FileMessage::decode(file).ok().and_then(|file| file.timer).and_then(started);
        let addition = addition.map(|timer| FileMessage { timer: Some(timer) }.encode_to_vec());
        count += usize::from(addition.is_some());
        let addition = addition.unwrap_or_default();
        // Both came out of an image whose length has 32 bits, or are a few bytes.
        fixed.extend(((file.len() + addition.len()) as u32).to_le_bytes());
        fixed.extend_from_slice(file);
        fixed.extend(addition);
        rest = next;
    }
    if rest.is_empty() && count > 0 {
        *image = fixed;
        return count;
    }
    0
}

/// The same timer, started, if it is one that would not be.
fn started(timer: TimerMessage) -> Option<TimerMessage> {
    let is_periodic = timer.interval_s != 0 || timer.interval_ns != 0;
    let is_over = timer.left_s == 0 && timer.left_ns == 0;
    // One that was never set, or was switched off, has no interval; one of an absolute time has flags.
    (is_periodic && is_over && timer.settime_flags == 0).then_some(TimerMessage {
        left_s: timer.interval_s,
        left_ns: timer.interval_ns,
        ..timer
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn timer(left_ns: u64, interval_ns: u64) -> TimerMessage {
        TimerMessage {
            id: 10,
            flags: 2,
            owner: vec![8, 1],
            clock: 1,
            ticks: 3,
            settime_flags: 0,
            left_s: 0,
            left_ns,
            interval_s: 0,
            interval_ns,
        }
    }

    /// An image with files of which CRIU knows more than this.
    fn image(timers: &[Option<TimerMessage>]) -> Vec<u8> {
        let mut bytes = [&MAGIC[..], &[0x38, 0x31, 0x30, 0x56]].concat();
        for timer in timers {
            // type: 17, id: 5
            let mut file = vec![8, 17, 16, 5];
            file.extend(FileMessage { timer: timer.clone() }.encode_to_vec());
            bytes.extend((file.len() as u32).to_le_bytes());
            bytes.extend(file);
        }
        bytes
    }

    fn timers(image: &[u8]) -> Vec<Option<TimerMessage>> {
        let mut rest = &image[HEAD_BYTES..];
        let mut found = Vec::new();
        while let Some((length, behind)) = rest.split_first_chunk::<4>() {
            let (file, next) = behind.split_at(u32::from_le_bytes(*length) as usize);
            assert!(file.starts_with(&[8, 17, 16, 5]));
            found.push(FileMessage::decode(file).unwrap().timer);
            rest = next;
        }
        found
    }

    #[test]
    fn periodic_timers_that_have_expired_start_again_and_no_others_do() {
        let all = [
            None,
            Some(timer(0, 10_000_000)),
            Some(timer(5, 10_000_000)),
            Some(timer(0, 0)),
            Some(TimerMessage { settime_flags: 1, ..timer(0, 7) }),
        ];
        let mut bytes = image(&all);
        assert_eq!(start_again(&mut bytes), 1);
        let mut wanted = all.to_vec();
        wanted[1] = Some(timer(10_000_000, 10_000_000));
        assert_eq!(timers(&bytes), wanted);
        let mut untouched = image(&all[2..]);
        assert_eq!((start_again(&mut untouched), untouched), (0, image(&all[2..])));
        let mut cut = image(&all);
        cut.pop();
        assert_eq!(start_again(&mut cut), 0);
        assert_eq!(cut.len() + 1, image(&all).len());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut image = [&MAGIC[..], &[0; 4], &bytes].concat();
            start_again(&mut image);
        }
    }
}
