//! Counts tests from what test programs print.

use std::fmt;
use std::ops::AddAssign;

/// How many tests passed, failed and were skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Tally {
    /// What a line says that sums up: Rust's own `test result: ok. 3 passed; 0 failed; 1 ignored; ...`, or the end-to-end
    /// tests' `3 passed, 0 failed, 1 skipped`.
    fn of_line(line: &str) -> Option<Tally> {
        let (counts, separator, last) = match line.strip_prefix("test result: ") {
            Some(rest) => (rest.split_once(". ")?.1, ';', "ignored"),
            None => (line, ',', "skipped"),
        };
        let mut fields = counts.split(separator).map(str::trim);
        let mut field = |name: &str| {
            let (count, word) = fields.next()?.split_once(' ')?;
            if word == name { count.parse().ok() } else { None }
        };
        Some(Tally { passed: field("passed")?, failed: field("failed")?, skipped: field(last)? })
    }
}

/// Adds up a run's output line by line.
///
/// Rust knows no test that finds out that it cannot run on this machine. Ours print `skipped: <why>` and succeed; with
/// `--show-output` that is found below a heading `---- <test> stdout ----`.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    tally: Tally,
    /// What is read now is the output of a test that passed, and has not been found to be skipped.
    in_output: bool,
    /// What is read now is the output of tests that failed.
    failures: bool,
    /// Tests counted as passed by Rust that skipped themselves, since the last summary.
    skipped_themselves: u64,
}

impl Counter {
    /// Takes the next line.
    pub(crate) fn add(&mut self, line: &str) {
        let line = line.trim_end();
        if line.starts_with("---- ") && line.ends_with(" stdout ----") {
            self.in_output = !self.failures;
        } else if self.in_output && says_skipped(line) {
            self.in_output = false;
            self.skipped_themselves += 1;
        } else if line == "failures:" {
            // From here on the output is that of tests that failed.
            self.failures = true;
        } else if let Some(summary) = Tally::of_line(line) {
            let skipped = std::mem::take(&mut self.skipped_themselves).min(summary.passed);
            (self.in_output, self.failures) = (false, false);
            self.tally += summary;
            self.tally.passed -= skipped;
            self.tally.skipped += skipped;
        }
    }

    /// The sum so far.
    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }
}

/// `skipped: <why>` or `SKIPPED <test>: <why>`.
fn says_skipped(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    line.starts_with("skipped:") || line.starts_with("skipped ")
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally { passed, failed, skipped }
    }

    #[test]
    fn summaries() {
        let cases = [
            (
                "test result: ok. 19 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.02s",
                Some(tally(19, 0, 1)),
            ),
            ("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured", Some(tally(1, 2, 0))),
            ("3 passed, 1 failed, 2 skipped", Some(tally(3, 1, 2))),
            ("test a ... ok", None),
            ("3 passed, 1 broken, 2 skipped", None),
            ("passed, failed, skipped", None),
            ("", None),
        ];
        for (line, expected) in cases {
            assert_eq!(Tally::of_line(line), expected, "{line}");
        }
    }

    #[test]
    fn the_last_line_can_be_read_again() {
        let tally = tally(7, 1, 2);
        assert_eq!(Tally::of_line(&tally.to_string()), Some(tally));
    }

    #[test]
    fn tests_that_skip_themselves() {
        let output = "skipped: 14 cases need a machine of their own\n\
                      test result: ok. 5 passed; 0 failed; 14 ignored\n\
                      running 4 tests\ntest a ... ok\n\nsuccesses:\n\n\
                      ---- a stdout ----\nskipped: needs root\nskipped: really\n\n\
                      ---- b stdout ----\nhello\nSKIPPED b: no agent\n\n\
                      successes:\n    a\n    b\n    c\n\n\
                      test result: ok. 3 passed; 1 failed; 0 ignored; 0 measured\r\n\
                      test result: ok. 1 passed; 0 failed; 0 ignored\n";
        let mut counter = Counter::default();
        output.lines().for_each(|line| counter.add(line));
        assert_eq!(counter.tally(), tally(5 + 1 + 1, 1, 14 + 2));
    }
}
