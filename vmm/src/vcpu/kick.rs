//! Getting a vCPU thread out of the guest.
//!
//! A real-time signal interrupts KVM_RUN. If it arrives just before KVM_RUN, it would be lost; so its
//! handler sets `immediate_exit` in the thread's own `kvm_run` page, and KVM_RUN returns at once
//! (kvm api.rst, KVM_RUN).

use std::{cell::Cell, ptr, sync::OnceLock, thread::JoinHandle};

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::error::{Error, Result};

thread_local! {
    /// This thread's `immediate_exit` byte, or null. Constant-initialised and without a destructor:
    /// reading it in a signal handler is a plain memory access.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let byte = IMMEDIATE_EXIT.get();
    if !byte.is_null() {
        // SAFETY: the pointer was set by this thread's `Target`, which outlives its use and resets it.
        // The kernel and this thread expect the byte to change at any time.
        unsafe { byte.write_volatile(1) };
    }
}

/// Installs the handler, once a process.
///
/// # Errors
/// [`Error::Host`] when the host refuses.
pub(super) fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick).map_err(|errno| errno.errno()))
        .map_err(std::io::Error::from_raw_os_error)
        .map_err(Error::host("install the signal handler for vCPU threads"))
}

/// Kicks the thread.
pub(super) fn kick(thread: &JoinHandle<()>) {
    if let Err(error) = thread.kill(SIGRTMIN()) {
        tracing::debug!(%error, "a vCPU thread could not be kicked");
    }
}

/// The vCPU of this thread, as the target of kicks. Owns it, so that the page stays mapped.
pub(super) struct Target {
    fd: VcpuFd,
}

impl Target {
    /// Makes `fd` the target of kicks to this thread.
    pub(super) fn new(mut fd: VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self { fd }
    }

    /// The vCPU.
    pub(super) fn fd(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Makes the next KVM_RUN return before it enters the guest, or not.
    pub(super) fn set_immediate_exit(&mut self, on: bool) {
        self.fd.set_kvm_immediate_exit(u8::from(on));
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
