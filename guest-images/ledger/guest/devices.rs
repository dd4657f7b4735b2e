//! The serial line and the pad. Addresses and registers: `model/layout.rs`.

use core::arch::asm;
use core::fmt;
use core::ptr;

use crate::clock;
use crate::model::layout::{
    MMIO_BYTES, MMIO_GPA, PAD_GPA, PAD_ID, PAD_PARK_NS, PAD_POWER_OFF, Range, UART_GPA,
};
use crate::model::params::{Park, Serial};

/// COM1's transmit register.
const COM1: u16 = 0x3F8;

/// Bytes that wait to be printed. A line costs an exit a byte, so it goes out a few bytes a pass.
const QUEUE: usize = 4096;

/// What the guest can do to the world outside its memory.
pub struct Devices {
    pad: bool,
    /// The TSC frequency, for waiting without a pad.
    rate: clock::Rate,
    serial: Serial,
    park: Park,
    queue: [u8; QUEUE],
    first: usize,
    count: usize,
}

fn mmio<T>(gpa: u64) -> *mut T {
    ptr::with_exposed_provenance_mut(gpa as usize)
}

impl Devices {
    /// Looks for the pad. Where no device answers, reads give zeros or ones; where RAM lies, they harm
    /// nothing.
    pub fn find() -> Devices {
        // SAFETY: mapped (uncached) by the boot tables; reading the ID has no effect.
        let id = unsafe { mmio::<u32>(PAD_GPA).read_volatile() };
        Devices {
            pad: id == PAD_ID,
            rate: clock::Rate::new(0),
            serial: Serial::Mmio,
            park: Park::Pad,
            queue: [0; QUEUE],
            first: 0,
            count: 0,
        }
    }

    pub fn choose(&mut self, serial: Serial, park: Park) {
        self.serial = serial;
        self.park = park;
    }

    pub fn set_clock(&mut self, rate: clock::Rate) {
        self.rate = rate;
    }

    /// There is no pad where the memory map says RAM, whatever was read there.
    pub fn check_against(&mut self, ram: &[Range]) {
        let covers = |range: &Range| {
            range.start < MMIO_GPA + MMIO_BYTES && range.start.saturating_add(range.len) > MMIO_GPA
        };
        if ram.iter().any(covers) {
            self.pad = false;
        }
    }

    pub fn has_pad(&self) -> bool {
        self.pad
    }

    /// Waits for at most so long; without a pad, or where that was asked for, by spinning.
    pub fn park_ns(&mut self, ns: u64) {
        if self.pad && self.park == Park::Pad {
            // SAFETY: the pad is there; parking changes no memory.
            unsafe { mmio::<u64>(PAD_GPA + PAD_PARK_NS).write_volatile(ns) };
            return;
        }
        let from = clock::now();
        let cycles = self.rate.cycles(ns / 1000);
        while clock::now().wrapping_sub(from) < cycles {
            core::hint::spin_loop();
        }
    }

    /// Ends the VM, or waits for ever where nothing can end it.
    pub fn power_off(&mut self, code: u32) -> ! {
        loop {
            if self.pad {
                // SAFETY: the pad is there; the vCPU stops.
                unsafe { mmio::<u32>(PAD_GPA + PAD_POWER_OFF).write_volatile(code) };
            }
            self.park_ns(1_000_000_000);
        }
    }

    /// Prints up to `most` bytes of what waits; says whether more is left.
    pub fn drain(&mut self, most: usize) -> bool {
        for _ in 0..most.min(self.count) {
            let byte = self.queue[self.first];
            self.first = (self.first + 1) % QUEUE;
            self.count -= 1;
            match self.serial {
                // SAFETY: beside the pad lies the UART; its THR takes a byte at any time.
                Serial::Mmio if self.pad => unsafe { mmio::<u8>(UART_GPA).write_volatile(byte) },
                // SAFETY: asked for by the command line; RFLAGS.IOPL is 3.
                Serial::Port => unsafe {
                    asm!("out dx, al", in("dx") COM1, in("al") byte, options(nomem, nostack, preserves_flags));
                },
                Serial::Mmio | Serial::None => {}
            }
        }
        self.count > 0
    }

    /// Prints all that waits.
    pub fn flush(&mut self) {
        while self.drain(QUEUE) {}
    }
}

impl fmt::Write for Devices {
    /// Queues text; what does not fit is dropped.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.count < QUEUE {
                self.queue[(self.first + self.count) % QUEUE] = byte;
                self.count += 1;
            }
        }
        Ok(())
    }
}
