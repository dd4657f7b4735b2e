//! The operator's end of the steering socket.

use super::place::{Found, Place};
use crate::error::{Error, Result, clean};
use protocol::envelope::{self, HEADER_BYTES, Header};
use protocol::steer::{Answer, ErrorCode, Limits, MAX_AWAIT_MS, Order, Series, Status};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a migration may take for an answer that it need not keep back.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A connection to a running migration, or to a series of checkpoints.
#[derive(Debug)]
pub struct Client {
    /// What it is, for people.
    what: String,
    stream: UnixStream,
}

impl Client {
    /// What is under way with this workload at this place, if anything is.
    ///
    /// # Errors
    /// `Host` when its socket cannot be reached.
    pub fn connect(place: &Place, name: &str) -> Result<Option<Self>> {
        match place.find(name)? {
            Found::Running(stream) => {
                Ok(Some(Self { what: format!("the {} of {name}", place.what()), stream }))
            }
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
        self.at_end(limit, Self::status_by, |status| status.outcome.is_some())
    }

    /// How a series of checkpoints is.
    ///
    /// # Errors
    /// `Workload` when it does not answer.
    pub fn series(&mut self) -> Result<Series> {
        self.series_by(&Order::Status, ANSWER_LIMIT)
    }

    /// How a series of checkpoints is once it has ended, or when `limit` is over.
    ///
    /// # Errors
    /// `Workload` when it does not answer.
    pub fn series_at_end(&mut self, limit: Duration) -> Result<Series> {
        self.at_end(limit, Self::series_by, |series| series.ended)
    }

    /// Asks again and again until it is over, or `limit` is.
    fn at_end<T>(
        &mut self,
        limit: Duration,
        ask: fn(&mut Self, &Order, Duration) -> Result<T>,
        is_over: fn(&T) -> bool,
    ) -> Result<T> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let limit_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).min(MAX_AWAIT_MS);
            let wait = Duration::from_millis(limit_ms);
            let found = ask(self, &Order::Await { limit_ms }, wait + ANSWER_LIMIT)?;
            if is_over(&found) || wait == left || left <= wait + Duration::from_millis(1) {
                return Ok(found);
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

    fn series_by(&mut self, order: &Order, limit: Duration) -> Result<Series> {
        match self.ask(order, limit)? {
            Answer::Series(series) => Ok(*series),
            other => Err(self.unexpected(&other)),
        }
    }

    fn ask(&mut self, order: &Order, limit: Duration) -> Result<Answer> {
        let result = exchange(&mut self.stream, order, limit);
        result.map_err(|error| Error::Workload(format!("{} does not answer: {error}", self.what)))
    }

    fn unexpected(&self, answer: &Answer) -> Error {
        let said = match answer {
            Answer::Error { message, .. } => clean(message),
            Answer::Status(_) | Answer::Series(_) | Answer::Done => "something that was not asked".into(),
        };
        Error::Workload(format!("{} says: {said}", self.what))
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
