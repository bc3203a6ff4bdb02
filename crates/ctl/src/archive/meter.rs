//! How much of an image is read, and whether somebody still wants it.

use std::{
    io::{self, Read},
    sync::atomic::{AtomicBool, Ordering},
};

/// What one image may unpack to.
pub(crate) const MAX_UNPACKED: u64 = 64 << 30;

/// A reader that ends with an error when more comes than an image may have, or when somebody stops it.
pub(crate) struct Metered<'a, R> {
    /// What is read.
    pub(crate) reader: R,
    /// Bytes that may still come.
    pub(crate) budget: &'a mut u64,
    /// Set by who does not want more.
    pub(crate) stop: &'a AtomicBool,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped"));
        }
        let read = self.reader.read(buffer)?;
        match self.budget.checked_sub(read as u64) {
            Some(left) => *self.budget = left,
            None => {
                return Err(io::Error::other(format!(
                    "the image is larger than {} GiB unpacked",
                    MAX_UNPACKED >> 30
                )));
            }
        }
        Ok(read)
    }
}
