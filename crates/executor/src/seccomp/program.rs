//! From rules to instructions.
//!
//! ```text
//! for each architecture:  its token? ─no─► next        none: kill
//!                            │
//!                         a balanced search over ranges of numbers with the same outcome
//!                            │
//!                         return, or: for each rule its conditions ─all hold─► return; none ─► default
//! ```
//! A conditional jump reaches 255 instructions; a search node whose left half is longer jumps by `ja`, which has 32 bits.

use super::{Condition, KILL_PROCESS, Op, Rule, Table, syscalls::X32_BIT};

// linux/bpf_common.h, linux/filter.h
const LD_W_ABS: u16 = 0x20;
const ALU_AND_K: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ_K: u16 = 0x15;
const JGT_K: u16 = 0x25;
const JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;

// struct seccomp_data
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

/// `struct sock_filter` as a little-endian machine holds it.
fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> u64 {
    u64::from(code) | u64::from(jt) << 16 | u64::from(jf) << 24 | u64::from(k) << 32
}

fn statement(code: u16, k: u32) -> u64 {
    instruction(code, 0, 0, k)
}

/// An unconditional jump over `distance` instructions.
fn jump(distance: usize) -> u64 {
    statement(JA, u32::try_from(distance).unwrap_or(u32::MAX))
}

/// The whole program. It may be longer than the kernel takes.
pub(super) fn assemble(default: u32, tables: &[Table]) -> Vec<u64> {
    let mut program = vec![statement(LD_W_ABS, OFFSET_ARCH)];
    for table in tables {
        let ranges = ranges(default, table);
        let search = search(&ranges);
        program.push(instruction(JEQ_K, 1, 0, table.token));
        program.push(jump(search.len() + 1));
        program.push(statement(LD_W_ABS, OFFSET_NR));
        program.extend(search);
    }
    program.push(statement(RET_K, KILL_PROCESS));
    program
}

/// The numbers from here up to the next range, and what happens to them.
struct Range {
    start: u32,
    code: Vec<u64>,
}

/// The whole space of numbers; neighbours with the same outcome are one range.
fn ranges(default: u32, table: &Table) -> Vec<Range> {
    let fallback = vec![statement(RET_K, default)];
    let mut ranges: Vec<Range> = Vec::new();
    let mut add = |start: u32, code: Vec<u64>| {
        if ranges.last().is_none_or(|last| last.code != code) {
            ranges.push(Range { start, code });
        }
    };
    let mut next = Some(0);
    for (&number, rules) in &table.rules {
        if next != Some(number) {
            next.into_iter().for_each(|start| add(start, fallback.clone()));
        }
        add(number, outcome(rules, default, table.wide));
        next = number.checked_add(1);
    }
    next.into_iter().for_each(|start| add(start, fallback.clone()));
    // The kernel reports -1 for a call that a tracer has skipped: not one of x32.
    if table.token == super::syscalls::Arch::X32.token() && !table.x32 {
        add(X32_BIT, vec![statement(RET_K, KILL_PROCESS)]);
        add(u32::MAX, fallback);
    }
    ranges
}

fn search(ranges: &[Range]) -> Vec<u64> {
    if let [only] = ranges {
        return only.code.clone();
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let start = right.first().map_or(0, |range| range.start);
    let left = search(left);
    let mut code = match u8::try_from(left.len()) {
        Ok(distance) => vec![instruction(JGE_K, distance, 0, start)],
        Err(_) => vec![instruction(JGE_K, 0, 1, start), jump(left.len())],
    };
    code.extend(left);
    code.extend(search(right));
    code
}

/// Tries the rules in order. What follows an unconditional one cannot be reached and is left out.
fn outcome(rules: &[Rule], default: u32, wide: bool) -> Vec<u64> {
    let mut code = Vec::new();
    for rule in rules {
        code.extend(conditional(rule, wide));
        if rule.conditions.is_empty() {
            return code;
        }
    }
    code.push(statement(RET_K, default));
    code
}

/// Where a conditional jump leads.
#[derive(Clone, Copy)]
enum To {
    /// The next instruction.
    Next,
    /// Behind the comparison: the condition holds.
    Holds,
    /// Behind the rule: it does not.
    Fails,
}

/// An instruction whose jumps are not resolved yet.
type Symbolic = (u16, u32, To, To);

/// A rule that returns its action when all conditions hold, and falls through otherwise.
fn conditional(rule: &Rule, wide: bool) -> Vec<u64> {
    let comparisons: Vec<Vec<Symbolic>> = rule.conditions.iter().map(|c| comparison(c, wide)).collect();
    let total: usize = comparisons.iter().map(Vec::len).sum();
    let mut code = Vec::with_capacity(total + 1);
    for comparison in &comparisons {
        let end = code.len() + comparison.len();
        for &(op, k, jt, jf) in comparison {
            let here = code.len() + 1;
            let distance = |to| match to {
                To::Next => 0,
                To::Holds => end - here,
                To::Fails => total + 1 - here,
            };
            // Six conditions of six instructions at most: far below 255.
            let near = |to| u8::try_from(distance(to)).unwrap_or(u8::MAX);
            code.push(instruction(op, near(jt), near(jf), k));
        }
    }
    code.push(statement(RET_K, rule.action));
    code
}

/// Compares an argument, high half first.
fn comparison(condition: &Condition, wide: bool) -> Vec<Symbolic> {
    let Condition { index, op, value, mask } = *condition;
    let halves = |v: u64| ((v >> 32) as u32, (v & 0xffff_ffff) as u32);
    let ((high, low), (mask_high, mask_low)) = (halves(value), halves(mask));
    let load = |half: u32| (LD_W_ABS, OFFSET_ARGS + 8 * index + 4 * half, To::Next, To::Next);
    let and = |k| (ALU_AND_K, k, To::Next, To::Next);
    let greater = |code| (code, low, To::Holds, To::Fails);
    let not_greater = |code| (code, low, To::Fails, To::Holds);

    let mut code = Vec::new();
    if wide {
        code.push(load(1));
        match op {
            Op::Eq => code.push((JEQ_K, high, To::Next, To::Fails)),
            Op::Ne => code.push((JEQ_K, high, To::Next, To::Holds)),
            Op::Gt | Op::Ge => {
                code.push((JGT_K, high, To::Holds, To::Next));
                code.push((JEQ_K, high, To::Next, To::Fails));
            }
            Op::Lt | Op::Le => {
                code.push((JGT_K, high, To::Fails, To::Next));
                code.push((JEQ_K, high, To::Next, To::Holds));
            }
            Op::MaskedEq => {
                code.push(and(mask_high));
                code.push((JEQ_K, high, To::Next, To::Fails));
            }
        }
    }
    code.push(load(0));
    match op {
        Op::Eq => code.push((JEQ_K, low, To::Holds, To::Fails)),
        Op::Ne => code.push((JEQ_K, low, To::Fails, To::Holds)),
        Op::Gt => code.push(greater(JGT_K)),
        Op::Ge => code.push(greater(JGE_K)),
        Op::Lt => code.push(not_greater(JGE_K)),
        Op::Le => code.push(not_greater(JGT_K)),
        Op::MaskedEq => {
            code.push(and(mask_low));
            code.push((JEQ_K, low, To::Holds, To::Fails));
        }
    }
    code
}
