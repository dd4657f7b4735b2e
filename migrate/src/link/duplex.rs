//! A link in memory, for tests.
