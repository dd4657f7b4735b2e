//! One connection to the control socket, from its hello to its end.

use std::{os::unix::net::UnixStream, time::Duration};

use protocol::monitor::{ErrorCode, Reply, Request, Role, VERSION};

use super::Shared;
use crate::{
    error::{Error, Result},
    instance::{Answer, Holder},
    wire::{Patience, Wire},
};

/// How long a client may take to say hello, to finish a message it began, and to read a reply.
const MESSAGE_LIMIT: Duration = Duration::from_secs(5);
/// How long a query connection may be silent. Sessions may be silent for ever: their end is their socket's.
const QUERY_IDLE: Duration = Duration::from_secs(30);
/// How long a new session waits for one whose process just died to be cleared away.
const HANDOVER_WAIT: Duration = Duration::from_millis(100);
/// How often it looks.
const HANDOVER_STEP: Duration = Duration::from_millis(5);

/// Serves a connection until it ends; a broken one is dropped with one line in the log.
pub(super) fn serve(stream: UnixStream, number: u64, shared: &Shared) {
    let pid = peer_pid(&stream);
    let mut wire = Wire::new(stream, false);
    let outcome = converse(&mut wire, number, pid, shared);
    if let Err(error) = outcome {
        tracing::warn!(client_pid = pid, %error, "a control connection was dropped");
        // It may be too broken for this to arrive.
        let message = error.to_string();
        let _ = wire.send(&Reply::Error { code: ErrorCode::BadRequest, message }, &[], &[], MESSAGE_LIMIT);
    }
    shared.instance().session_ended(number);
}

fn peer_pid(stream: &UnixStream) -> Option<u32> {
    let credentials = rustix::net::sockopt::socket_peercred(stream).ok()?;
    u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
}

fn converse(wire: &mut Wire, number: u64, pid: Option<u32>, shared: &Shared) -> Result<()> {
    let patience = Patience { first: Some(MESSAGE_LIMIT), rest: MESSAGE_LIMIT };
    let Some(hello) = wire.receive(patience)? else { return Ok(()) };
    let Request::Hello { version, role, client } = hello.decode()? else {
        return Err(Error::Protocol("the first message is no hello".into()));
    };
    if version != VERSION {
        let reason = format!("this VMM speaks version {VERSION} of the control protocol, not {version}");
        return refuse(wire, reason, None);
    }
    if role == Role::Session {
        let holder = Holder { connection: number, pid, client };
        if let Err(current) = claim(shared, &holder) {
            let who = current.pid.map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
            let reason = format!("{who} ({:?}) holds this VM: wait for it, or end it", current.client);
            return refuse(wire, reason, current.pid);
        }
    }
    let welcome = Reply::Welcome {
        version: VERSION,
        software: concat!("vmm ", env!("CARGO_PKG_VERSION")).into(),
        status: shared.instance().status(),
    };
    wire.send(&welcome, &[], &[], MESSAGE_LIMIT)?;
    match role {
        Role::Query => answer_queries(wire, shared),
        Role::Session => answer_session(wire, shared),
    }
}

fn refuse(wire: &mut Wire, reason: String, holder_pid: Option<u32>) -> Result<()> {
    wire.send(&Reply::Refused { reason, holder_pid }, &[], &[], MESSAGE_LIMIT)
}

/// Claims the VM. A holder that died a moment ago may still be there until its thread noticed.
fn claim(shared: &Shared, holder: &Holder) -> Result<(), Holder> {
    let mut waited = Duration::ZERO;
    loop {
        match shared.instance().claim(holder.clone()) {
            Err(_) if waited < HANDOVER_WAIT => {}
            outcome => return outcome,
        }
        std::thread::sleep(HANDOVER_STEP);
        waited += HANDOVER_STEP;
    }
}

fn answer_queries(wire: &mut Wire, shared: &Shared) -> Result<()> {
    let patience = Patience { first: Some(QUERY_IDLE), rest: MESSAGE_LIMIT };
    while let Some(message) = wire.receive(patience)? {
        let reply = match message.decode()? {
            Request::Status => Reply::Status(shared.instance().status()),
            _ => Reply::Error {
                code: ErrorCode::BadRequest,
                message: "a query connection may only ask for the status".into(),
            },
        };
        wire.send(&reply, &[], &[], MESSAGE_LIMIT)?;
    }
    Ok(())
}

fn answer_session(wire: &mut Wire, shared: &Shared) -> Result<()> {
    let patience = Patience { first: None, rest: MESSAGE_LIMIT };
    while let Some(message) = wire.receive(patience)? {
        let request: Request = message.decode()?;
        let Answer { reply, blob, fds, end } = shared.instance().handle(request, &message.blob);
        let sent = wire.send(&reply, &blob, &fds, MESSAGE_LIMIT);
        if let Some(reason) = end {
            shared.instance().end(reason);
        }
        sent?;
    }
    Ok(())
}
