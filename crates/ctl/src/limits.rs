//! `-m` and `--cpus`: what the container may use, and how large its VM is made for that.

use std::str::FromStr;

use anyhow::{Context as _, Error, Result, ensure};

/// The guest's kernel, its page tables, the agent and its initramfs live beside the container.
const OVERHEAD_MIB: u64 = 128;
const MIB: u64 = 1 << 20;
/// Docker's minimum, below which nothing starts.
const MIN_MEMORY: u64 = 6 * MIB;
/// The period that quotas are counted in, in microseconds.
const PERIOD: u64 = 100_000;
/// More than QEMU's default machine takes.
const MAX_CPUS: f64 = 255.0;

/// A container's memory limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// The limit in bytes.
    pub(crate) bytes: u64,
}

impl Memory {
    /// Memory of a VM in which the container can really reach its limit.
    pub(crate) fn vm_mib(self) -> u64 {
        self.bytes.div_ceil(MIB) + OVERHEAD_MIB
    }
}

impl FromStr for Memory {
    type Err = Error;

    fn from_str(text: &str) -> Result<Memory> {
        let lower = text.to_ascii_lowercase();
        let lower = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
        let (digits, shift) = match lower.as_bytes().last() {
            Some(b'k') => (&lower[..lower.len() - 1], 10),
            Some(b'm') => (&lower[..lower.len() - 1], 20),
            Some(b'g') => (&lower[..lower.len() - 1], 30),
            Some(b't') => (&lower[..lower.len() - 1], 40),
            _ => (lower, 0),
        };
        let number: u64 =
            digits.parse().ok().context("a size is a number with an optional suffix: 512m, 1g")?;
        let bytes =
            number.checked_mul(1 << shift).filter(|bytes| *bytes <= 1 << 44).context("more than 16 TiB")?;
        ensure!(bytes >= MIN_MEMORY, "the minimum is {} MiB", MIN_MEMORY / MIB);
        Ok(Memory { bytes })
    }
}

/// A container's share of CPU time, in CPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cpus(f64);

impl Cpus {
    /// Virtual CPUs of the VM.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and 255 by construction"
    )]
    pub(crate) fn vcpus(self) -> u32 {
        self.0.ceil() as u32
    }

    /// Microseconds of CPU time in each [`Cpus::period`].
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "below 2^53 by construction"
    )]
    pub(crate) fn quota(self) -> i64 {
        (self.0 * PERIOD as f64).round() as i64
    }

    /// The period in microseconds.
    pub(crate) fn period(self) -> u64 {
        PERIOD
    }
}

impl FromStr for Cpus {
    type Err = Error;

    fn from_str(text: &str) -> Result<Cpus> {
        let cpus: f64 = text.parse().ok().context("a number of CPUs is 2 or 0.5")?;
        // The kernel takes no quota under a millisecond.
        ensure!((0.01..=MAX_CPUS).contains(&cpus), "between 0.01 and {MAX_CPUS} CPUs are possible");
        Ok(Cpus(cpus))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512m", 512 << 20),
            ("1g", 1 << 30),
            ("1GiB", 1 << 30),
            ("64MB", 64 << 20),
            ("8388608", 8 << 20),
            ("8192k", 8 << 20),
        ] {
            assert_eq!(text.parse::<Memory>().unwrap().bytes, bytes, "{text}");
        }
        for text in ["", "m", "-1g", "1.5g", "1x", "5m", "99999999t", "18446744073709551616"] {
            assert!(text.parse::<Memory>().is_err(), "{text}");
        }
        assert_eq!(Memory { bytes: (64 << 20) + 1 }.vm_mib(), 65 + OVERHEAD_MIB);
    }

    #[test]
    fn cpus() {
        let cpus: Cpus = "1.5".parse().unwrap();
        assert_eq!((cpus.vcpus(), cpus.quota(), cpus.period()), (2, 150_000, 100_000));
        assert_eq!("0.25".parse::<Cpus>().unwrap().vcpus(), 1);
        assert_eq!("2".parse::<Cpus>().unwrap().vcpus(), 2);
        for text in ["", "0", "-1", "NaN", "inf", "256", "x"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
    }
}
