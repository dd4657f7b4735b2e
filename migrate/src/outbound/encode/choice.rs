//! Whether packing pays, found out by measuring: pure rules, without a clock.
//!
//! What counts is how long a byte of memory keeps a lane busy, encoding and the wait for the link together. Where the link is
//! the limit, nearly all of it is that wait, and it shrinks as the bytes do; where the processors are, packing makes it longer,
//! at this end by its own time, and by the other end's through the window that stays full. So the time of each way to
//! send is measured while it is used, and the shortest is used. What is not in use is tried again now and then, the more
//! seldom the worse it was, so that trying costs [`TRYING_PART`] of the time or less.

/// A way to send pages that are not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::outbound) enum Method {
    Raw,
    Lz4,
    Zstd,
}

impl Method {
    pub(in crate::outbound) const ALL: [Self; 3] = [Self::Raw, Self::Lz4, Self::Zstd];
}

/// Bytes on the wire that are sent in a new way before its time counts: the link's window (8 MiB) must be as full as it will
/// be, or a receiver that cannot keep up goes unnoticed.
const SETTLE_BYTES: u64 = 9 << 20;

/// How much longer packing is taken to last than it does, because it takes from the workload's processors.
pub(crate) const PACKING_FEE: f64 = 1.2;

/// Memory whose time is measured before it says something.
const ENOUGH_BYTES: f64 = (8 << 20) as f64;

/// What is sent as it is before a way of packing is tried at all.
pub(crate) const LEARNS_BYTES: u64 = SETTLE_BYTES + ENOUGH_BYTES as u64;

/// Memory after which a measurement counts half.
const HALF_LIFE_BYTES: f64 = (32 << 20) as f64;

/// What trying a worse way again may cost of the time of the better one.
const TRYING_PART: f64 = 1.0 / 64.0;

/// What a prediction must promise to be tried for the first time: it may be wrong either way by so much.
pub(crate) const PROMISE: f64 = 1.1;

/// In the round that is sent while the workload stands still, packing must save so much at least: what packs and unpacks
/// there is not hidden behind other work.
const FROZEN_GAIN: f64 = 0.7;

/// What packing did to a few pages: time and length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::outbound) struct Sample {
    /// To pack a byte, in nanoseconds.
    pub(in crate::outbound) ns_per_byte: f64,
    /// Length behind over length before.
    pub(in crate::outbound) part: f64,
}

/// Time over memory, the latest counting most.
#[derive(Debug, Clone, Copy, Default)]
struct Gauge {
    bytes: f64,
    ns: f64,
}

impl Gauge {
    fn add(&mut self, bytes: f64, ns: f64) {
        let kept = 0.5f64.powf(bytes / HALF_LIFE_BYTES);
        self.bytes = self.bytes * kept + bytes;
        self.ns = self.ns * kept + ns;
    }

    fn ns_per_byte(&self) -> Option<f64> {
        (self.bytes >= ENOUGH_BYTES).then(|| self.ns / self.bytes)
    }
}

/// Which way to send, for all lanes together.
#[derive(Debug, Clone)]
pub(in crate::outbound) struct Choice {
    allowed: [bool; 3],
    gauges: [Gauge; 3],
    samples: [Option<Sample>; 3],
    /// Memory to be sent before a way is tried again.
    pause_bytes: [u64; 3],
    using: Method,
    /// What is in use is only being tried.
    trying: bool,
    /// Bytes on the wire since what is in use is in use, in this round.
    settled_bytes: u64,
}

impl Choice {
    /// Nothing measured; `allowed` tells which ways both ends have.
    pub(in crate::outbound) fn new(allowed: impl Fn(Method) -> bool) -> Self {
        let allowed = Method::ALL.map(allowed);
        let using = Method::ALL.into_iter().find(|method| allowed[*method as usize]).unwrap_or(Method::Raw);
        Self {
            allowed,
            gauges: [Gauge::default(); 3],
            samples: [None; 3],
            pause_bytes: [0; 3],
            using,
            trying: false,
            settled_bytes: 0,
        }
    }

    /// The way for memory that can be packed.
    pub(in crate::outbound) fn using(&self, frozen: bool) -> Method {
        if !frozen {
            return self.using;
        }
        let best = self.best();
        match (self.time(best), self.time(Method::Raw)) {
            (Some(best_ns), Some(raw_ns)) if best_ns > raw_ns * FROZEN_GAIN && self.allows(Method::Raw) => {
                Method::Raw
            }
            _ => best,
        }
    }

    /// How long a byte of memory keeps a lane busy now, in nanoseconds, once that is known.
    pub(in crate::outbound) fn ns_per_byte(&self) -> Option<f64> {
        self.time(self.using)
    }

    /// Whether anything can be gained by packing at all, as far as is known: else nothing need be sampled.
    pub(in crate::outbound) fn packs(&self) -> bool {
        self.allowed[1..].contains(&true)
    }

    /// The packing whose sample decides whether a piece of memory can be packed.
    pub(in crate::outbound) fn sampled_by(&self) -> Method {
        let slow = self.predicted(Method::Zstd) < self.predicted(Method::Lz4);
        match self.using {
            Method::Raw if self.allows(Method::Zstd) && (slow || !self.allows(Method::Lz4)) => Method::Zstd,
            Method::Raw => Method::Lz4,
            packing => packing,
        }
    }

    /// Memory was sampled.
    pub(in crate::outbound) fn sampled(&mut self, method: Method, sample: Sample) {
        let slot = &mut self.samples[method as usize];
        // The latest ten or so count.
        *slot = Some(slot.map_or(sample, |old| Sample {
            ns_per_byte: old.ns_per_byte * 0.9 + sample.ns_per_byte * 0.1,
            part: old.part * 0.9 + sample.part * 0.1,
        }));
    }

    /// A round begins: the link's window may be empty.
    pub(in crate::outbound) fn round_begins(&mut self) {
        self.settled_bytes = 0;
        if self.trying {
            self.trying = false;
            self.using = self.best();
        }
    }

    /// So much memory was sent in one way, as so many bytes on the wire, and kept a lane busy for so long.
    pub(in crate::outbound) fn sent(&mut self, method: Method, bytes: u64, wire_bytes: u64, ns: u64) {
        for pause in &mut self.pause_bytes {
            *pause = pause.saturating_sub(bytes);
        }
        if method != self.using {
            return;
        }
        self.settled_bytes = self.settled_bytes.saturating_add(wire_bytes);
        if self.settled_bytes <= SETTLE_BYTES {
            return;
        }
        self.gauges[method as usize].add(bytes as f64, ns as f64);
        let Some(measured_ns) = self.time(method) else { return };
        let (best, was_tried) = (self.best(), std::mem::take(&mut self.trying));
        let best_ns = self.time(best).unwrap_or(measured_ns);
        if was_tried || best != method {
            // Whatever lost rests, for as long as it was worse.
            for other in Method::ALL.into_iter().filter(|other| *other != best) {
                if let Some(other_ns) = self.time(other) {
                    let pause = &mut self.pause_bytes[other as usize];
                    *pause = (*pause).max(pause_bytes(other_ns / best_ns - 1.0));
                }
            }
        }
        if best != method {
            self.switch(best);
            return;
        }
        // What is in use is the best of what is known. What is worth a trial?
        let due = Method::ALL.into_iter().filter(|other| *other != method && self.allows(*other));
        let due = due.filter(|other| self.pause_bytes[*other as usize] == 0);
        let tried = due
            .filter(|other| self.predicted(*other) < measured_ns * PROMISE)
            .min_by(|left, right| self.predicted(*left).total_cmp(&self.predicted(*right)));
        if let Some(other) = tried {
            self.gauges[other as usize] = Gauge::default();
            self.trying = true;
            self.switch(other);
        }
    }

    fn switch(&mut self, method: Method) {
        self.using = method;
        self.settled_bytes = 0;
    }

    fn allows(&self, method: Method) -> bool {
        self.allowed[method as usize]
    }

    /// The shortest of what was measured; what is in use if nothing was.
    fn best(&self) -> Method {
        let known = Method::ALL.into_iter().filter(|method| self.allows(*method));
        let known = known.filter_map(|method| Some((method, self.time(method)?)));
        known.min_by(|left, right| left.1.total_cmp(&right.1)).map_or(self.using, |(method, _)| method)
    }

    fn time(&self, method: Method) -> Option<f64> {
        let fee = if method == Method::Raw { 1.0 } else { PACKING_FEE };
        self.gauges[method as usize].ns_per_byte().map(|ns| ns * fee)
    }

    /// What a byte of memory would take, in nanoseconds: what it took when it was tried, or what packing took in a sample and
    /// its part of what a byte takes now. Without either nothing is promised.
    fn predicted(&self, method: Method) -> f64 {
        if !self.allows(method) {
            return f64::INFINITY;
        }
        let from_sample = match (self.samples[method as usize], self.time(Method::Raw)) {
            (Some(sample), Some(raw_ns)) => Some((sample.ns_per_byte + sample.part * raw_ns) * PACKING_FEE),
            _ => None,
        };
        match (method, from_sample) {
            // Raw is the measure of everything else: it is tried again whenever its pause is over.
            (Method::Raw, _) => 0.0,
            (_, Some(predicted)) => predicted,
            (_, None) => f64::INFINITY,
        }
    }
}

/// Memory to be sent before a way is tried again that was worse by this part.
fn pause_bytes(worse: f64) -> u64 {
    let trial = SETTLE_BYTES as f64 + ENOUGH_BYTES;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a range of u64")]
    let bytes = (trial * worse / TRYING_PART).clamp((64u64 << 20) as f64, (1u64 << 40) as f64) as u64;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lanes that pack and send 1 MiB at a time, all alike.
    struct World {
        /// What a byte on the wire keeps a lane waiting.
        link_ns: f64,
        /// What a byte of memory costs beside: to pack, and to unpack where that is not hidden.
        cpu_ns: [f64; 3],
        part: [f64; 3],
        packable: bool,
    }

    const TEXT: World =
        World { link_ns: 1.0, cpu_ns: [0.0, 1.4, 3.3], part: [1.0, 0.37, 0.19], packable: true };

    const MIB: u64 = 1 << 20;

    impl World {
        fn time_ns(&self, method: Method) -> f64 {
            self.cpu_ns[method as usize] + self.part[method as usize] * self.link_ns
        }

        fn best_ns(&self) -> f64 {
            Method::ALL.into_iter().map(|method| self.time_ns(method)).fold(f64::INFINITY, f64::min)
        }

        /// Sends so much; answers the time a byte took, and what is in use at the end.
        fn send(&self, choice: &mut Choice, bytes: u64) -> f64 {
            choice.round_begins();
            let mut total_ns = 0.0;
            for _ in 0..bytes / MIB {
                for method in [Method::Lz4, Method::Zstd].into_iter().filter(|_| self.packable) {
                    let (ns_per_byte, part) = (self.cpu_ns[method as usize], self.part[method as usize]);
                    choice.sampled(method, Sample { ns_per_byte, part });
                }
                let method = if self.packable { choice.using(false) } else { Method::Raw };
                let ns = self.time_ns(method) * MIB as f64;
                total_ns += ns;
                choice.sent(method, MIB, (MIB as f64 * self.part[method as usize]) as u64, ns as u64);
            }
            total_ns / bytes as f64
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn it_costs_little_more_than_the_best_way(
            link_ns in prop_oneof![0.2f64..4.0, 4.0f64..200.0],
            lz4 in (0.2f64..3.0, 0.05f64..0.85),
            zstd in (0.5f64..6.0, 0.05f64..0.85),
        ) {
            let world = World { link_ns, cpu_ns: [0.0, lz4.0, zstd.0], part: [1.0, lz4.1, zstd.1], packable: true };
            let mut choice = Choice::new(|_| true);
            world.send(&mut choice, 1024 * MIB);
            let found = world.send(&mut choice, 4096 * MIB);
            // What the fee may keep it from, and what trying costs.
            prop_assert!(found <= world.best_ns() * (PACKING_FEE + 0.11), "{found} of {}", world.best_ns());
        }
    }

    #[test]
    fn memory_that_cannot_be_packed_is_never_tried() {
        let mut choice = Choice::new(|_| true);
        for link_ns in [0.5, 5.0, 500.0] {
            let world = World { link_ns, packable: false, ..TEXT };
            assert!((world.send(&mut choice, 512 * MIB) / link_ns - 1.0).abs() < 1e-6);
            assert_eq!(choice.using(false), Method::Raw);
        }
    }

    #[test]
    fn a_link_that_becomes_slow_and_fast_again_is_followed() {
        let mut choice = Choice::new(|_| true);
        TEXT.send(&mut choice, 512 * MIB);
        assert_eq!(choice.using(false), Method::Raw);
        let slow = World { link_ns: 80.0, ..TEXT };
        slow.send(&mut choice, 512 * MIB);
        assert_eq!((choice.using(false), choice.using(true)), (Method::Zstd, Method::Zstd));
        TEXT.send(&mut choice, 4096 * MIB);
        assert_eq!((choice.using(false), choice.using(true)), (Method::Raw, Method::Raw));
    }

    #[test]
    fn a_peer_that_cannot_unpack_gets_raw_pages_and_a_test_can_force_a_way() {
        let slow = World { link_ns: 80.0, ..TEXT };
        for method in Method::ALL {
            let mut choice = Choice::new(|allowed| allowed == method);
            assert_eq!(choice.using(false), method);
            slow.send(&mut choice, 256 * MIB);
            assert_eq!((choice.using(false), choice.using(true)), (method, method));
        }
    }
}
