//! Which devices a container may use: cgroup v2 has no file for that, but asks a BPF program.
//!
//! Everything is refused unless a rule allows it. Rules are looked at last to first, and each permission (read, write,
//! make a node) is decided by the last rule that speaks about it, as the device cgroup of version 1 did:
//!
//! ```text
//! asked := the permissions asked for
//! for each rule, last first:  does it fit type, major, minor? ─no─► next
//!     allow: asked &= !rule; asked == 0? ─► allowed
//!     deny:  asked & rule != 0?          ─► refused
//! refused
//! ```
//!
//! A privileged container gets no more than others: Kata's hosts strip the rule `a *:* rwm` that would say so, and the
//! rest of its spec (all capabilities, nothing masked) does not say it, since a container that can reach every device
//! reaches the guest's own disks (CVE-2020-2023); the devices it is meant to have are listed, or allowed by a rule.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bulkhead_protocol::oci::{LinuxDevice, LinuxDeviceCgroup};

use crate::{Error, sys};

/// A program attached to a cgroup.
#[derive(Debug)]
pub(crate) struct DeviceFilter(OwnedFd);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `None` is both.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

// linux/bpf.h
const BLOCK: u32 = 1;
const CHAR: u32 = 2;
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// Allowed in every container, whatever its spec says: any node may be made (using it is another matter), and the
/// devices that the OCI specification promises.
const DEFAULTS: [Rule; 10] = [
    Rule { allow: true, kind: Some(CHAR), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(BLOCK), major: None, minor: None, access: MKNOD },
    default(1, Some(3)),
    default(1, Some(5)),
    default(1, Some(7)),
    default(1, Some(8)),
    default(1, Some(9)),
    default(5, Some(0)),
    // /dev/ptmx and the terminals behind it.
    default(5, Some(2)),
    default(136, None),
];

const fn default(major: u32, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(CHAR), major: Some(major), minor, access: ALL }
}

impl DeviceFilter {
    /// Compiles the rules and attaches them to `cgroup`, in place of `old`. A spec without rules (Kata's hosts strip
    /// them) gets the nodes that it lists itself.
    pub(crate) fn attach(
        cgroup: BorrowedFd<'_>,
        rules: &[LinuxDeviceCgroup],
        nodes: &[LinuxDevice],
        old: Option<&DeviceFilter>,
    ) -> Result<DeviceFilter, Error> {
        let program = compile(&plan(rules, nodes)?);
        let failed = |what| Error::io::<io::Error>(format!("{what} the device filter"));
        let filter = DeviceFilter(sys::load_device_program(&program).map_err(failed("loading"))?);
        // All attached programs must agree, so that there is no moment without one.
        sys::attach_device_program(cgroup, filter.0.as_fd()).map_err(failed("attaching"))?;
        if let Some(old) = old {
            sys::detach_device_program(cgroup, old.0.as_fd()).map_err(failed("replacing"))?;
        }
        Ok(filter)
    }
}

/// Checks that the rules can be compiled.
pub(crate) fn check(rules: &[LinuxDeviceCgroup]) -> Result<(), Error> {
    plan(rules, &[]).map(drop)
}

fn plan(rules: &[LinuxDeviceCgroup], nodes: &[LinuxDevice]) -> Result<Vec<Rule>, Error> {
    let mut plan = rules.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    if rules.is_empty() {
        plan.extend(nodes.iter().filter_map(node));
    }
    plan.extend(DEFAULTS);
    Ok(plan)
}

fn rule(rule: &LinuxDeviceCgroup) -> Result<Rule, Error> {
    let kind = match rule.Type.as_str() {
        "" | "a" => None,
        "c" | "u" => Some(CHAR),
        "b" => Some(BLOCK),
        other => return Err(Error::Invalid(format!("device rule: unknown type {other:?}"))),
    };
    let access = rule.Access.chars().try_fold(0, |bits, c| match c {
        'm' => Ok(bits | MKNOD),
        'r' => Ok(bits | READ),
        'w' => Ok(bits | WRITE),
        other => Err(Error::Invalid(format!("device rule: unknown access {other:?}"))),
    })?;
    // The wire does not tell 0 from absent. No device has major 0, so that means any; a minor of 0 is a number when
    // the major is one, which is the narrower reading.
    let major = u32::try_from(rule.Major).ok().filter(|m| *m != 0);
    let minor = u32::try_from(rule.Minor).ok().filter(|m| *m != 0 || major.is_some());
    let (major, minor) = if kind.is_none() { (None, None) } else { (major, minor) };
    Ok(Rule { allow: rule.Allow, kind, major, minor, access: if access == 0 { ALL } else { access } })
}

fn node(device: &LinuxDevice) -> Option<Rule> {
    let kind = match device.Type.as_str() {
        "c" | "u" => CHAR,
        "b" => BLOCK,
        _ => return None,
    };
    let (major, minor) = (u32::try_from(device.Major).ok(), u32::try_from(device.Minor).ok());
    Some(Rule { allow: true, kind: Some(kind), major: Some(major?), minor: Some(minor?), access: ALL })
}

// Instructions: opcode, then destination and source register, 16-bit offset, 32-bit immediate.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const ASKED: u8 = 2;
const KIND: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn instruction(code: u8, to: u8, from: u8, offset: i16, value: u32) -> u64 {
    u64::from(code)
        | u64::from(to) << 8
        | u64::from(from) << 12
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(value) << 32
}

fn compile(rules: &[Rule]) -> Vec<u64> {
    // struct bpf_cgroup_dev_ctx { access_type: access << 16 | type, major, minor }
    let mut program = vec![
        instruction(LOAD_WORD, ASKED, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, KIND, ASKED, 0, 0),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ASKED, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let decision = decision(rule);
        let tests: Vec<(u8, u32)> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        let length = i16::try_from(tests.len() + decision.len()).unwrap_or(i16::MAX);
        for (done, (register, value)) in (1i16..).zip(&tests) {
            program.push(instruction(JUMP_NOT_EQUAL, *register, 0, length - done, *value));
        }
        program.extend(decision);
    }
    program.extend(exit(0));
    program
}

fn exit(result: u32) -> [u64; 2] {
    [instruction(MOVE, RESULT, 0, 0, result), instruction(EXIT, 0, 0, 0, 0)]
}

/// What a rule that fits does; falls through when it decides nothing.
fn decision(rule: &Rule) -> Vec<u64> {
    let mut code = if rule.allow {
        vec![instruction(AND, ASKED, 0, 0, !rule.access & ALL), instruction(JUMP_NOT_EQUAL, ASKED, 0, 2, 0)]
    } else {
        vec![
            instruction(MOVE_REGISTER, SCRATCH, ASKED, 0, 0),
            instruction(AND, SCRATCH, 0, 0, rule.access),
            instruction(JUMP_EQUAL, SCRATCH, 0, 2, 0),
        ]
    };
    code.extend(exit(u32::from(rule.allow)));
    code
}

#[cfg(any(test, fuzzing))]
/// Rules of anybody: no jump leads out of the program.
pub(crate) fn fuzz(rules: &[LinuxDeviceCgroup], nodes: &[LinuxDevice]) {
    let Ok(plan) = plan(rules, nodes) else { return };
    let program = compile(&plan);
    for (at, [code, _, low, high, ..]) in program.iter().map(|raw| raw.to_le_bytes()).enumerate() {
        let offset = usize::from(u16::from_le_bytes([low, high]));
        assert!(code & 7 != 5 || code == EXIT || at + 1 + offset < program.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn run(program: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut pc = 0;
        loop {
            let raw = program[pc];
            pc += 1;
            let [code, registers_named, low, high, ..] = raw.to_le_bytes();
            let (to, from) = (usize::from(registers_named & 0xf), usize::from(registers_named >> 4));
            let (offset, value) = (u16::from_le_bytes([low, high]), raw >> 32);
            match code {
                LOAD_WORD => registers[to] = u64::from(context[usize::from(offset) / 4]),
                MOVE => registers[to] = value,
                MOVE_REGISTER => registers[to] = registers[from],
                AND => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                JUMP_NOT_EQUAL if registers[to] != value => pc += usize::from(offset),
                JUMP_EQUAL if registers[to] == value => pc += usize::from(offset),
                JUMP_NOT_EQUAL | JUMP_EQUAL => {}
                EXIT => return registers[0] != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn oci(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroup {
            Allow: allow,
            Type: kind.into(),
            Major: major,
            Minor: minor,
            Access: access.into(),
            ..Default::default()
        }
    }

    fn program(rules: &[LinuxDeviceCgroup], nodes: &[LinuxDevice]) -> Vec<u64> {
        compile(&plan(rules, nodes).unwrap())
    }

    #[test]
    fn without_rules_only_the_defaults_and_the_listed_nodes_are_allowed() {
        let node = LinuxDevice { Type: "b".into(), Major: 253, Minor: 0, ..Default::default() };
        let program = program(&[], &[node]);
        for (kind, access, major, minor, allowed) in [
            (CHAR, READ | WRITE, 1, 3, true),
            (CHAR, READ, 1, 1, false),
            (CHAR, READ, 1, 11, false),
            (CHAR, READ | WRITE, 5, 2, true),
            (CHAR, READ | WRITE, 136, 7, true),
            (BLOCK, READ | WRITE, 253, 0, true),
            (BLOCK, READ, 253, 1, false),
            (CHAR, READ, 253, 0, false),
            (BLOCK, MKNOD, 8, 0, true),
            (BLOCK, MKNOD | READ, 8, 0, false),
        ] {
            assert_eq!(run(&program, kind, access, major, minor), allowed, "{kind} {access} {major}:{minor}");
        }
    }

    /// A privileged container as it comes from Kata's hosts: no rules, and nothing else that this looks at.
    #[test]
    fn a_privileged_container_without_rules_reaches_no_disk_of_the_guest() {
        let program = program(&[], &[]);
        for (kind, major, minor) in
            [(BLOCK, 254, 0), (BLOCK, 8, 0), (BLOCK, 259, 0), (CHAR, 1, 1), (CHAR, 10, 232)]
        {
            assert!(!run(&program, kind, READ, major, minor) && !run(&program, kind, WRITE, major, minor));
        }
        assert!(run(&program, CHAR, READ | WRITE, 1, 3));
    }

    #[test]
    fn the_last_rule_decides_each_permission() {
        let rules = [
            oci(false, "a", 0, 0, "rwm"),
            oci(true, "b", 8, -1, "r"),
            oci(true, "b", 8, 0, "w"),
            oci(false, "b", 8, 3, "r"),
        ];
        let program = program(&rules, &[]);
        let block = |access, minor| run(&program, BLOCK, access, 8, minor);
        assert!(block(READ, 1) && !block(WRITE, 1));
        assert!(block(READ | WRITE, 0), "two rules together");
        assert!(!block(READ, 3) && block(MKNOD, 3));
        assert!(!run(&program, BLOCK, READ, 9, 0));
    }

    #[test]
    fn allow_all_allows_all() {
        for everything in [oci(true, "a", -1, -1, "rwm"), oci(true, "", 0, 0, "")] {
            let program = program(&[oci(false, "a", -1, -1, "rwm"), everything], &[]);
            assert!(run(&program, BLOCK, ALL, 8, 0) && run(&program, CHAR, ALL, 1, 1));
        }
    }

    #[test]
    fn zero_numbers_are_read_narrowly() {
        let allowed = program(&[oci(true, "b", 8, 0, "r")], &[]);
        assert!(run(&allowed, BLOCK, READ, 8, 0) && !run(&allowed, BLOCK, READ, 8, 1));
        let any = program(&[oci(true, "b", 0, 0, "r")], &[]);
        assert!(run(&any, BLOCK, READ, 9, 5));
    }

    #[test]
    fn bad_rules_are_refused() {
        assert!(check(&[oci(true, "x", 1, 1, "r")]).is_err());
        assert!(check(&[oci(true, "c", 1, 1, "rx")]).is_err());
    }
}
