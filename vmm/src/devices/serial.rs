//! The serial port: a 16550 at COM1, with a twin of the same registers in memory.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use vm_superio::{
    Trigger,
    serial::{NoEvents, Serial, SerialState},
};

use super::{ConsoleSocket, Input};
use crate::{
    device::{Device, Effect, Interrupt},
    error::{Error, Result},
};

const STATE_VERSION: u16 = 1;

/// Bytes the receive buffer holds at most (vm-superio's FIFO).
const IN_BUFFER_MAX: usize = 0x40;

/// Where the guest's output goes.
pub enum SerialSink {
    /// Nowhere.
    None,
    /// To this process's standard output, flushed at each line's end.
    Stdout,
    /// The same, and input comes from standard input.
    Stdio,
    /// To the client of a socket, from where input comes too.
    Socket(Arc<ConsoleSocket>),
    /// To a file; the path is for people.
    File(File, PathBuf),
    /// To whatever the embedder wants. Called by vCPU threads: it should not block.
    Custom(Box<dyn Write + Send>),
}

impl SerialSink {
    /// Appends to a file, which is created with mode 0600 if it is not there.
    ///
    /// # Errors
    /// [`Error::Config`] that names the file.
    pub fn append_to(path: &Path) -> Result<Self> {
        let file = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| Error::Config(format!("serial port to {}: {error}", path.display())))?;
        Ok(SerialSink::File(file, path.to_owned()))
    }

    /// What a user calls it: `stdout`, `stdio`, `none`, `socket:PATH`, or the path of a file to append to.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Socket`] that names the file.
    pub fn parse(text: &str) -> Result<Self> {
        match text.strip_prefix("socket:") {
            Some(path) => Ok(SerialSink::Socket(ConsoleSocket::bind(Path::new(path))?)),
            None => match text {
                "stdout" => Ok(SerialSink::Stdout),
                "stdio" => Ok(SerialSink::Stdio),
                "none" => Ok(SerialSink::None),
                path => Self::append_to(Path::new(path)),
            },
        }
    }

    /// Where input comes from, if it comes from anywhere.
    pub(crate) fn input(&self) -> Option<Input> {
        match self {
            SerialSink::Stdio => Some(Input::Stdin),
            SerialSink::Socket(socket) => Some(Input::Socket(Arc::clone(socket))),
            SerialSink::None | SerialSink::Stdout | SerialSink::File(..) | SerialSink::Custom(_) => None,
        }
    }

    /// Where it goes, for people.
    pub fn describe(&self) -> String {
        match self {
            SerialSink::None => "none".into(),
            SerialSink::Stdout => "stdout".into(),
            SerialSink::Stdio => "stdio".into(),
            SerialSink::Socket(socket) => format!("socket {}", socket.path().display()),
            SerialSink::File(_, path) => format!("file {}", path.display()),
            SerialSink::Custom(_) => "the embedding process".into(),
        }
    }
}

impl std::fmt::Debug for SerialSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

impl Write for SerialSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self {
            SerialSink::None => Ok(bytes.len()),
            SerialSink::Stdout | SerialSink::Stdio => io::stdout().write(bytes),
            SerialSink::Socket(socket) => {
                socket.write(bytes);
                Ok(bytes.len())
            }
            SerialSink::File(file, _) => file.write(bytes),
            SerialSink::Custom(sink) => sink.write(bytes),
        };
        // A full disk or a closed pipe is no reason to stop the guest, or to answer it an error.
        written.or(Ok(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.raise()
    }
}

/// The serial port.
pub struct SerialPort {
    port: Serial<Interrupt, NoEvents, SerialSink>,
    /// Input is taken only while the guest runs: what came behind a freeze would be in no saved state.
    open: bool,
}

impl SerialPort {
    /// A port as after power-on.
    pub fn new(sink: SerialSink, interrupt: Interrupt) -> Self {
        Self { port: Serial::new(interrupt, sink), open: false }
    }

    /// From now on input is taken, or is left to whoever brings it.
    pub fn open(&mut self, open: bool) {
        self.open = open;
    }

    /// Gives the guest as much of this as it has room for; answers how many bytes that were.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        if !self.open {
            return 0;
        }
        let fits = bytes.len().min(self.port.fifo_capacity());
        match self.port.enqueue_raw_bytes(&bytes[..fits]) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::debug!(?error, "serial port");
                // A guest that looped its port back takes nothing from outside: the input is lost, as on a wire.
                fits
            }
        }
    }
}

/// The registers, in our own type: the format of a saved state is ours, not a library's.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl Device for SerialPort {
    fn name(&self) -> &str {
        "serial"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.port.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.port.write(offset, *byte)
        {
            tracing::debug!(?error, "serial port");
        }
        Effect::None
    }

    fn state_version(&self) -> u16 {
        STATE_VERSION
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = self.port.state();
        let saved = Saved {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        };
        postcard::to_allocvec(&saved).map_err(|error| Error::State(format!("serial: {error}")))
    }

    fn restore(&mut self, version: u16, bytes: &[u8]) -> Result<()> {
        if version != STATE_VERSION {
            return Err(Error::State(format!("serial: version {version} is not {STATE_VERSION}")));
        }
        let saved: Saved =
            postcard::from_bytes(bytes).map_err(|error| Error::State(format!("serial: {error}")))?;
        if saved.in_buffer.len() > IN_BUFFER_MAX {
            return Err(Error::State(format!("serial: {} bytes are buffered", saved.in_buffer.len())));
        }
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer,
        };
        let interrupt = self.port.interrupt_evt().clone();
        let sink = std::mem::replace(self.port.writer_mut(), SerialSink::None);
        self.port = Serial::from_state(&state, interrupt, NoEvents, sink)
            .map_err(|error| Error::State(format!("serial: {error:?}")))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port(buffer: &Buffer) -> SerialPort {
        SerialPort::new(SerialSink::Custom(Box::new(buffer.clone())), Interrupt::none())
    }

    #[test]
    fn output_reaches_the_sink_before_and_after_a_restore() {
        let buffer = Buffer::default();
        let mut first = port(&buffer);
        first.write(0, b"a");
        first.write(7, &[0x5a]);
        first.write(0, b"too long is ignored");
        let mut second = port(&buffer);
        second.restore(1, &first.save().unwrap()).unwrap();
        second.write(0, b"b");
        let mut scratch = [0];
        second.read(7, &mut scratch);
        assert_eq!(scratch, [0x5a]);
        assert_eq!(*buffer.0.lock().unwrap(), b"ab");
    }

    #[test]
    fn input_waits_for_a_running_guest_with_room_and_raises_one_interrupt() {
        let raised = Arc::new(Mutex::new(0));
        let count = raised.clone();
        let line = Interrupt::to(move || {
            *count.lock().unwrap() += 1;
            Ok(())
        });
        let mut port = SerialPort::new(SerialSink::None, line);
        port.write(1, &[1]); // "received data" interrupts, on
        assert_eq!(port.receive(b"early"), 0);
        port.open(true);
        let long = [b'x'; IN_BUFFER_MAX + 6];
        assert_eq!(port.receive(&long), IN_BUFFER_MAX);
        assert_eq!(port.receive(&long), 0);
        assert_eq!(*raised.lock().unwrap(), 1);
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(byte, [b'x']);
        assert_eq!(port.receive(b"ab"), 1);
        port.open(false);
        port.read(0, &mut byte);
        assert_eq!(port.receive(b"c"), 0);
    }

    #[test]
    fn input_that_the_guest_has_not_read_moves_along() {
        let mut first = port(&Buffer::default());
        first.open(true);
        assert_eq!(first.receive(b"ls"), 2);
        let mut second = port(&Buffer::default());
        second.restore(1, &first.save().unwrap()).unwrap();
        let mut bytes = [0; 2];
        for byte in &mut bytes {
            second.read(0, std::slice::from_mut(byte));
        }
        assert_eq!(&bytes, b"ls");
    }

    #[test]
    fn a_state_that_is_too_long_or_of_another_version_is_refused() {
        let mut port = port(&Buffer::default());
        let mut saved = port.save().unwrap();
        assert!(port.restore(2, &saved).is_err());
        saved.pop();
        saved.extend([0x80, 1]);
        saved.extend([0; 128]);
        assert!(port.restore(1, &saved).is_err());
    }
}
