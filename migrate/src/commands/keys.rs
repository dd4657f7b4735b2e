//! `migrate keys`.
