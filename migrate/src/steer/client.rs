//! The operator's end of the steering socket.

use super::place::{Found, Place};
use crate::error::{Error, Result, clean};
use protocol::envelope::{self, HEADER_BYTES, Header};
use protocol::steer::{Answer, ErrorCode, Limits, MAX_AWAIT_MS, Order, Status};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a migration may take for an answer that it need not keep back.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A connection to a running migration.
#[derive(Debug)]
pub struct Client {
    name: String,
    stream: UnixStream,
}

impl Client {
    /// The migration of this workload, if there is one.
    ///
    /// # Errors
    /// `Host` when its socket cannot be reached.
    pub fn connect(place: &Place, name: &str) -> Result<Option<Self>> {
        match place.find(name)? {
            Found::Running(stream) => Ok(Some(Self { name: name.into(), stream })),
            Found::Nothing => Ok(None),
        }
    }

    /// How it is.
    ///
    /// # Errors
    /// `Workload` when it does not answer.
    pub fn status(&mut self) -> Result<Status> {
        self.status_by(&Order::Status, ANSWER_LIMIT)
    }

    /// How it is once it has ended, or when `limit` is over.
    ///
    /// # Errors
    /// `Workload` when it does not answer.
    pub fn status_at_end(&mut self, limit: Duration) -> Result<Status> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let limit_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).min(MAX_AWAIT_MS);
            let wait = Duration::from_millis(limit_ms);
            let status = self.status_by(&Order::Await { limit_ms }, wait + ANSWER_LIMIT)?;
            if status.outcome.is_some() || wait == left || left <= wait + Duration::from_millis(1) {
                return Ok(status);
            }
        }
    }

    /// Stops it; `false` says that it is too late.
    ///
    /// # Errors
    /// `Workload` when it does not answer.
    pub fn cancel(&mut self) -> Result<bool> {
        match self.ask(&Order::Cancel, ANSWER_LIMIT)? {
            Answer::Done => Ok(true),
            Answer::Error { code: ErrorCode::TooLate, .. } => Ok(false),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Changes limits.
    ///
    /// # Errors
    /// `Usage` with its reason when it refuses them, `Workload` when it does not answer.
    pub fn set(&mut self, limits: &Limits) -> Result<()> {
        match self.ask(&Order::Set(limits.clone()), ANSWER_LIMIT)? {
            Answer::Done => Ok(()),
            Answer::Error { code: ErrorCode::BadValue, message } => Err(Error::Usage(clean(&message))),
            other => Err(self.unexpected(&other)),
        }
    }

    fn status_by(&mut self, order: &Order, limit: Duration) -> Result<Status> {
        match self.ask(order, limit)? {
            Answer::Status(status) => Ok(*status),
            other => Err(self.unexpected(&other)),
        }
    }

    fn ask(&mut self, order: &Order, limit: Duration) -> Result<Answer> {
        let result = exchange(&mut self.stream, order, limit);
        result.map_err(|error| {
            Error::Workload(format!("the migration of {} does not answer: {error}", self.name))
        })
    }

    fn unexpected(&self, answer: &Answer) -> Error {
        let said = match answer {
            Answer::Error { message, .. } => clean(message),
            Answer::Status(_) | Answer::Done => "something that was not asked".into(),
        };
        Error::Workload(format!("the migration of {} says: {said}", self.name))
    }
}

fn exchange(stream: &mut UnixStream, order: &Order, limit: Duration) -> std::io::Result<Answer> {
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(&envelope::encode(order, &[]).map_err(std::io::Error::other)?)?;
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let header = Header::decode(&header, 0).map_err(std::io::Error::other)?;
    let mut json = vec![0; header.body_bytes()];
    stream.read_exact(&mut json)?;
    envelope::decode("steering", &json).map_err(std::io::Error::other)
}
