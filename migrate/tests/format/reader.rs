//! A second reader of checkpoint stores, written from docs/checkpoint-format.md alone: small, slow, and sharing no code with the first one.
//!
//! It reads a store that is a directory, sealed or not, and trusts nothing in it.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde_json::Value;
use std::path::{Path, PathBuf};
use twox_hash::XxHash3_64;

pub(crate) type Result<T> = std::result::Result<T, String>;

const PAGE: usize = 4096;

/// What a checkpoint holds.
pub(crate) struct Checkpoint {
    /// The spaces, in their order.
    pub(crate) spaces: Vec<Vec<u8>>,
    pub(crate) machine: Vec<u8>,
    pub(crate) state: Vec<u8>,
}

/// A store and its key.
pub(crate) struct Reader {
    root: PathBuf,
    key: Option<[u8; 32]>,
}

/// The salt and the key of an object.
fn object_key(key: &[u8; 32], salt: &[u8], name: &str) -> Result<LessSafeKey> {
    let mut hasher = blake3::Hasher::new_derive_key("migrate checkpoint store, format 1, key of an object");
    hasher.update(key).update(salt).update(name.as_bytes());
    let key = UnboundKey::new(&AES_256_GCM, hasher.finalize().as_bytes());
    Ok(LessSafeKey::new(key.map_err(|_| "no cipher")?))
}

fn open_piece(key: &LessSafeKey, name: &str, position: u64, piece: &[u8]) -> Result<Vec<u8>> {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&position.to_le_bytes());
    let data = [name.as_bytes(), &position.to_le_bytes()].concat();
    let mut bytes = piece.to_vec();
    let opened = key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(data), &mut bytes);
    Ok(opened.map_err(|_| format!("{name}: the piece at {position} does not open"))?.to_vec())
}

fn number(bytes: &[u8], at: usize, length: usize) -> Result<u64> {
    let field = bytes.get(at..at + length).ok_or("a field is cut off")?;
    Ok(field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check(holds: bool, why: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(why.to_owned()) }
}

impl Reader {
    pub(crate) fn open(root: &Path, key: Option<[u8; 32]>) -> Result<Self> {
        let mut reader = Self { root: root.to_owned(), key: None };
        let (info, _) = reader.json("store.json", 1)?;
        check(info["id"].as_str().is_some_and(|id| id.len() == 32), "the store has no id")?;
        if let Some(seal) = info.get("seal") {
            let key = key.ok_or("the store is sealed")?;
            check(seal["cipher"] == "aes-256-gcm", "the cipher is not known")?;
            let mut hasher = blake3::Hasher::new_derive_key("migrate checkpoint store, format 1, key check");
            let found = hex(hasher.update(&key).finalize().as_bytes());
            check(seal["key_check"] == found.as_str(), "the key is another store's")?;
            reader.key = Some(key);
        }
        Ok(reader)
    }

    fn file(&self, name: &str) -> Result<Vec<u8>> {
        std::fs::read(self.root.join(name)).map_err(|error| format!("{name}: {error}"))
    }

    /// The body of an object with an envelope, its digest and its length.
    fn object(&self, name: &str, kind: u64) -> Result<(Vec<u8>, String, u64)> {
        let bytes = self.file(name)?;
        check(bytes.starts_with(b"MIGCHKPT"), "the mark")?;
        check(number(&bytes, 8, 2)? == 1, "the version")?;
        let body = bytes.get(56..).ok_or("the header")?;
        check(number(&bytes, 16, 8)? == body.len() as u64, "the length")?;
        let digest = blake3::hash(&[&bytes[..24], body].concat());
        check(digest.as_bytes() == &bytes[24..56], "the digest")?;
        check(number(&bytes, 12, 4)? == 0 && number(&bytes, 10, 1)? == kind, "the kind")?;
        let sealed = match (number(&bytes, 11, 1)?, &self.key) {
            (0, None) => None,
            (1, Some(key)) => Some(key),
            (0, Some(_)) if kind == 1 => None,
            _ => return Err(format!("{name}: flags")),
        };
        let body = match sealed {
            None => body.to_vec(),
            Some(key) => {
                let (salt, piece) = body.split_at_checked(16).ok_or("the salt")?;
                open_piece(&object_key(key, salt, name)?, name, 0, piece)?
            }
        };
        Ok((body, hex(digest.as_bytes()), bytes.len() as u64))
    }

    fn json(&self, name: &str, kind: u64) -> Result<(Value, String)> {
        let (body, digest, _) = self.object(name, kind)?;
        check(body.len() <= 16 << 20, "the length of the JSON")?;
        Ok((serde_json::from_slice(&body).map_err(|error| format!("{name}: {error}"))?, digest))
    }

    fn part(&self, name: &str, kind: u64, part: &Value) -> Result<Vec<u8>> {
        let (body, digest, bytes) = self.object(name, kind)?;
        check(part["bytes"] == bytes && part["digest"] == digest.as_str(), "another object than was meant")?;
        Ok(body)
    }

    /// Restores a checkpoint.
    pub(crate) fn restore(&self, id: &str) -> Result<Checkpoint> {
        let (newest, digest) = self.json(&format!("checkpoints/{id}"), 2)?;
        if let Some(group) = newest["group"].as_str() {
            let (group, _) = self.json(&format!("groups/{group}"), 5)?;
            let members = group["members"].as_array().ok_or("members")?;
            let listed =
                members.iter().any(|member| member["id"] == id && member["digest"] == digest.as_str());
            check(listed, "the group does not list it")?;
        }
        let pages: Vec<u64> = newest["layout"]["spaces"]
            .as_array()
            .ok_or("spaces")?
            .iter()
            .map(|space| space["pages"].as_u64().ok_or("pages"))
            .collect::<std::result::Result<_, _>>()?;
        let mut spaces: Vec<_> = pages.iter().map(|pages| vec![0; *pages as usize * PAGE]).collect();
        let mut seen: Vec<_> = pages.iter().map(|pages| vec![false; *pages as usize]).collect();
        let state = self.part(&format!("data/{id}/state"), 4, &newest["state"])?;
        let split = 4 + number(&state, 0, 4)? as usize;
        let (machine, state) = state.split_at_checked(split).ok_or("the machine description")?;
        let mut link = newest.clone();
        loop {
            check(link["layout"] == newest["layout"], "the layout")?;
            self.link(&link, &mut spaces, &mut seen)?;
            let Some(parent) = link.get("parent") else { break };
            let name = parent["id"].as_str().ok_or("the parent")?;
            let (older, digest) = self.json(&format!("checkpoints/{name}"), 2)?;
            check(parent["digest"] == digest.as_str(), "another parent than was meant")?;
            check(
                older["deltas"].as_u64().map(|deltas| deltas + 1) == link["deltas"].as_u64(),
                "the deltas",
            )?;
            link = older;
        }
        check(link["deltas"] == 0, "the chain does not end")?;
        Ok(Checkpoint { spaces, machine: machine[4..].to_vec(), state: state.to_vec() })
    }

    /// Fills in the pages that no newer link has.
    fn link(&self, manifest: &Value, spaces: &mut [Vec<u8>], seen: &mut [Vec<bool>]) -> Result<()> {
        let id = manifest["id"].as_str().ok_or("the id")?;
        let index = self.part(&format!("data/{id}/index"), 3, &manifest["index"])?;
        let (extents, runs) = (number(&index, 0, 4)? as usize, number(&index, 4, 4)? as usize);
        let (runs_at, mut sum_at) = (8 + extents * 56, 8 + extents * 56 + runs * 24);
        let mut data = Vec::new();
        for row in index.get(8..runs_at).ok_or("the extents")?.chunks(56) {
            let pages = self.extent(manifest, row)?;
            for page in pages.chunks(PAGE) {
                check(number(&index, sum_at, 8)? == XxHash3_64::oneshot(page), "the sum of a page")?;
                sum_at += 8;
            }
            data.push(pages);
        }
        check(sum_at == index.len(), "the length of the index")?;
        for row in index[runs_at..runs_at + runs * 24].chunks(24) {
            let (first, count) = (number(row, 0, 8)? as usize, number(row, 8, 4)? as usize);
            let (extent, space) = (number(row, 12, 4)?, number(row, 16, 2)? as usize);
            let from = number(row, 18, 2)? as usize;
            check(number(row, 20, 4)? == 0, "a zero")?;
            for page in 0..count {
                let seen =
                    seen.get_mut(space).and_then(|seen| seen.get_mut(first + page)).ok_or("the layout")?;
                if std::mem::replace(seen, true) || extent == 0xffff_ffff {
                    continue;
                }
                let data: &Vec<u8> = data.get(extent as usize).ok_or("the extent of a run")?;
                let source =
                    data.get((from + page) * PAGE..(from + page + 1) * PAGE).ok_or("the pages of a run")?;
                spaces[space][(first + page) * PAGE..(first + page + 1) * PAGE].copy_from_slice(source);
            }
        }
        Ok(())
    }

    /// The pages of an extent.
    fn extent(&self, manifest: &Value, row: &[u8]) -> Result<Vec<u8>> {
        let segment = &manifest["segments"][number(row, 0, 4)? as usize];
        let checkpoint = segment["checkpoint"].as_str().ok_or("the segment of an extent")?;
        let name = format!("data/{checkpoint}/segment-{:05}", segment["number"].as_u64().ok_or("number")?);
        let bytes = self.file(&name)?;
        check(segment["bytes"] == bytes.len() as u64, "the length of a segment")?;
        check(bytes.starts_with(b"MIGPAGES\x01\0"), "the mark of a segment")?;
        check(number(&bytes, 11, 5)? == 0, "a zero")?;
        let (length, offset) = (number(row, 4, 4)? as usize, number(row, 8, 8)? as usize);
        let (pages, packed) = (number(row, 16, 2)? as usize, number(row, 18, 1)?);
        let stored = bytes.get(offset..offset + length).ok_or("an extent leaves its segment")?;
        check(blake3::hash(stored).as_bytes() == &row[24..56], "the digest of an extent")?;
        let piece_bytes = if packed == 1 { length } else { PAGE + if self.key.is_some() { 16 } else { 0 } };
        let plain = match (bytes[10], &self.key) {
            (0, None) => stored.to_vec(),
            (1, Some(key)) => {
                let key = object_key(key, &bytes[16..32], &name)?;
                let mut plain = Vec::new();
                for (number, piece) in stored.chunks(piece_bytes).enumerate() {
                    plain.extend(open_piece(&key, &name, (offset + number * piece_bytes) as u64, piece)?);
                }
                plain
            }
            _ => return Err("the flags of a segment".into()),
        };
        let plain = match packed {
            0 => plain,
            1 => zstd::bulk::decompress(&plain, pages * PAGE).map_err(|error| error.to_string())?,
            _ => return Err("the encoding of an extent".into()),
        };
        check(plain.len() == pages * PAGE && (1..=256).contains(&pages), "the pages of an extent")?;
        Ok(plain)
    }
}
