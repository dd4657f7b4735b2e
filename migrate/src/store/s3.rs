//! A store in a bucket of an S3-compatible service.
//!
//! ```text
//! PREFIX/NAME            an object
//! PREFIX/tmp/RANDOM      which upload in parts is under way, or was when something crashed
//! PREFIX/lock/NUMBER     who writes: the highest number counts
//! ```
//!
//! Short objects are written by one conditional request (`If-None-Match: *`), so that one of two that are written at once is refused; long ones
//! in parts, which the service puts together at once when they are complete. There the name is looked for just before: objects of that
//! size have names that only their writer knows.
//!
//! What the service has answered for is taken to be durable, and to be seen by whoever asks next, as S3 promises since December 2020.
//! A service that ignores `If-None-Match` is found out when the store is locked.

mod lock;
mod writer;

pub use lock::LockTimes;

use super::{Attempt, ObjectInfo, ObjectReader, ObjectWriter, Store, fault, name, ranges};
use crate::error::{Error, Result};
use futures_util::TryStreamExt as _;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path;
use object_store::{
    ClientConfigKey, ObjectMeta, ObjectStore as _, ObjectStoreExt as _, PutMode, PutPayload, RetryConfig,
};
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// How places in buckets begin.
pub(super) const SCHEME: &str = "s3://";

/// How often a request is made again, and for how long in all, when the service does not answer or says that it is busy: longer than a
/// restart of a server, shorter than the patience of who waits for a checkpoint.
const RETRIES: RetryConfig = RetryConfig {
    backoff: object_store::BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(10),
        base: 2.0,
    },
    max_retries: 8,
    retry_timeout: Duration::from_secs(60),
};

/// How long one request may take: 16 MiB at 1 Mbit/s.
const REQUEST_LIMIT: &str = "150 seconds";

/// Threads for the requests: they mostly wait, and encrypt.
const THREADS: usize = 2;

/// See the module. Used from threads that are no tasks of an async runtime: it has one of its own, and waits for it.
pub struct S3Store {
    bucket: Arc<Bucket>,
    times: LockTimes,
}

/// A part of a bucket, and what makes the requests.
struct Bucket {
    client: AmazonS3,
    runtime: Runtime,
    place: String,
    prefix: Path,
}

impl S3Store {
    /// The one at `s3://BUCKET/PREFIX`, with credentials, region and endpoint from the environment, as `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION` and `AWS_ENDPOINT_URL`, or from the instance it runs on.
    ///
    /// # Errors
    /// `Usage` when that is no such place, or the environment names something impossible; `Host`.
    pub fn from_env(place: &str) -> Result<Self> {
        let endpoint = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT"].iter().find_map(|name| std::env::var(name).ok());
        if endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"))
            && std::env::var_os("AWS_ALLOW_HTTP").is_none()
        {
            return Err(Error::Usage(format!(
                "{place} would be reached by http://, where everybody on the way can read it: use https://, or set \
                 AWS_ALLOW_HTTP=true if that is meant"
            )));
        }
        Self::new(place, AmazonS3Builder::from_env())
    }

    /// The same, with all but the bucket from `builder`.
    ///
    /// # Errors
    /// As `from_env`.
    pub fn new(place: &str, builder: AmazonS3Builder) -> Result<Self> {
        let wrong = |why: &str| {
            Error::Usage(format!("{place:?} is no store ({why}): it is named like s3://bucket/prefix"))
        };
        let rest = place.strip_prefix(SCHEME).ok_or_else(|| wrong("it does not begin with s3://"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(wrong("it names no bucket"));
        }
        let prefix = Path::parse(prefix).map_err(|error| wrong(&error.to_string()))?;
        let limit = AmazonS3ConfigKey::Client(ClientConfigKey::Timeout);
        let builder = builder.with_bucket_name(bucket).with_retry(RETRIES).with_config(limit, REQUEST_LIMIT);
        let client = builder.build().map_err(|error| wrong(&crate::error::clean(&error.to_string())))?;
        let runtime =
            Builder::new_multi_thread().worker_threads(THREADS).thread_name("s3").enable_all().build();
        let runtime = runtime
            .map_err(|error| Error::Host(format!("no threads for {place} can be started: {error}")))?;
        let bucket = Bucket { client, runtime, place: place.trim_end_matches('/').to_owned(), prefix };
        Ok(Self { bucket: Arc::new(bucket), times: LockTimes::default() })
    }

    /// The same, with other times for its lock: all who use one store must have the same.
    #[must_use]
    pub fn with_lock_times(self, times: LockTimes) -> Self {
        Self { times, ..self }
    }
}

impl Bucket {
    fn wait<T>(&self, request: impl Future<Output = T>) -> T {
        self.runtime.block_on(request)
    }

    /// Where an object lies whose name was checked.
    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    fn failed(&self, doing: &str, error: &object_store::Error) -> Error {
        fault::of_s3(&self.place, doing, error)
    }

    /// Everything whose name begins so, also what is no object.
    async fn list(&self, prefix: &str) -> object_store::Result<Vec<(String, ObjectMeta)>> {
        let (directory, _) = prefix.rsplit_once('/').unwrap_or_default();
        let above = if directory.is_empty() { self.prefix.clone() } else { self.path(directory) };
        let listed: Vec<ObjectMeta> = self.client.list(Some(&above)).try_collect().await?;
        let named = listed.into_iter().filter_map(|meta| {
            let parts: Vec<_> = meta.location.prefix_match(&self.prefix)?.collect();
            let name = parts.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join("/");
            name.starts_with(prefix).then_some((name, meta))
        });
        let mut named: Vec<_> = named.collect();
        named.sort_unstable_by(|one, other| one.0.cmp(&other.0));
        Ok(named)
    }

    /// Writes an object whole where there is none. The answer to a request that succeeded may be lost and the request made again: what is
    /// there then is what was written.
    async fn put_new(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let (path, payload) = (self.path(name), PutPayload::from(bytes));
        match self.client.put_opts(&path, payload.clone(), PutMode::Create.into()).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { .. }) => {
                let there = self.read(name).await.ok();
                let same = there.is_some_and(|there| there.iter().eq(payload.iter().flatten()));
                if same { Ok(()) } else { Err(fault::taken(&self.place, name)) }
            }
            Err(error) => Err(self.failed(&format!("write the object {name}"), &error)),
        }
    }

    /// All of a short object.
    async fn read(&self, name: &str) -> object_store::Result<Vec<u8>> {
        Ok(self.client.get(&self.path(name)).await?.bytes().await?.into())
    }

    async fn delete(&self, name: &str) -> object_store::Result<()> {
        match self.client.delete(&self.path(name)).await {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            deleted => deleted,
        }
    }
}

impl Store for S3Store {
    fn place(&self) -> String {
        self.bucket.place.clone()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        name::check(name)?;
        if self.contains(name)? {
            return Err(fault::taken(&self.bucket.place, name));
        }
        Ok(Box::new(writer::Writer::new(&self.bucket, name)))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        name::check(name)?;
        // The request itself is refused if there is one; only what is written in parts must be looked for.
        let mut writer = Box::new(writer::Writer::new(&self.bucket, name));
        writer.append(bytes)?;
        writer.finish().map(|_| ())
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        name::check(name)?;
        let path = self.bucket.path(name);
        match self.bucket.wait(self.bucket.client.head(&path)) {
            Ok(meta) => {
                let bucket = Arc::clone(&self.bucket);
                Ok(Box::new(Reader { bucket, name: name.to_owned(), path, bytes: meta.size }))
            }
            Err(object_store::Error::NotFound { .. }) => Err(fault::missing(&self.bucket.place, name)),
            Err(error) => Err(self.bucket.failed(&format!("open the object {name}"), &error)),
        }
    }

    fn contains(&self, name: &str) -> Result<bool> {
        name::check(name)?;
        match self.bucket.wait(self.bucket.client.head(&self.bucket.path(name))) {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.bucket.failed(&format!("look for the object {name}"), &error)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        name::check_prefix(prefix)?;
        let listed = self.bucket.wait(self.bucket.list(prefix));
        let listed =
            listed.map_err(|error| self.bucket.failed(&format!("list its objects {prefix}*"), &error))?;
        Ok(listed.into_iter().filter(|(name, _)| name::check(name).is_ok()).map(info).collect())
    }

    fn delete(&self, name: &str) -> Result<()> {
        name::check(name)?;
        let deleted = self.bucket.wait(self.bucket.delete(name));
        deleted.map_err(|error| self.bucket.failed(&format!("delete the object {name}"), &error))
    }

    fn leftovers(&self) -> Result<Vec<ObjectInfo>> {
        let listed = self.bucket.wait(self.bucket.list(&format!("{}/", name::TEMPORARY)));
        let listed = listed.map_err(|error| self.bucket.failed("list what crashes left", &error))?;
        Ok(listed.into_iter().filter(|(name, _)| name::check_leftover(name).is_ok()).map(info).collect())
    }

    fn remove_leftover(&self, name: &str) -> Result<()> {
        name::check_leftover(name)?;
        let removed = self.bucket.wait(writer::abandon(&self.bucket, name));
        removed.map_err(|error| self.bucket.failed(&format!("delete the leftover {name}"), &error))
    }

    fn try_lock(&self, owner: &str) -> Result<Attempt> {
        lock::attempt(&self.bucket, owner, self.times)
    }

    fn is_remote(&self) -> bool {
        true
    }
}

fn info((name, meta): (String, ObjectMeta)) -> ObjectInfo {
    ObjectInfo { name, bytes: meta.size, written: meta.last_modified.into() }
}

struct Reader {
    bucket: Arc<Bucket>,
    name: String,
    path: Path,
    bytes: u64,
}

impl Reader {
    fn read(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()> {
        if ranges.iter().any(|range| range.end > self.bytes) {
            return Err(fault::short(&self.bucket.place, &self.name, self.bytes));
        }
        // Ranges that are near each other become one request, and some requests are made at once.
        let read = self.bucket.wait(self.bucket.client.get_ranges(&self.path, ranges));
        let read = read.map_err(|error| match error {
            object_store::Error::NotFound { .. } => fault::missing(&self.bucket.place, &self.name),
            error => self.bucket.failed(&format!("read the object {}", self.name), &error),
        })?;
        let mut rest = buffer;
        for part in &read {
            let room = std::mem::take(&mut rest).split_at_mut_checked(part.len());
            let (room, behind) =
                room.ok_or_else(|| fault::short(&self.bucket.place, &self.name, self.bytes))?;
            room.copy_from_slice(part);
            rest = behind;
        }
        if rest.is_empty() { Ok(()) } else { Err(fault::short(&self.bucket.place, &self.name, self.bytes)) }
    }
}

impl ObjectReader for Reader {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        let end = end.ok_or_else(|| fault::short(&self.bucket.place, &self.name, self.bytes))?;
        if buffer.is_empty() && end <= self.bytes {
            return Ok(());
        }
        self.read(std::slice::from_ref(&(offset..end)), buffer)
    }

    fn read_ranges(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()> {
        ranges::check(&self.name, ranges, buffer)?;
        let ranges: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
        if ranges.is_empty() {
            return Ok(());
        }
        self.read(&ranges, buffer)
    }
}
