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
    /// What a line of output says: Rust's own `test result: ok. 3 passed; 0 failed; 1 ignored; ...`, the end-to-end tests'
    /// `3 passed, 0 failed, 1 skipped`, and `skipped: <why>`, which a unit test prints that cannot run on this machine (and
    /// that Rust counts as passed).
    pub(crate) fn of_line(line: &str) -> Option<Tally> {
        if line.starts_with("skipped: ") {
            return Some(Tally { skipped: 1, ..Tally::default() });
        }
        let counts = match line.strip_prefix("test result: ") {
            Some(rest) => rest.split_once(". ")?.1,
            None => line,
        };
        let mut fields = counts.split([';', ',']).map(str::trim);
        let mut field = |name: &str| {
            let (count, word) = fields.next()?.split_once(' ')?;
            if word == name { count.parse().ok() } else { None }
        };
        let (passed, failed) = (field("passed")?, field("failed")?);
        let last = if counts.contains(';') { "ignored" } else { "skipped" };
        Some(Tally { passed, failed, skipped: field(last)? })
    }

    /// Takes the unit tests that skipped themselves out of those that passed.
    pub(crate) fn without_skipped_from_passed(self) -> Tally {
        Tally { passed: self.passed.saturating_sub(self.skipped), ..self }
    }
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

    #[test]
    fn lines() {
        let tally = |passed, failed, skipped| Some(Tally { passed, failed, skipped });
        let cases = [
            (
                "test result: ok. 19 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.02s",
                tally(19, 0, 1),
            ),
            (
                "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
                tally(1, 2, 0),
            ),
            ("3 passed, 1 failed, 2 skipped", tally(3, 1, 2)),
            ("skipped: no /dev/kvm", tally(0, 0, 1)),
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
        let tally = Tally { passed: 7, failed: 1, skipped: 2 };
        assert_eq!(Tally::of_line(&tally.to_string()), Some(tally));
    }
}
