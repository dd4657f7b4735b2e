//! Reports at rest: read from JSON, written as JSON or as a page.

use super::{ArrivalReport, REPORT_VERSION, Report, html};
use crate::error::{Error, Result};
use serde_json::Value;
use std::io::Write as _;
use std::path::Path;

/// The largest file that is read, in bytes. A report of a thousand rounds takes 300 KiB, but the events of a migration
/// may stand before it.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A report of either end.
#[derive(Debug, Clone, PartialEq)]
pub enum Document {
    /// Of the source.
    Sent(Box<Report>),
    /// Of the destination.
    Arrived(Box<ArrivalReport>),
}

impl Document {
    /// The last report in a text: one JSON object, or the lines that `migrate send --json` or `migrate receive --json` printed.
    ///
    /// # Errors
    /// `Usage` that says what is wrong with the text.
    pub fn parse(text: &str) -> Result<Self> {
        let whole = serde_json::from_str::<Value>(text);
        let value = match &whole {
            Ok(value) if report_in(value).is_some() => report_in(value),
            _ => text.lines().rev().find_map(|line| report_in(&serde_json::from_str(line).ok()?)),
        };
        let value = value.ok_or_else(|| {
            let why = match whole {
                Err(error) if text.trim_start().starts_with('{') && !text.contains("\n{") => {
                    error.to_string()
                }
                _ => "there is no report in it".into(),
            };
            Error::Usage(format!(
                "{why}: it must be what migrate send --json or migrate receive --json printed"
            ))
        })?;
        let version = value.get("version").map_or(Some(1), Value::as_u64);
        if version.is_none_or(|version| version == 0 || version > u64::from(REPORT_VERSION)) {
            return Err(Error::Usage(format!(
                "it is a report of version {}, and this program reads version {REPORT_VERSION}: use the one that made it",
                value.get("version").unwrap_or(&Value::Null)
            )));
        }
        let wrong = |error: serde_json::Error| Error::Usage(format!("the report is damaged: {error}"));
        if value.get("received_bytes").is_some() {
            serde_json::from_value(value).map(|report| Self::Arrived(Box::new(report))).map_err(wrong)
        } else {
            serde_json::from_value(value).map(|report| Self::Sent(Box::new(report))).map_err(wrong)
        }
    }

    /// The report in this file.
    ///
    /// # Errors
    /// `Host` when it cannot be read, `Usage` as [`Document::parse`].
    pub fn read(path: &Path) -> Result<Self> {
        use std::io::Read as _;
        let cannot =
            |error: std::io::Error| Error::Host(format!("{} cannot be read: {error}", path.display()));
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(cannot)?;
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(Error::Usage(format!("{} is larger than 64 MiB: it is no report", path.display())));
        }
        Self::parse(&String::from_utf8_lossy(&bytes)).map_err(|error| match error {
            Error::Usage(why) => Error::Usage(format!("{}: {why}", path.display())),
            other => other,
        })
    }

    /// It as a page.
    pub fn page(&self) -> String {
        match self {
            Self::Sent(report) => html::page(report),
            Self::Arrived(report) => html::arrival_page(report),
        }
    }

    /// Writes it: as JSON where the name ends in `.json`, as a page otherwise. Whoever opens the file finds the old one or
    /// all of the new one.
    ///
    /// # Errors
    /// `Host`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        let text = if json { self.json() } else { self.page() };
        write_whole(path, text.as_bytes()).map_err(|error| {
            Error::Host(format!("the report cannot be written to {}: {error}", path.display()))
        })
    }

    fn json(&self) -> String {
        let text = match self {
            Self::Sent(report) => serde_json::to_string_pretty(report),
            Self::Arrived(report) => serde_json::to_string_pretty(report),
        };
        text.unwrap_or_default() + "\n"
    }
}

/// The report that an object is or carries.
fn report_in(value: &Value) -> Option<Value> {
    let carries = value.get("event").is_some_and(|event| event == "arrived");
    let report = if carries { value.get("report")? } else { value };
    (report.is_object() && report.get("phases").is_some() && report.get("peer").is_some())
        .then(|| report.clone())
}

fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut unfinished = std::ffi::OsString::from(".");
    unfinished.push(name);
    unfinished.push(format!(".{}", std::process::id()));
    let unfinished = path.with_file_name(unfinished);
    let written = std::fs::File::create(&unfinished)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&unfinished, path));
    if written.is_err() {
        // What could not be finished is of no use; the first error is the one that counts.
        std::fs::remove_file(&unfinished).ok();
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::html::samples::{arrival, busy};

    #[test]
    fn a_report_survives_being_written_and_read() {
        let directory = tempfile::tempdir().unwrap();
        for document in [Document::Sent(Box::new(busy())), Document::Arrived(Box::new(arrival()))] {
            let path = directory.path().join("move.json");
            document.write(&path).unwrap();
            assert_eq!(Document::read(&path).unwrap(), document);
        }
        let page = directory.path().join("move.html");
        Document::Sent(Box::new(busy())).write(&page).unwrap();
        assert!(std::fs::read_to_string(&page).unwrap().starts_with("<!DOCTYPE html>"));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "nothing unfinished is left");
        let nowhere = directory.path().join("missing/move.html");
        assert!(matches!(Document::Sent(Box::new(busy())).write(&nowhere), Err(Error::Host(_))));
    }

    #[test]
    fn the_lines_of_a_migration_are_read_too_and_unknown_members_ignored() {
        let mut line = serde_json::to_value(busy()).unwrap();
        line["event"] = "report".into();
        line["of_the_future"] = serde_json::json!({"a": [1]});
        let text = format!("{{\"event\":\"phase\",\"phase\":\"greet\"}}\n{line}\n");
        assert_eq!(Document::parse(&text).unwrap(), Document::Sent(Box::new(busy())));
        let report = serde_json::to_value(arrival()).unwrap();
        let text = serde_json::json!({"event": "arrived", "name": "web", "report": report}).to_string();
        assert_eq!(Document::parse(&text).unwrap(), Document::Arrived(Box::new(arrival())));
    }

    #[test]
    fn what_is_no_report_is_refused_with_a_reason() {
        let mut future = serde_json::to_value(busy()).unwrap();
        future["version"] = 2.into();
        let mut damaged = serde_json::to_value(busy()).unwrap();
        damaged["rounds"] = "many".into();
        for (text, why) in [
            ("", "no report"),
            ("{}", "no report"),
            ("[1,2]", "no report"),
            ("{\"phases\": [", "EOF"),
            (&future.to_string(), "version 2"),
            (&damaged.to_string(), "damaged"),
        ] {
            let error = Document::parse(text).unwrap_err();
            assert!(matches!(&error, Error::Usage(said) if said.contains(why)), "{text}: {error}");
        }
    }
}
