//! What answers the guest's port and memory accesses.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use amx_guest::area::{DOORBELL_PORT, FAULT_PORT, SERIAL_PORT};
use thiserror::Error;
use vm_superio::{Serial, Trigger};

/// Devices, as all vCPU threads see them.
pub trait Bus: Sync {
    /// vCPU `vcpu` wrote `data` to port `port`. A string write has all its bytes.
    ///
    /// # Errors
    ///
    /// The guest did something after which it cannot go on.
    fn port_write(&self, vcpu: u8, port: u16, data: &[u8]) -> Result<(), BusError>;

    /// vCPU `vcpu` reads port `port`. Whoever does not answer leaves ones.
    fn port_read(&self, _vcpu: u8, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// vCPU `vcpu` wrote `data` to a guest physical address without memory.
    fn memory_write(&self, _vcpu: u8, _address: u64, _data: &[u8]) {}

    /// Whether the whole VM is to be stopped; asked after every exit of every vCPU.
    fn stops(&self, _vcpu: u8) -> bool {
        false
    }

    /// vCPU `vcpu` reads a guest physical address without memory.
    fn memory_read(&self, _vcpu: u8, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
}

/// A serial port, and the port where a payload reports an exception that nobody expected.
#[derive(Default)]
pub struct Console {
    serial: Mutex<Option<SerialPort>>,
}

type SerialPort = Serial<NoInterrupt, vm_superio::serial::NoEvents, Vec<u8>>;

impl Console {
    /// What the guest has written to the serial port.
    #[must_use]
    pub fn text(&self) -> String {
        let serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = serial.as_ref().map(|serial| serial.writer().as_slice());
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    }
}

impl Bus for Console {
    fn port_write(&self, vcpu: u8, port: u16, data: &[u8]) -> Result<(), BusError> {
        if port == FAULT_PORT {
            let vector = data.first().copied().unwrap_or_default();
            return Err(BusError::GuestFault { vcpu, vector });
        }
        let register = port
            .checked_sub(SERIAL_PORT)
            .and_then(|o| u8::try_from(o).ok());
        let Some(register) = register.filter(|register| *register < 8) else {
            return Err(BusError::NoDevice { vcpu, port });
        };
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        let serial = serial.get_or_insert_with(|| Serial::new(NoInterrupt, Vec::new()));
        for byte in data {
            serial
                .write(register, *byte)
                .map_err(|_| BusError::Serial { vcpu })?;
        }
        Ok(())
    }
}

/// A console, and a doorbell at which the VM stops.
#[derive(Default)]
pub struct Doorbell {
    console: Console,
    rung: AtomicBool,
}

impl Bus for Doorbell {
    fn port_write(&self, vcpu: u8, port: u16, data: &[u8]) -> Result<(), BusError> {
        if port == DOORBELL_PORT {
            self.rung.store(true, Ordering::SeqCst);
            return Ok(());
        }
        self.console.port_write(vcpu, port, data)
    }

    fn stops(&self, _vcpu: u8) -> bool {
        self.rung.load(Ordering::SeqCst)
    }
}

/// The payloads run without an interrupt controller.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        Ok(())
    }
}

/// The guest did something after which it cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BusError {
    /// An exception that the payload does not raise on purpose.
    #[error("vCPU {vcpu} took exception {vector}, which its payload does not raise on purpose")]
    GuestFault {
        /// The vCPU.
        vcpu: u8,
        /// The exception's number.
        vector: u8,
    },
    /// Nothing answers at this port.
    #[error("vCPU {vcpu} wrote to port {port:#x}, where there is no device")]
    NoDevice {
        /// The vCPU.
        vcpu: u8,
        /// The port.
        port: u16,
    },
    /// The serial port refused a byte.
    #[error("the serial port refused a byte of vCPU {vcpu}")]
    Serial {
        /// The vCPU.
        vcpu: u8,
    },
}
