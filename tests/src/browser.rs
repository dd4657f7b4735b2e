//! A headless Chromium, spoken to over a pipe: one page at a time, and everything it asks for or complains about.
//!
//! The protocol is the browser's own (DevTools): JSON objects with a NUL behind each, on the descriptors 3 and 4.

use base64::Engine as _;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The longest that the browser may take for one answer; a loaded machine needs seconds to start it.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A running browser with one page, ended when dropped.
pub struct Browser {
    child: Child,
    messages: Receiver<Value>,
    session: Value,
    next: u64,
    /// What the page asked for, by address.
    pub requests: Vec<String>,
    /// What it complained about: errors of the console, exceptions, violations of its own policy.
    pub complaints: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts one, with a fresh profile; `None` where there is no browser, which is a failure in CI.
    ///
    /// # Panics
    /// If it is there and does not start, or is not there in CI.
    pub fn start(test: &str) -> Option<Self> {
        let Some(program) = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|name| {
            Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
        }) else {
            assert!(std::env::var_os("CI").is_none(), "CI never skips the tests that need chromium");
            println!("SKIPPED: {test}: it needs chromium (scripts/test installs it)");
            return None;
        };
        let profile = tempfile::Builder::new().prefix("migrate-browser-").tempdir().expect("a directory");
        // The shell moves its pipes to where the browser expects them.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh", program])
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let mut out = child.stdout.take().expect("stdout is piped");
        let (send, messages) = channel();
        std::thread::spawn(move || {
            let (mut pending, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
            while let Ok(bytes @ 1..) = out.read(&mut buffer) {
                pending.extend_from_slice(&buffer[..bytes]);
                while let Some(end) = pending.iter().position(|byte| *byte == 0) {
                    let message: Vec<u8> = pending.drain(..=end).collect();
                    let Ok(value) = serde_json::from_slice(&message[..end]) else { return };
                    if send.send(value).is_err() {
                        return;
                    }
                }
            }
        });
        let mut browser = Self {
            child,
            messages,
            session: Value::Null,
            next: 0,
            requests: Vec::new(),
            complaints: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", &json!({"targetId": target, "flatten": true}));
        browser.session = attached["sessionId"].clone();
        for domain in ["Page", "Network", "Log", "Runtime"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        Some(browser)
    }

    /// Shows a file in a window of this width, in light or in dark.
    ///
    /// # Panics
    /// If it does not load.
    pub fn open(&mut self, file: &Path, width_px: u32, dark: bool) {
        let mobile = width_px < 500;
        self.call(
            "Emulation.setDeviceMetricsOverride",
            &json!({"width": width_px, "height": 800, "deviceScaleFactor": 1, "mobile": mobile}),
        );
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", &json!({"media": "", "features": features}));
        (self.requests, self.complaints) = (Vec::new(), Vec::new());
        self.call("Page.navigate", &json!({"url": format!("file://{}", file.display())}));
        let until = Instant::now() + ANSWER_LIMIT;
        while self.evaluate("document.readyState") != "complete"
            || self.evaluate("location.protocol") != "file:"
        {
            assert!(Instant::now() < until, "{} is not loaded", file.display());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The value of an expression on the page.
    ///
    /// # Panics
    /// If it has none.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let answer = self.call("Runtime.evaluate", &json!({"expression": expression, "returnByValue": true}));
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// A picture of the whole page, as PNG.
    ///
    /// # Panics
    /// If there is none.
    pub fn screenshot(&mut self) -> Vec<u8> {
        let options = json!({"format": "png", "captureBeyondViewport": true});
        let answer = self.call("Page.captureScreenshot", &options);
        let data = answer["data"].as_str().expect("a picture");
        base64::engine::general_purpose::STANDARD.decode(data).expect("base64")
    }

    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.next += 1;
        let mut message = json!({"id": self.next, "method": method, "params": params});
        if !self.session.is_null() {
            message["sessionId"] = self.session.clone();
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        let stdin = self.child.stdin.as_mut().expect("stdin is piped");
        stdin.write_all(&bytes).unwrap_or_else(|error| panic!("{method}: the browser is gone: {error}"));
        let until = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let message =
                self.messages.recv_timeout(left).unwrap_or_else(|error| panic!("{method}: {error}"));
            if message["id"] == self.next {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
            self.note(&message);
        }
    }

    fn note(&mut self, message: &Value) {
        let params = &message["params"];
        match message["method"].as_str() {
            Some("Network.requestWillBeSent") => {
                self.requests.push(params["request"]["url"].as_str().unwrap_or_default().to_owned());
            }
            Some("Log.entryAdded" | "Runtime.exceptionThrown" | "Runtime.consoleAPICalled") => {
                self.complaints.push(params.to_string());
            }
            _ => {}
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
