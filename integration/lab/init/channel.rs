//! The emulator's channel: registers and a window, shared by all threads of the init.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::sys::Physical;
use crate::wire::{self, LARGEST_PAYLOAD, WINDOW_HALF};

const MAGIC: usize = 0x00;
const SEND: usize = 0x04;
const RECEIVE: usize = 0x08;
const POLL: usize = 0x0c;
const SAVE: usize = 0x10;

struct Device {
    registers: Physical,
    window: Physical,
    /// What came in and was not taken yet lies at `next..end` of the upper half.
    next: usize,
    end: usize,
}

/// The way to the host program.
pub struct Channel(Mutex<Device>);

impl Channel {
    pub fn open() -> io::Result<Self> {
        let memory = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/mem")?;
        let registers = Physical::map(memory.as_fd(), wire::REGISTERS, 4096)?;
        let window = Physical::map(memory.as_fd(), wire::WINDOW, 2 * WINDOW_HALF)?;
        if registers.read_register(MAGIC) != wire::MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "this machine has no channel of the lab",
            ));
        }
        Ok(Self(Mutex::new(Device {
            registers,
            window,
            next: 0,
            end: 0,
        })))
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The emulator saves its state here and ends, if this run is for that; a resumed lab comes back from this call.
    pub fn save_point(&self) {
        self.device().registers.write_register(SAVE, 1);
    }

    /// Sends a payload of any length, in as many frames of this kind as it takes; an empty one is one frame.
    pub fn send(&self, kind: u32, payload: &[u8]) -> io::Result<()> {
        if payload.is_empty() {
            self.send_frame(kind, payload);
        }
        for piece in payload.chunks(LARGEST_PAYLOAD) {
            self.send_frame(kind, piece);
        }
        Ok(())
    }

    fn send_frame(&self, kind: u32, piece: &[u8]) {
        let device = self.device();
        let header = wire::frame_header(kind, piece.len() as u32);
        device.window.copy_in(0, &header);
        device.window.copy_in(header.len(), piece);
        device
            .registers
            .write_register(SEND, (header.len() + piece.len()) as u32);
    }

    /// Whether a read would not wait. Waiting stops the whole machine, so who has better things to do asks first.
    pub fn has_input(&self) -> bool {
        let device = self.device();
        device.next < device.end || device.registers.read_register(POLL) != 0
    }
}

impl Read for &Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut device = self.device();
        if buffer.is_empty() {
            return Ok(0);
        }
        if device.next == device.end {
            device.registers.write_register(RECEIVE, WINDOW_HALF as u32);
            device.next = 0;
            device.end = device.registers.read_register(RECEIVE) as usize;
        }
        let count = buffer.len().min(device.end - device.next);
        device
            .window
            .copy_out(WINDOW_HALF + device.next, &mut buffer[..count]);
        device.next += count;
        Ok(count)
    }
}
