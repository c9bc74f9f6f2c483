//! The devices of a Linux guest: serial port, switch, and the port of its init.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use amx_guest::area::SERIAL_PORT;
use amx_guest::report::{REPORT_PORT, Wish};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::serial::{self, NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::errno;

use super::acpi::{RESET_PORT, RESET_VALUE, SERIAL_GSI, SLEEP_PORT, SLEEP_TYPE_OFF};
use super::log::Log;
use crate::bus::{Bus, BusError};
use crate::vm::Vm;

/// No more is kept of what the guest writes to its serial port.
const CONSOLE_BYTES: usize = 1 << 20;
/// SLP_EN of the sleep control register (ACPI 6.5 §4.8.3.7); the type is in the three bits below.
const SLEEP_ENABLE: u8 = 1 << 5;

/// How a guest has ended its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switched {
    /// It has switched it off.
    Off,
    /// It has reset it.
    Reset,
}

/// The devices, as all vCPU threads see them.
pub struct Devices {
    serial: Mutex<SerialPort>,
    log: Mutex<Log>,
    wish: AtomicU8,
    switched: AtomicU8,
}

type SerialPort = Serial<Line, NoEvents, Text>;

const RUNS: u8 = 0;
const OFF: u8 = 1;
const RESET: u8 = 2;

impl Devices {
    /// As after the machine's reset.
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        Self::with_serial(Serial::new(Line::of(vm), Text::default()))
    }

    /// In the state that they had elsewhere. The registers of the serial port come first; the log
    /// begins with nothing but the piece of a line.
    ///
    /// # Errors
    ///
    /// The state is not one of these devices, or an interrupt cannot be raised.
    pub fn restore(vm: &Vm, state: &State) -> Result<Self, DevicesError> {
        let serial = SerialState {
            baud_divisor_low: state.serial.baud_divisor_low,
            baud_divisor_high: state.serial.baud_divisor_high,
            interrupt_enable: state.serial.interrupt_enable,
            interrupt_identification: state.serial.interrupt_identification,
            line_control: state.serial.line_control,
            line_status: state.serial.line_status,
            modem_control: state.serial.modem_control,
            modem_status: state.serial.modem_status,
            scratch: state.serial.scratch,
            in_buffer: state.serial.in_buffer.clone(),
        };
        let serial = Serial::from_state(&serial, Line::of(vm), NoEvents, Text::default())
            .map_err(DevicesError::Serial)?;
        let this = Self::with_serial(serial);
        this.lock_log().write(&state.line);
        this.wish.store(state.wish, Ordering::SeqCst);
        Ok(this)
    }

    fn with_serial(serial: SerialPort) -> Self {
        Self {
            serial: Mutex::new(serial),
            log: Mutex::default(),
            wish: AtomicU8::new(Wish::GoOn as u8),
            switched: AtomicU8::new(RUNS),
        }
    }

    /// Their state, of a VM that does not run.
    #[must_use]
    pub fn state(&self) -> State {
        let serial = self.lock_serial().state();
        State {
            serial: SerialRegisters {
                baud_divisor_low: serial.baud_divisor_low,
                baud_divisor_high: serial.baud_divisor_high,
                interrupt_enable: serial.interrupt_enable,
                interrupt_identification: serial.interrupt_identification,
                line_control: serial.line_control,
                line_status: serial.line_status,
                modem_control: serial.modem_control,
                modem_status: serial.modem_status,
                scratch: serial.scratch,
                in_buffer: serial.in_buffer,
            },
            line: self.lock_log().partial.clone(),
            wish: self.wish.load(Ordering::SeqCst),
        }
    }

    /// What the guest has written to its serial port, up to 1 MiB, without what was taken.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.lock_serial().writer().0).into_owned()
    }

    /// Takes what the guest has written to its serial port since it was taken last.
    #[must_use]
    pub fn take_console(&self) -> Vec<u8> {
        std::mem::take(&mut self.lock_serial().writer_mut().0)
    }

    /// What the guest's init has reported.
    #[must_use]
    pub fn log(&self) -> Log {
        self.lock_log().clone()
    }

    /// Tells the guest's init what to do; it asks after each line.
    pub fn wish(&self, wish: Wish) {
        self.wish.store(wish as u8, Ordering::SeqCst);
    }

    /// How the guest has ended its machine, if it has.
    #[must_use]
    pub fn switched(&self) -> Option<Switched> {
        match self.switched.load(Ordering::SeqCst) {
            OFF => Some(Switched::Off),
            RESET => Some(Switched::Reset),
            _ => None,
        }
    }

    fn lock_serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The register of the serial port that is at `port`.
fn serial_register(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_PORT)?;
    u8::try_from(offset).ok().filter(|offset| *offset < 8)
}

impl Bus for Devices {
    /// What no device answers is lost, as on a PC.
    fn port_write(&self, vcpu: u8, port: u16, data: &[u8]) -> Result<(), BusError> {
        if let Some(register) = serial_register(port) {
            let mut serial = self.lock_serial();
            for byte in data {
                serial
                    .write(register, *byte)
                    .map_err(|_| BusError::Serial { vcpu })?;
            }
        } else if port == REPORT_PORT {
            self.lock_log().write(data);
        } else if port == SLEEP_PORT && data == [SLEEP_ENABLE | SLEEP_TYPE_OFF << 2] {
            self.switched.store(OFF, Ordering::SeqCst);
        } else if port == RESET_PORT && data == [RESET_VALUE] {
            self.switched.store(RESET, Ordering::SeqCst);
        }
        Ok(())
    }

    fn port_read(&self, _vcpu: u8, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(register) = serial_register(port) {
            data.fill_with(|| self.lock_serial().read(register));
        } else if port == REPORT_PORT {
            data.fill(self.wish.load(Ordering::SeqCst));
        } else if port == RESET_PORT {
            // The keyboard controller takes commands.
            data.fill(0);
        }
    }

    fn stops(&self, _vcpu: u8) -> bool {
        self.switched().is_some()
    }
}

/// What the guest has written; only the beginning where it is very much.
#[derive(Default)]
struct Text(Vec<u8>);

impl io::Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CONSOLE_BYTES.saturating_sub(self.0.len());
        self.0.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An interrupt line of the in-kernel controllers. KVM_IRQ_LINE has taken effect when it returns, so
/// no interrupt is on its way when the state of a stopped VM is read. An irqfd's may be.
struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Line {
    fn of(vm: &Vm) -> Self {
        Self {
            vm: Arc::clone(&vm.fd),
            gsi: SERIAL_GSI,
        }
    }
}

impl Trigger for Line {
    type E = errno::Error;

    fn trigger(&self) -> Result<(), errno::Error> {
        self.vm.set_irq_line(self.gsi, true)?;
        self.vm.set_irq_line(self.gsi, false)
    }
}

/// The state of the devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    serial: SerialRegisters,
    /// What the guest has written of a line.
    line: Vec<u8>,
    /// What its init was asked for, as it reads it.
    wish: u8,
}

/// The registers of the serial port, as vm-superio has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SerialRegisters {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// The devices could not be restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DevicesError {
    /// The serial port's state is not valid, or its interrupt was refused.
    #[error("the serial port: {0}")]
    Serial(serial::Error<errno::Error>),
}
