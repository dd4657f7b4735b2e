//! From a configuration to the end of a VM.

use std::{
    io::Write,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
};

use crate::{
    boot::Images,
    config::{ExitReason, IncomingConfig, VmConfig, check_name},
    error::Result,
    host::Host,
    instance::{Expectation, Instance},
    memory::spaces_for,
    server::{Server, Shared, Socket},
    state::check_vcpus,
    vcpu::{Ending, Event},
    vm::{Shape, Vm},
};

/// Boots a VM and runs it to its end.
///
/// # Errors
/// [`crate::Error`] when it could not be built. Once it runs, every end is an [`ExitReason`].
pub fn run(config: VmConfig) -> Result<ExitReason> {
    check_name(&config.name)?;
    let images = Images::read(&config.kernel, config.initramfs.as_ref(), &config.cmdline)?;
    spaces_for(config.memory_bytes)?;
    let host = Host::open()?;
    check_vcpus(config.vcpus, &host)?;
    // Before anything expensive: the socket is also what keeps two VMs of one name apart.
    let socket = config.socket_path.as_deref().map(Socket::bind).transpose()?;
    let (sender, events) = channel();
    let serial = config.serial.describe();
    let shape = Shape {
        memory_bytes: config.memory_bytes,
        vcpus: config.vcpus,
        cpu: &config.cpu,
        nested: config.nested,
    };
    let vm = Vm::boot(&host, &shape, &images, config.serial, &config.devices, &sender)?;
    // Tens of megabytes that nobody needs any more.
    drop(images);
    tracing::info!(name = %config.name, memory_bytes = config.memory_bytes, vcpus = config.vcpus, "running");
    let shared = Shared::new(Instance::booted(config.name, vm, serial, sender));
    shared.instance().run();
    serve(socket, &shared, &events)
}

/// Waits for a VM from elsewhere, and runs it to its end.
///
/// # Errors
/// [`crate::Error`] when the host cannot run VMs, or the socket cannot be served.
pub fn run_incoming(config: IncomingConfig) -> Result<ExitReason> {
    check_name(&config.name)?;
    let host = Host::open()?;
    let socket = Socket::bind(&config.socket_path)?;
    let (sender, events) = channel();
    let expectation = Expectation {
        host,
        max_memory_bytes: config.max_memory_bytes,
        serial: config.serial,
        allowed: config.allowed,
        cpu: config.cpu,
    };
    let shared = Shared::new(Instance::incoming(config.name, expectation, sender));
    serve(Some(socket), &shared, &events)
}

fn serve(socket: Option<Socket>, shared: &Arc<Shared>, events: &Receiver<Event>) -> Result<ExitReason> {
    let server = socket.map(|socket| Server::start(socket, Arc::clone(shared))).transpose()?;
    let reason = match events.recv() {
        Ok(Event::Vcpu(event)) => reason_of(event.index, event.ending),
        Ok(Event::End(reason)) => reason,
        // The instance holds a sender, so this cannot be; ending is the safe answer all the same.
        Err(_) => ExitReason::Terminated,
    };
    tracing::info!(%reason, "the VM ended");
    // The socket goes first: a client sees the end of the connection, not a VM that half exists.
    drop(server);
    shared.instance().stop();
    if let Err(error) = std::io::stdout().flush() {
        tracing::debug!(%error, "standard output");
    }
    Ok(reason)
}

fn reason_of(vcpu: u32, ending: Ending) -> ExitReason {
    match ending {
        Ending::PowerOff(code) => ExitReason::PoweredOff { code },
        Ending::Reset => ExitReason::Reset,
        Ending::Shutdown => ExitReason::Crashed {
            vcpu,
            reason: "a triple fault: an exception in its exception handling".into(),
        },
        Ending::Failed(reason) => ExitReason::Crashed { vcpu, reason },
    }
}
