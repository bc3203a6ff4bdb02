//! The numbers of the system calls.

use std::collections::HashMap;

/// How a system call is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arch {
    X86_64,
    X86,
    /// 32-bit pointers in 64-bit mode: the token of x86_64, numbers with bit 30.
    X32,
    Aarch64,
}

/// A line a system call: its name and a column for each architecture. Text is smaller in the guest agent than a table
/// of pointers.
const TABLE: &str = include_str!("syscalls.txt");

/// The lines by name.
pub(super) struct Syscalls(HashMap<&'static str, &'static str>);

impl Syscalls {
    /// Reads the table; cheap once a profile, not once a name.
    pub(super) fn read() -> Syscalls {
        Syscalls(lines().filter_map(|line| Some((line.split_once(' ')?.0, line))).collect())
    }

    /// The number that the kernel reports for `name` on `arch`.
    pub(super) fn number(&self, arch: Arch, name: &str) -> Option<u32> {
        arch.column(self.0.get(name)?)
    }
}

fn lines() -> impl Iterator<Item = &'static str> {
    TABLE.lines().filter(|line| !line.starts_with('#'))
}

/// Set in every number of x32.
pub(super) const X32_BIT: u32 = 0x4000_0000;

impl Arch {
    /// That of this program.
    #[cfg(target_arch = "x86_64")]
    pub(super) const NATIVE: Arch = Arch::X86_64;
    /// That of this program.
    #[cfg(target_arch = "aarch64")]
    pub(super) const NATIVE: Arch = Arch::Aarch64;

    /// `AUDIT_ARCH_*`, as the kernel reports it to a filter.
    pub(super) fn token(self) -> u32 {
        match self {
            Arch::X86_64 | Arch::X32 => 0xc000_003e,
            Arch::X86 => 0x4000_0003,
            Arch::Aarch64 => 0xc000_00b7,
        }
    }

    /// Whether arguments have 64 bits.
    pub(super) fn wide(self) -> bool {
        self != Arch::X86
    }

    /// Whether a machine whose own is `native` can enter calls this way.
    pub(super) fn runs_on(self, native: Arch) -> bool {
        (self == Arch::Aarch64) == (native == Arch::Aarch64)
    }

    fn column(self, line: &str) -> Option<u32> {
        let column = match self {
            Arch::X86_64 => 1,
            Arch::X86 => 2,
            Arch::X32 => 3,
            Arch::Aarch64 => 4,
        };
        let number: u32 = line.split(' ').nth(column)?.parse().ok()?;
        Some(if self == Arch::X32 { number | X32_BIT } else { number })
    }

    /// Every call of this architecture.
    #[cfg(test)]
    pub(super) fn all(self) -> impl Iterator<Item = (&'static str, u32)> {
        lines().filter_map(move |line| Some((line.split(' ').next()?, self.column(line)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_agree_with_libc() {
        let table = Syscalls::read();
        for (name, number) in [
            ("read", libc::SYS_read),
            ("openat2", libc::SYS_openat2),
            ("clone3", libc::SYS_clone3),
            ("mount_setattr", libc::SYS_mount_setattr),
            ("seccomp", libc::SYS_seccomp),
        ] {
            assert_eq!(table.number(Arch::NATIVE, name).map(i64::from), Some(number), "{name}");
        }
        assert_eq!(table.number(Arch::X86, "socketcall"), Some(102));
        assert_eq!(table.number(Arch::X86_64, "socketcall"), None);
        assert_eq!(table.number(Arch::X32, "execve"), Some(X32_BIT | 520));
        assert_eq!(table.number(Arch::Aarch64, "execve"), Some(221));
        assert_eq!(table.number(Arch::X86_64, "rea"), None);
        assert_eq!(table.number(Arch::X86_64, ""), None);
    }

    #[test]
    fn each_line_is_whole_and_each_number_is_unique() {
        for line in lines() {
            assert_eq!(line.split(' ').count(), 5, "{line}");
        }
        for arch in [Arch::X86_64, Arch::X86, Arch::X32, Arch::Aarch64] {
            let mut numbers: Vec<u32> = arch.all().map(|(_, number)| number).collect();
            assert!(numbers.len() > 300);
            numbers.sort_unstable();
            let count = numbers.len();
            numbers.dedup();
            assert_eq!(numbers.len(), count, "{arch:?}");
        }
    }
}
