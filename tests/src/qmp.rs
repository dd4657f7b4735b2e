//! QEMU's monitor (QMP, "QEMU Machine Protocol Specification"): one JSON object a line over a unix socket.

use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a monitor.
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects as soon as the socket is there.
    pub(crate) fn connect(path: &Path) -> std::io::Result<Self> {
        let until = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        monitor.line()?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command and gives what it returns. Events are passed over.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> std::io::Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(std::io::Error::other(format!("QEMU's answer to {command}: {error}")));
            }
            if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            }
        }
    }

    fn line(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::Error::other("QEMU closed its monitor"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
