//! An object that is being written: short ones as a whole, long ones in parts.
//!
//! Parts that were sent for an object that is never completed cost money and are in no list of objects. So which upload is under way
//! is noted in the bucket before its first part, and the note goes when the upload has ended.

use super::super::holder::random;
use super::super::{ObjectWriter, fault, name};
use super::Bucket;
use crate::error::{Error, Result};
use object_store::multipart::{MultipartStore as _, PartId};
use object_store::{ObjectStoreExt as _, PutPayload};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tokio::task::JoinSet;

/// Bytes of a part. A service takes parts from 5 MiB on, and at most 10,000 of them: 156 GiB.
const PART_BYTES: usize = 16 << 20;
const MAX_PARTS: usize = 10_000;

/// Parts that are under way at once: one connection to S3 makes some 100 MB/s at most. They bound the memory, too.
const PARTS_AT_ONCE: usize = 4;

/// What is noted of an upload.
#[derive(Serialize, Deserialize)]
struct Note {
    object: String,
    upload: String,
}

pub(super) struct Writer {
    bucket: Arc<Bucket>,
    name: String,
    buffer: Vec<u8>,
    bytes: u64,
    upload: Option<Upload>,
}

struct Upload {
    id: String,
    note: String,
    started: usize,
    parts: Vec<(usize, PartId)>,
    under_way: JoinSet<object_store::Result<(usize, PartId)>>,
}

impl Writer {
    pub(super) fn new(bucket: &Arc<Bucket>, name: &str) -> Self {
        Self { bucket: Arc::clone(bucket), name: name.to_owned(), buffer: Vec::new(), bytes: 0, upload: None }
    }

    fn failed(&self, error: &object_store::Error) -> Error {
        self.bucket.failed(&format!("write the object {}", self.name), error)
    }

    /// Begins an upload in parts, and notes it.
    async fn begin(bucket: &Bucket, name: &str) -> object_store::Result<Upload> {
        let id = bucket.client.create_multipart(&bucket.path(name)).await?;
        let note = format!("{}/{:016x}", name::TEMPORARY, random());
        let noted = Note { object: name.to_owned(), upload: id.clone() };
        // Two strings can always be written.
        let json = serde_json::to_vec(&noted).unwrap_or_default();
        bucket.client.put(&bucket.path(&note), PutPayload::from(json)).await?;
        Ok(Upload { id, note, started: 0, parts: Vec::new(), under_way: JoinSet::new() })
    }

    /// Sends what was gathered as the next part, once there is room for one.
    fn send_part(&mut self) -> Result<()> {
        let bucket = Arc::clone(&self.bucket);
        let part = std::mem::take(&mut self.buffer);
        let sent = bucket.wait(async {
            let upload = match &mut self.upload {
                Some(upload) => upload,
                none => none.insert(Self::begin(&bucket, &self.name).await?),
            };
            while upload.under_way.len() >= PARTS_AT_ONCE {
                upload.settle_one().await?;
            }
            let number = upload.started;
            upload.started += 1;
            let (bucket, path, id) = (Arc::clone(&bucket), bucket.path(&self.name), upload.id.clone());
            upload.under_way.spawn(async move {
                let sent = bucket.client.put_part(&path, &id, number, PutPayload::from(part)).await?;
                Ok((number, sent))
            });
            Ok(())
        });
        sent.map_err(|error| self.failed(&error))?;
        if self.upload.as_ref().is_some_and(|upload| upload.started > MAX_PARTS) {
            return Err(Error::Store(format!(
                "the object {} is larger than the {} GiB that {} can hold",
                self.name,
                (PART_BYTES * MAX_PARTS) >> 30,
                self.bucket.place
            )));
        }
        Ok(())
    }

    /// Waits for all parts and has them put together.
    fn complete(&mut self, mut upload: Upload) -> Result<()> {
        let (bucket, path) = (Arc::clone(&self.bucket), self.bucket.path(&self.name));
        let completed = bucket.wait(async {
            while !upload.under_way.is_empty() {
                upload.settle_one().await?;
            }
            upload.parts.sort_unstable_by_key(|(number, _)| *number);
            let parts = std::mem::take(&mut upload.parts).into_iter().map(|(_, part)| part).collect();
            if bucket.client.head(&path).await.is_ok() {
                return Ok(false);
            }
            match bucket.client.complete_multipart(&path, &upload.id, parts).await {
                Ok(_) => Ok(true),
                // The answer to a request that succeeded may be lost and the request made again, which finds no upload then.
                Err(error) => match bucket.client.head(&path).await {
                    Ok(meta) if meta.size == self.bytes => Ok(true),
                    _ => Err(error),
                },
            }
        });
        if matches!(completed, Ok(true)) {
            // A note that stays is a leftover: whoever removes it finds no upload.
            let _ = bucket.wait(bucket.delete(&upload.note));
        } else {
            // Dropping this ends the upload.
            self.upload = Some(upload);
        }
        match completed {
            Ok(true) => Ok(()),
            Ok(false) => Err(fault::taken(&bucket.place, &self.name)),
            Err(error) => Err(self.failed(&error)),
        }
    }
}

impl Upload {
    /// Waits until one more part has arrived.
    async fn settle_one(&mut self) -> object_store::Result<()> {
        match self.under_way.join_next().await {
            Some(Ok(part)) => self.parts.push(part?),
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
        Ok(())
    }
}

impl ObjectWriter for Writer {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        loop {
            let (now, later) = rest.split_at(rest.len().min(PART_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            self.bytes += now.len() as u64;
            if later.is_empty() {
                return Ok(());
            }
            // Only when more follows: a part is never empty, and what fits one part is no upload in parts.
            self.send_part()?;
            rest = later;
        }
    }

    fn finish(mut self: Box<Self>) -> Result<u64> {
        if self.upload.is_none() {
            let buffer = std::mem::take(&mut self.buffer);
            self.bucket.wait(self.bucket.put_new(&self.name, buffer))?;
            return Ok(self.bytes);
        }
        self.send_part()?;
        if let Some(upload) = self.upload.take() {
            self.complete(upload)?;
        }
        Ok(self.bytes)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else { return };
        let bucket = &self.bucket;
        // What cannot be ended now is a leftover.
        let _ = bucket.wait(async {
            upload.under_way.shutdown().await;
            abandon(bucket, &upload.note).await
        });
    }
}

/// Ends an upload that is never to be completed, and removes the note of it.
pub(super) async fn abandon(bucket: &Bucket, note: &str) -> object_store::Result<()> {
    match bucket.read(note).await {
        Ok(json) => {
            if let Ok(note) = serde_json::from_slice::<Note>(&json)
                && name::check(&note.object).is_ok()
            {
                match bucket.client.abort_multipart(&bucket.path(&note.object), &note.upload).await {
                    // It was completed, or ended already.
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Err(object_store::Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    }
    bucket.delete(note).await
}
