//! `migrate bench-pipe`, hidden: what the link carries with no guest behind it.

use super::emit;
use crate::cli::Common;
use crate::error::Result;
use crate::identity::{self, Identity, TrustStore};
use crate::link::quic::{Listener, Settings, dial, pipe};
use clap::Subcommand;
use serde_json::json;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

/// How long `receive` waits for its peer.
const WAIT: Duration = Duration::from_secs(60);

/// Measure what the QUIC link carries with no guest behind it
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  migrate bench-pipe receive --listen 127.0.0.1:7099 &\n  \
                        migrate bench-pipe send 127.0.0.1:7099 --mib 4096")]
pub struct Args {
    #[command(flatten)]
    tuning: Tuning,
    #[command(subcommand)]
    end: End,
}

#[derive(Debug, Subcommand)]
enum End {
    /// Take one run's bytes and throw them away
    Receive {
        /// Address and UDP port; port 0 takes a free one, which is printed
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7099")]
        listen: SocketAddr,
        /// How many runs to take before ending
        #[arg(long, default_value_t = 1)]
        runs: u32,
    },
    /// Send, and print the rate as one JSON object
    Send {
        /// HOST:PORT of the receiving end
        address: String,
        /// Payload in MiB
        #[arg(long, default_value_t = 1024)]
        mib: u64,
        /// Page streams
        #[arg(long, default_value_t = 1)]
        streams: u16,
    },
}

/// What differs from the settings that migrations use.
#[derive(Debug, clap::Args)]
struct Tuning {
    /// Bytes on their way at most, in KiB
    #[arg(long, global = true)]
    window_kib: Option<u32>,
    /// Bytes before the first acknowledgement, in KiB
    #[arg(long, global = true)]
    initial_window_kib: Option<u64>,
    /// The kernel's socket buffers, in KiB
    #[arg(long, global = true)]
    socket_kib: Option<usize>,
    /// Largest UDP payload in bytes
    #[arg(long, global = true)]
    max_payload: Option<u16>,
    /// Bytes in one send call
    #[arg(long, global = true)]
    max_batch: Option<usize>,
    /// Threads of the transport
    #[arg(long, global = true)]
    workers: Option<usize>,
}

impl Tuning {
    fn settings(&self) -> Settings {
        let usual = Settings::default();
        Settings {
            window_bytes: self.window_kib.map_or(usual.window_bytes, |kib| kib.saturating_mul(1024)),
            initial_window_bytes: self
                .initial_window_kib
                .map_or(usual.initial_window_bytes, |kib| kib.saturating_mul(1024)),
            socket_buffer_bytes: self
                .socket_kib
                .map_or(usual.socket_buffer_bytes, |kib| kib.saturating_mul(1024)),
            max_payload_bytes: self.max_payload.unwrap_or(usual.max_payload_bytes),
            max_batch_bytes: self.max_batch.unwrap_or(usual.max_batch_bytes),
            workers: self.workers.unwrap_or(usual.workers),
            ..usual
        }
    }
}

/// Runs one end.
///
/// # Errors
/// As the link's.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let keys = identity::directory(common.keys.as_deref())?;
    let settings = args.tuning.settings();
    match &args.end {
        End::Receive { listen, runs } => {
            let mut listener = Listener::bind(*listen, &keys, settings)?;
            emit(&json!({"event": "listening", "address": listener.local_addr().to_string()}));
            for _ in 0..*runs {
                pipe::receive(listener.accept(WAIT)?)?;
            }
        }
        End::Send { address, mib, streams } => {
            let identity = Identity::load(&keys)?;
            let trust = TrustStore::load(&keys)?;
            let link = dial(address, &identity, &trust, &settings, WAIT)?;
            emit(&pipe::send(link, mib.saturating_mul(1 << 20), *streams)?);
        }
    }
    Ok(ExitCode::SUCCESS)
}
