//! A stream of known bytes, and an order-sensitive digest that is cheap enough for an emulated processor.

use std::{
    fmt,
    io::{self, Read, Write},
};

/// Length and digest of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Digest {
    len: u64,
    hash: u64,
}

impl Digest {
    /// Reads to the end.
    pub(crate) fn of(stream: &mut impl Read) -> io::Result<Self> {
        let mut digest = Self::default();
        let mut chunk = vec![0; 64 * 1024];
        loop {
            // Full chunks, so that the words do not depend on how the stream was cut.
            let mut len = 0;
            while len < chunk.len() {
                match stream.read(&mut chunk[len..])? {
                    0 => break,
                    read => len += read,
                }
            }
            if len == 0 {
                return Ok(digest);
            }
            digest.add(&chunk[..len]);
        }
    }

    /// The digest of [`pattern`].
    #[allow(dead_code, reason = "the guest has no use for it")]
    pub(crate) fn of_pattern(len: u64) -> Self {
        struct Sum(Digest);
        impl Write for Sum {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.add(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut sum = Sum(Self::default());
        pattern(len, &mut sum).expect("adding up does not fail");
        sum.0
    }

    fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            self.hash =
                (self.hash.rotate_left(5) ^ u64::from_le_bytes(padded)).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        self.len += bytes.len() as u64;
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:016x}", self.len, self.hash)
    }
}

/// Writes `len` bytes of which no two chunks are equal.
pub(crate) fn pattern(len: u64, mut to: impl Write) -> io::Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    let (mut left, mut word) = (len, 0u64);
    while left > 0 {
        for bytes in chunk.chunks_exact_mut(8) {
            word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let now = left.min(64 * 1024);
        to.write_all(&chunk[..usize::try_from(now).map_err(io::Error::other)?])?;
        left -= now;
    }
    to.flush()
}
