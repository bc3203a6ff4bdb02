//! Messages of this program and of the libraries it is made of, to stderr.
//!
//! A hostile guest can provoke warnings, so there is a limit to them: [`BURST`] messages in [`PERIOD`], and a count of the
//! rest.

use std::{
    io::Write,
    sync::Mutex,
    time::{Duration, Instant},
};

use log::{LevelFilter, Log, Metadata, Record};

const BURST: u32 = 50;
const PERIOD: Duration = Duration::from_secs(10);

/// Starts logging warnings and errors.
pub(crate) fn start() {
    // Fails only when it was started before.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

static LOGGER: Stderr = Stderr(Mutex::new(Budget { since: None, written: 0, dropped: 0 }));

struct Stderr(Mutex<Budget>);

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let Some(dropped) = self.0.lock().ok().and_then(|mut budget| budget.spend(Instant::now())) else {
            return;
        };
        let mut stderr = std::io::stderr().lock();
        // A parent that does not read our messages is no reason to stop.
        if dropped > 0 {
            let _ = writeln!(stderr, "bulkhead-backend: {dropped} messages left out");
        }
        let level = record.level().as_str().to_ascii_lowercase();
        let _ = writeln!(stderr, "bulkhead-backend: {level}: {}", record.args());
    }

    fn flush(&self) {}
}

struct Budget {
    since: Option<Instant>,
    written: u32,
    dropped: u64,
}

impl Budget {
    /// Whether a message may be written, and how many were dropped since the last one.
    fn spend(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            self.since = Some(now);
            self.written = 0;
        }
        if self.written == BURST {
            self.dropped += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut budget = Budget { since: None, written: 0, dropped: 0 };
        let start = Instant::now();
        let written = (0..1000).filter(|_| budget.spend(start).is_some()).count();
        assert_eq!(written, BURST as usize);
        assert_eq!(budget.spend(start + PERIOD), Some(950));
        assert_eq!(budget.spend(start + PERIOD), Some(0));
    }
}
