//! System call filters: an OCI profile becomes a seccomp program.
//!
//! The rules of one system call are tried in the profile's order; the first whose conditions all hold decides, and the
//! profile's default action if none does. As in runc, conditions of one rule that name the same argument twice are
//! alternatives. Names that the table does not know are skipped, so that one profile serves many kernels.

mod program;
mod syscalls;

#[cfg(any(test, fuzzing))]
mod interpreter;

use std::collections::BTreeMap;

use bulkhead_protocol::oci::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};
use serde::{Deserialize, Serialize};

use crate::Error;
use syscalls::{Arch, Syscalls};

/// A program for the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filter {
    /// `SECCOMP_FILTER_FLAG_*`.
    pub(crate) flags: u32,
    /// Instructions as the kernel lays them out.
    pub(crate) program: Vec<u64>,
}

/// What happens under which conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    action: u32,
    conditions: Vec<Condition>,
}

/// A comparison of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Condition {
    index: u32,
    op: Op,
    value: u64,
    /// For `Op::MaskedEq` only.
    mask: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Eq,
    Ne,
    Gt,
    Ge,
    Lt,
    Le,
    MaskedEq,
}

/// The rules for one kind of system call entry, by the number the kernel reports.
struct Table {
    /// `AUDIT_ARCH_*`.
    token: u32,
    /// Whether arguments have 64 bits.
    wide: bool,
    /// x32 shares the token of x86_64; without it its numbers are refused.
    x32: bool,
    rules: BTreeMap<u32, Vec<Rule>>,
}

const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

const EPERM: u32 = 1;
/// The kernel takes no larger program.
const MAX_INSTRUCTIONS: usize = 4096;

/// Compiles a profile.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Filter, Error> {
    let default = action(&profile.DefaultAction, None)?;
    let rules = profile.Syscalls.iter().map(rules).collect::<Result<Vec<_>, _>>()?;
    let syscalls = Syscalls::read();
    let mut tables: Vec<Table> = Vec::new();
    for arch in architectures(&profile.Architectures)? {
        let token = arch.token();
        let at = tables.iter().position(|t| t.token == token).unwrap_or_else(|| {
            tables.push(Table { token, wide: arch.wide(), x32: false, rules: BTreeMap::new() });
            tables.len() - 1
        });
        tables[at].x32 |= arch == Arch::X32;
        for (syscall, rules) in profile.Syscalls.iter().zip(&rules) {
            for number in syscall.Names.iter().filter_map(|name| syscalls.number(arch, name)) {
                tables[at].rules.entry(number).or_default().extend_from_slice(rules);
            }
        }
    }
    let program = program::assemble(default, &tables);
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Error::Unsupported(format!(
            "a seccomp profile of {} instructions, the kernel takes {MAX_INSTRUCTIONS}",
            program.len()
        )));
    }
    Ok(Filter { flags: flags(&profile.Flags)?, program })
}

/// Those of the profile that this machine can enter system calls by. Its own is always among them.
fn architectures(list: &[String]) -> Result<Vec<Arch>, Error> {
    const FOREIGN: [&str; 17] = [
        "ARM",
        "LOONGARCH64",
        "M68K",
        "MIPS",
        "MIPS64",
        "MIPS64N32",
        "MIPSEL",
        "MIPSEL64",
        "MIPSEL64N32",
        "PARISC",
        "PARISC64",
        "PPC",
        "PPC64",
        "PPC64LE",
        "RISCV64",
        "S390",
        "S390X",
    ];
    let mut archs = vec![Arch::NATIVE];
    for text in list {
        let arch = match text.strip_prefix("SCMP_ARCH_").unwrap_or(text) {
            "NATIVE" => Arch::NATIVE,
            "X86_64" => Arch::X86_64,
            "X86" => Arch::X86,
            "X32" => Arch::X32,
            "AARCH64" => Arch::Aarch64,
            other if FOREIGN.contains(&other) => continue,
            _ => return Err(Error::Invalid(format!("unknown seccomp architecture {text:?}"))),
        };
        if arch.runs_on(Arch::NATIVE) && !archs.contains(&arch) {
            archs.push(arch);
        }
    }
    Ok(archs)
}

fn flags(list: &[String]) -> Result<u32, Error> {
    list.iter().try_fold(0, |flags, text| {
        Ok(flags
            | match text.strip_prefix("SECCOMP_FILTER_FLAG_").unwrap_or(text) {
                "TSYNC" => 1,
                "LOG" => 2,
                "SPEC_ALLOW" => 4,
                "NEW_LISTENER" | "WAIT_KILLABLE_RECV" => {
                    return Err(Error::Unsupported(format!("seccomp flag {text}")));
                }
                _ => return Err(Error::Invalid(format!("unknown seccomp flag {text:?}"))),
            })
    })
}

fn action(text: &str, errno: Option<u32>) -> Result<u32, Error> {
    let data = errno.unwrap_or(EPERM);
    if data > 0xffff {
        return Err(Error::Invalid(format!("seccomp errno {data}")));
    }
    Ok(match text.strip_prefix("SCMP_ACT_").unwrap_or(text) {
        "KILL" | "KILL_THREAD" => KILL_THREAD,
        "KILL_PROCESS" => KILL_PROCESS,
        "TRAP" => TRAP,
        "ERRNO" => ERRNO | data,
        "TRACE" => TRACE | data,
        "LOG" => LOG,
        "ALLOW" => ALLOW,
        "NOTIFY" => return Err(Error::Unsupported("seccomp action NOTIFY".to_owned())),
        _ => return Err(Error::Invalid(format!("unknown seccomp action {text:?}"))),
    })
}

/// The rules that one entry of the profile stands for.
fn rules(syscall: &LinuxSyscall) -> Result<Vec<Rule>, Error> {
    let errno = syscall.has_errnoret().then(|| syscall.errnoret());
    let action = action(&syscall.Action, errno)?;
    let conditions = syscall.Args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let mut indices: Vec<u32> = conditions.iter().map(|c| c.index).collect();
    indices.sort_unstable();
    indices.dedup();
    if indices.len() == conditions.len() {
        return Ok(vec![Rule { action, conditions }]);
    }
    Ok(conditions.into_iter().map(|c| Rule { action, conditions: vec![c] }).collect())
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition, Error> {
    let index = u32::try_from(arg.Index)
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| Error::Invalid(format!("seccomp argument index {}", arg.Index)))?;
    let op = match arg.Op.strip_prefix("SCMP_CMP_").unwrap_or(&arg.Op) {
        "EQ" => Op::Eq,
        "NE" => Op::Ne,
        "GT" => Op::Gt,
        "GE" => Op::Ge,
        "LT" => Op::Lt,
        "LE" => Op::Le,
        "MASKED_EQ" => Op::MaskedEq,
        _ => return Err(Error::Invalid(format!("unknown seccomp operator {:?}", arg.Op))),
    };
    // For MASKED_EQ the first value is the mask, the second what is compared.
    Ok(match op {
        Op::MaskedEq => Condition { index, op, value: arg.ValueTwo & arg.Value, mask: arg.Value },
        _ => Condition { index, op, value: arg.Value, mask: 0 },
    })
}

#[cfg(any(test, fuzzing))]
/// A profile of anybody: its program comes to an end for every system call.
pub(crate) fn fuzz(profile: &LinuxSeccomp) {
    let Ok(filter) = compile(profile) else { return };
    for arch in [0xc000_003e, 0x4000_0003, 0] {
        for nr in [0, 1, 59, 200, 0x4000_0000, u32::MAX] {
            for arg in [0, u64::from(u32::MAX), u64::MAX] {
                interpreter::run(&filter.program, arch, nr, [arg; 6]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{interpreter::run, *};

    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;

    fn rule(names: &[&str], action: &str, args: &[(u64, &str, u64, u64)]) -> LinuxSyscall {
        LinuxSyscall {
            Names: names.iter().map(|n| (*n).to_owned()).collect(),
            Action: action.into(),
            Args: args
                .iter()
                .map(|&(index, op, value, two)| LinuxSeccompArg {
                    Index: index,
                    Op: op.into(),
                    Value: value,
                    ValueTwo: two,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }

    fn profile(default: &str, archs: &[&str], syscalls: Vec<LinuxSyscall>) -> LinuxSeccomp {
        LinuxSeccomp {
            DefaultAction: default.into(),
            Architectures: archs.iter().map(|a| (*a).to_owned()).collect(),
            Syscalls: syscalls,
            ..Default::default()
        }
    }

    fn verdict(filter: &Filter, arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        run(&filter.program, arch, nr, args)
    }

    const READ: u32 = 0;
    const PERSONALITY: u32 = 135;

    #[test]
    fn every_action_has_its_value() {
        for (name, value) in [
            ("SCMP_ACT_KILL", 0),
            ("SCMP_ACT_KILL_THREAD", 0),
            ("SCMP_ACT_KILL_PROCESS", KILL_PROCESS),
            ("SCMP_ACT_TRAP", TRAP),
            ("SCMP_ACT_ERRNO", ERRNO | 1),
            ("SCMP_ACT_TRACE", TRACE | 1),
            ("SCMP_ACT_LOG", LOG),
            ("SCMP_ACT_ALLOW", ALLOW),
        ] {
            let filter = compile(&profile("SCMP_ACT_ALLOW", &[], vec![rule(&["read"], name, &[])])).unwrap();
            assert_eq!(verdict(&filter, X86_64, READ, [0; 6]), value, "{name}");
            assert_eq!(verdict(&filter, X86_64, 1, [0; 6]), ALLOW);
        }
        let mut read = rule(&["read"], "SCMP_ACT_ERRNO", &[]);
        read.set_errnoret(38);
        let filter = compile(&profile("SCMP_ACT_ALLOW", &[], vec![read])).unwrap();
        assert_eq!(verdict(&filter, X86_64, READ, [0; 6]), ERRNO | 38);
    }

    #[test]
    fn every_comparison_is_exact_around_its_value() {
        let value = 0x1_0000_0005u64;
        let around = [0, 5, 4, value - 1, value, value + 1, 0x2_0000_0000, 0x2_0000_0005, u64::MAX];
        for (op, holds) in [
            ("EQ", (|a, b| a == b) as fn(u64, u64) -> bool),
            ("NE", |a, b| a != b),
            ("GT", |a, b| a > b),
            ("GE", |a, b| a >= b),
            ("LT", |a, b| a < b),
            ("LE", |a, b| a <= b),
        ] {
            for index in 0..6usize {
                let args = [(index as u64, op, value, 0)];
                let op_rule = rule(&["read"], "SCMP_ACT_ALLOW", &args);
                let filter = compile(&profile("SCMP_ACT_ERRNO", &[], vec![op_rule])).unwrap();
                for arg in around {
                    let mut args = [7; 6];
                    args[index] = arg;
                    let wanted = if holds(arg, value) { ALLOW } else { ERRNO | 1 };
                    assert_eq!(verdict(&filter, X86_64, READ, args), wanted, "{arg:#x} {op} {value:#x}");
                }
            }
        }
    }

    #[test]
    fn masked_equality_compares_under_the_mask() {
        let flags = rule(&["clone"], "SCMP_ACT_ALLOW", &[(0, "SCMP_CMP_MASKED_EQ", 0x7c02_0000, 0)]);
        let filter = compile(&profile("SCMP_ACT_ERRNO", &[], vec![flags])).unwrap();
        let clone = |flags| verdict(&filter, X86_64, 56, [flags, 0, 0, 0, 0, 0]);
        assert_eq!(clone(0x11), ALLOW);
        assert_eq!(clone(0x1000_0000), ERRNO | 1);
        assert_eq!(clone(0xff_0000_0000_0011), ALLOW);
    }

    #[test]
    fn conditions_are_all_needed_and_rules_are_alternatives() {
        let both = rule(&["read"], "SCMP_ACT_ALLOW", &[(0, "EQ", 1, 0), (1, "GT", 9, 0)]);
        let other = rule(&["read"], "SCMP_ACT_LOG", &[(2, "EQ", 5, 0)]);
        let filter = compile(&profile("SCMP_ACT_ERRNO", &[], vec![both, other])).unwrap();
        let read = |args| verdict(&filter, X86_64, READ, args);
        assert_eq!(read([1, 10, 5, 0, 0, 0]), ALLOW);
        assert_eq!(read([1, 9, 5, 0, 0, 0]), LOG);
        assert_eq!(read([2, 10, 0, 0, 0, 0]), ERRNO | 1);
    }

    #[test]
    fn conditions_on_the_same_argument_are_alternatives() {
        let values = rule(
            &["personality"],
            "SCMP_ACT_ALLOW",
            &[(0, "EQ", 0, 0), (0, "EQ", 8, 0), (0, "EQ", 0xffff_ffff, 0)],
        );
        let filter = compile(&profile("SCMP_ACT_ERRNO", &[], vec![values])).unwrap();
        for (value, wanted) in [(0, ALLOW), (8, ALLOW), (0xffff_ffff, ALLOW), (4, ERRNO | 1)] {
            assert_eq!(verdict(&filter, X86_64, PERSONALITY, [value, 0, 0, 0, 0, 0]), wanted);
        }
    }

    #[test]
    fn architectures_have_numbers_of_their_own() {
        let read = || vec![rule(&["read", "no_such_call"], "SCMP_ACT_ALLOW", &[])];
        let filter = compile(&profile(
            "SCMP_ACT_ERRNO",
            &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            read(),
        ))
        .unwrap();
        for (arch, nr, wanted) in [
            (X86_64, 0, ALLOW),
            (X86_64, 3, ERRNO | 1),
            (I386, 3, ALLOW),
            (I386, 0, ERRNO | 1),
            (X86_64, 0x4000_0000, ALLOW),
            (X86_64, 0x4000_0003, ERRNO | 1),
            (0xc000_00b7, 63, KILL_PROCESS),
        ] {
            assert_eq!(verdict(&filter, arch, nr, [0; 6]), wanted, "{arch:#x} {nr:#x}");
        }
        let filter = compile(&profile("SCMP_ACT_ALLOW", &["SCMP_ARCH_S390X"], read())).unwrap();
        assert_eq!(verdict(&filter, X86_64, 0, [0; 6]), ALLOW, "the native one is always there");
        assert_eq!(verdict(&filter, X86_64, 0x4000_0000, [0; 6]), KILL_PROCESS, "x32 was not asked for");
        assert_eq!(verdict(&filter, X86_64, u32::MAX, [0; 6]), ALLOW, "-1 is not a call of x32");
        assert_eq!(verdict(&filter, I386, 3, [0; 6]), KILL_PROCESS);
    }

    #[test]
    fn narrow_arguments_are_compared_in_32_bits() {
        let all_ones = rule(&["personality"], "SCMP_ACT_ALLOW", &[(0, "EQ", u64::MAX, 0)]);
        let filter = compile(&profile("SCMP_ACT_ERRNO", &["SCMP_ARCH_X86"], vec![all_ones])).unwrap();
        assert_eq!(verdict(&filter, I386, 136, [0xffff_ffff, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(verdict(&filter, X86_64, PERSONALITY, [0xffff_ffff, 0, 0, 0, 0, 0]), ERRNO | 1);
    }

    /// Jumps have eight bits: a section far longer than that must still be searched correctly.
    #[test]
    fn a_large_profile_is_right_everywhere() {
        let names: Vec<(&str, u32)> = syscalls::Arch::X86_64.all().collect();
        let mut entries = Vec::new();
        let mut wanted = BTreeMap::new();
        for (i, (name, number)) in names.iter().enumerate() {
            let mut entry = rule(&[name], "SCMP_ACT_ERRNO", &[(1, "GE", i as u64, 0), (2, "EQ", 3, 0)]);
            let errno = u32::try_from(i % 100 + 1).unwrap();
            entry.set_errnoret(errno);
            entries.push(entry);
            wanted.insert(*number, (i as u64, errno));
        }
        entries.truncate(330);
        let archs = ["SCMP_ARCH_X86_64"];
        let filter = compile(&profile("SCMP_ACT_ALLOW", &archs, entries)).unwrap();
        for (name, number) in &names[..330] {
            let (least, errno) = wanted[number];
            assert_eq!(verdict(&filter, X86_64, *number, [0, least, 3, 0, 0, 0]), ERRNO | errno, "{name}");
            assert_eq!(verdict(&filter, X86_64, *number, [0, least, 4, 0, 0, 0]), ALLOW, "{name}");
        }
        assert_eq!(verdict(&filter, X86_64, 100_000, [0; 6]), ALLOW);
    }

    #[test]
    fn bad_profiles_are_refused() {
        let with = |rule: LinuxSyscall| {
            compile(&profile("SCMP_ACT_ALLOW", &[], vec![rule])).unwrap_err().to_string()
        };
        assert!(with(rule(&["read"], "SCMP_ACT_NOTIFY", &[])).contains("not supported"));
        assert!(with(rule(&["read"], "SCMP_ACT_SMILE", &[])).contains("unknown seccomp action"));
        assert!(with(rule(&["read"], "SCMP_ACT_ALLOW", &[(6, "EQ", 0, 0)])).contains("index 6"));
        assert!(with(rule(&["read"], "SCMP_ACT_ALLOW", &[(0, "ALMOST", 0, 0)])).contains("operator"));
        let mut read = rule(&["read"], "SCMP_ACT_ERRNO", &[]);
        read.set_errnoret(1 << 16);
        assert!(with(read).contains("errno"));
        assert!(compile(&profile("SCMP_ACT_ALLOW", &["SCMP_ARCH_PDP11"], vec![])).is_err());
        let mut odd = profile("SCMP_ACT_ALLOW", &[], vec![]);
        odd.Flags = vec!["SECCOMP_FILTER_FLAG_LOG".into(), "SECCOMP_FILTER_FLAG_SPEC_ALLOW".into()];
        assert_eq!(compile(&odd).unwrap().flags, 6);
        odd.Flags.push("SECCOMP_FILTER_FLAG_ODD".into());
        assert!(compile(&odd).is_err());
    }

    /// The kernel itself takes the program and acts on it. It binds one thread only.
    #[test]
    fn the_kernel_accepts_a_program() {
        let mut blocked = rule(&["sched_getscheduler"], "SCMP_ACT_ERRNO", &[(0, "EQ", 0, 0)]);
        blocked.set_errnoret(42);
        let archs = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
        let filter = compile(&profile("SCMP_ACT_ALLOW", &archs, vec![blocked])).unwrap();
        let errno = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            crate::sys::seccomp(filter.flags, &filter.program).unwrap();
            crate::sys::test_sched_getscheduler().unwrap_err().raw_os_error()
        });
        assert_eq!(errno.join().unwrap(), Some(42));
    }
}
