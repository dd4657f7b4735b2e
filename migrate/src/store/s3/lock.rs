//! One writer: numbered records, of which the highest counts.
//!
//! A record is made by a request that fails if there is one of its number, so that only one of several who try gets it. Its holder writes it again
//! and again; one that is older than [`LockTimes::stale`] belongs to somebody who is gone, and the next number may be taken. Letting go is
//! writing that, not removing the record: numbers never begin again, so a holder that was cut off, and was taken for
//! dead, finds a higher one whenever it looks, and [`Lease::check`] looks.
//!
//! Ages are told by the service's clock alone: whoever finds a record writes a little object and compares the two.

use super::super::holder::{Holder, random};
use super::super::{Attempt, Lease, fault};
use super::Bucket;
use crate::error::{Error, Result};
use object_store::{ObjectStore as _, ObjectStoreExt as _, PutMode, PutPayload};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Where the records lie.
const RECORDS: &str = "lock/";

/// How long letting go may take before the record is left to age.
const RELEASE_LIMIT: Duration = Duration::from_secs(20);

/// When a lock is renewed, and when it is taken for left.
#[derive(Debug, Clone, Copy)]
pub struct LockTimes {
    /// How often its holder says that it is there.
    pub renew: Duration,
    /// After how long without that anybody may take it.
    pub stale: Duration,
}

impl Default for LockTimes {
    fn default() -> Self {
        Self { renew: Duration::from_secs(20), stale: Duration::from_secs(120) }
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    holder: Holder,
    released: bool,
}

impl Record {
    fn payload(&self) -> PutPayload {
        // Strings and numbers can always be written.
        PutPayload::from(serde_json::to_vec(self).unwrap_or_default())
    }
}

fn name_of(number: u64) -> String {
    format!("{RECORDS}{number:016}")
}

/// The highest record: its number and when it was written.
async fn newest(bucket: &Bucket) -> object_store::Result<Option<(u64, SystemTime)>> {
    let listed = bucket.list(RECORDS).await?;
    let numbered = listed.into_iter().filter_map(|(name, meta)| {
        Some((name.strip_prefix(RECORDS)?.parse().ok()?, meta.last_modified.into()))
    });
    Ok(numbered.max_by_key(|(number, _)| *number))
}

/// What the service's clock says.
async fn now(bucket: &Bucket) -> object_store::Result<SystemTime> {
    let probe = format!("{RECORDS}clock-{:016x}", random());
    let path = bucket.path(&probe);
    bucket.client.put(&path, PutPayload::from_static(b"what time is it")).await?;
    let now = bucket.client.head(&path).await.map(|meta| meta.last_modified.into());
    bucket.delete(&probe).await?;
    now
}

/// Tries to become the one writer.
pub(super) fn attempt(bucket: &Arc<Bucket>, owner: &str, times: LockTimes) -> Result<Attempt> {
    let since = Instant::now();
    let record = Record { holder: Holder::here(owner), released: false };
    let taken = bucket.wait(take(bucket, &record, times));
    let taken = taken.map_err(|error| bucket.failed("be locked", &error))?;
    let number = match taken {
        Taken::Ours(number) => number,
        Taken::Held(holder) => return Ok(Attempt::Refused(holder)),
        Taken::Unkept => {
            return Err(Error::Store(format!(
                "the service of {} ignores If-None-Match: two writers cannot be kept apart there; use another one",
                bucket.place
            )));
        }
    };
    let books = Arc::new(Books { renewed: Mutex::new(Some(since)), stop: Notify::new() });
    let keeper = {
        let (bucket, books) = (Arc::clone(bucket), Arc::clone(&books));
        let payload = record.payload();
        bucket
            .runtime
            .handle()
            .clone()
            .spawn(async move { keep(&bucket, number, payload, times, &books).await })
    };
    let bucket = Arc::clone(bucket);
    Ok(Attempt::Held(Box::new(Held { bucket, number, record, times, since, books, keeper: Some(keeper) })))
}

enum Taken {
    Ours(u64),
    Held(Holder),
    /// The service let two have the same.
    Unkept,
}

async fn take(bucket: &Bucket, record: &Record, times: LockTimes) -> object_store::Result<Taken> {
    let found = newest(bucket).await?;
    if let Some((number, written)) = found {
        let there: Option<Record> = read(bucket, number).await?;
        if !there.as_ref().is_some_and(|there| there.released) {
            let age = now(bucket).await?.duration_since(written).unwrap_or_default();
            if age < times.stale {
                return Ok(Taken::Held(there.map_or_else(Holder::unknown, |there| there.holder)));
            }
        }
    }
    let number = found.map_or(0, |(number, _)| number) + 1;
    let path = bucket.path(&name_of(number));
    let create = || bucket.client.put_opts(&path, record.payload(), PutMode::Create.into());
    if let Err(error) = create().await {
        if !matches!(error, object_store::Error::AlreadyExists { .. }) {
            return Err(error);
        }
        // Somebody was faster, or the answer to our own request was lost and the request made again.
        match read(bucket, number).await? {
            Some(there) if there.holder.token == record.holder.token => {}
            there => return Ok(Taken::Held(there.map_or_else(Holder::unknown, |there| there.holder))),
        }
    }
    match create().await {
        Err(object_store::Error::AlreadyExists { .. }) => {}
        Err(error) => return Err(error),
        Ok(_) => return Ok(Taken::Unkept),
    }
    // Those before count no more. What stays of them does no harm.
    for (name, _) in bucket.list(RECORDS).await.unwrap_or_default() {
        if name.strip_prefix(RECORDS).and_then(|own| own.parse::<u64>().ok()).is_some_and(|own| own < number)
        {
            let _ = bucket.delete(&name).await;
        }
    }
    Ok(Taken::Ours(number))
}

async fn read(bucket: &Bucket, number: u64) -> object_store::Result<Option<Record>> {
    match bucket.read(&name_of(number)).await {
        Ok(json) => Ok(serde_json::from_slice(&json).ok()),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a lease and the task that renews it both know.
struct Books {
    /// When the last renewal that succeeded was begun; `None` once somebody else has it.
    renewed: Mutex<Option<Instant>>,
    stop: Notify,
}

impl Books {
    fn renewed(&self) -> Option<Instant> {
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, renewed: Option<Instant>) {
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = renewed;
    }
}

/// Renews a record until told to stop, or somebody else has taken the lock.
async fn keep(bucket: &Bucket, number: u64, payload: PutPayload, times: LockTimes, books: &Books) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(times.renew) => {}
            () = books.stop.notified() => return,
        }
        let begun = Instant::now();
        match newest(bucket).await {
            Ok(Some((highest, _))) if highest > number => return books.set(None),
            Ok(_) => {}
            // It is tried again; a lease that was not renewed for too long says so itself.
            Err(_) => continue,
        }
        if bucket.client.put(&bucket.path(&name_of(number)), payload.clone()).await.is_ok() {
            books.set(Some(begun));
        }
    }
}

struct Held {
    bucket: Arc<Bucket>,
    number: u64,
    record: Record,
    times: LockTimes,
    since: Instant,
    books: Arc<Books>,
    keeper: Option<JoinHandle<()>>,
}

impl Held {
    fn lost(&self, why: &str) -> Error {
        let place = &self.bucket.place;
        Error::Store(format!("the lock of the store {place} was lost: {why}; nothing more is written"))
    }
}

impl Lease for Held {
    fn check(&self) -> Result<()> {
        let renewed = self.books.renewed();
        // A third of the time is for what is written on the strength of this answer.
        let fresh = renewed.is_some_and(|renewed| renewed.elapsed() < self.times.stale / 3 * 2);
        if renewed.is_some() && !fresh {
            return Err(self.lost("it could not be renewed in time"));
        }
        let found = self.bucket.wait(newest(&self.bucket));
        match found.map_err(|error| self.bucket.failed("tell whether it is still locked", &error))? {
            Some((highest, _)) if highest == self.number && fresh => Ok(()),
            Some((highest, _)) => {
                let record = self.bucket.wait(read(&self.bucket, highest)).ok().flatten();
                let holder = record.map_or_else(Holder::unknown, |record| record.holder);
                Err(self.lost(&format!("it is held by {holder}")))
            }
            None => Err(self.lost("somebody removed it")),
        }
    }

    fn held_for(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.books.stop.notify_one();
        self.record.released = true;
        let (path, payload) = (self.bucket.path(&name_of(self.number)), self.record.payload());
        let (keeper, client) = (self.keeper.take(), &self.bucket.client);
        // Only behind the last renewal, or that would take it again. If it does not succeed, the record ages.
        let release = async {
            if let Some(keeper) = keeper {
                keeper.await.ok();
            }
            client.put(&path, payload).await
        };
        let limited = async { tokio::time::timeout(RELEASE_LIMIT, release).await };
        if !matches!(self.bucket.wait(limited), Ok(Ok(_))) {
            tracing::warn!("{}", fault::unreleased(&self.bucket.place, self.times.stale));
        }
    }
}
