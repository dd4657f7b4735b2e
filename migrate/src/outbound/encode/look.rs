//! Whether looking for pages that are known, or for what changed in them, pays: by what it took and what it saved.

/// Looks that count; an older one counts less.
const MEMORY: f64 = 1.0 / 256.0;

/// One page in so many is looked at in any case, so that it is noticed when looking begins to pay.
pub(super) const ANYWAY: u64 = 16;

/// What one kind of look takes and saves.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Look {
    ns_per_byte: f64,
    saved_part: f64,
}

impl Look {
    /// A look at some memory took so long for each byte, and saved this part of it.
    pub(super) fn took(&mut self, ns_per_byte: f64, saved_part: f64) {
        self.ns_per_byte += (ns_per_byte - self.ns_per_byte) * MEMORY;
        self.saved_part += (saved_part - self.saved_part) * MEMORY;
    }

    /// Whether to look, if sending a byte takes so long. Without a measurement of either it is not known to pay.
    pub(super) fn pays(&self, send_ns_per_byte: Option<f64>) -> bool {
        send_ns_per_byte.is_some_and(|send_ns| self.saved_part * send_ns > self.ns_per_byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_pays_where_it_saves_more_than_it_takes() {
        let mut look = Look::default();
        assert!(!look.pays(Some(100.0)) && !look.pays(None));
        for _ in 0..2000 {
            look.took(0.5, 0.1);
        }
        // A tenth of the bytes for half a nanosecond: worth it from 5 ns a byte on.
        assert!(look.pays(Some(5.5)) && !look.pays(Some(4.5)) && !look.pays(None));
        for _ in 0..2000 {
            look.took(0.5, 0.0);
        }
        assert!(!look.pays(Some(100.0)));
    }
}
