//! Bytes on their way on one stream.

use bytes::Bytes;
use std::collections::VecDeque;
use std::time::Instant;

#[derive(Default)]
pub(super) struct Queue {
    pieces: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    /// The writer ended it cleanly.
    pub(super) finished: bool,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Bytes that were written and not read.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// A piece that arrives at `at`, or right behind the piece before it.
    pub(super) fn push(&mut self, at: Instant, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        let at = self.pieces.back().map_or(at, |(before, _)| at.max(*before));
        self.bytes += bytes.len();
        self.pieces.push_back((at, bytes));
    }

    /// The next bytes that have arrived, at most `most`.
    pub(super) fn pop(&mut self, now: Instant, most: usize) -> Option<Bytes> {
        let (_, piece) = self.pieces.front_mut().filter(|(at, _)| *at <= now)?;
        let bytes = piece.split_to(piece.len().min(most));
        if piece.is_empty() {
            self.pieces.pop_front();
        }
        self.bytes -= bytes.len();
        Some(bytes)
    }

    /// When the next bytes arrive.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.pieces.front().map(|(at, _)| *at)
    }

    /// Drops what has not arrived.
    pub(super) fn lose_in_flight(&mut self, now: Instant) {
        let arrived = self.pieces.partition_point(|(at, _)| *at <= now);
        if arrived < self.pieces.len() {
            self.finished = false;
        }
        self.pieces.truncate(arrived);
        self.bytes = self.pieces.iter().map(|(_, bytes)| bytes.len()).sum();
    }
}
