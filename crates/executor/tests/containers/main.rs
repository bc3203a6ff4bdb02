//! Real containers, made and taken apart by the executor: as root on any machine, and with cgroups in a VM.
//!
//! The executor's children are this same program executed again, so that it needs a `main` of its own; it prints what
//! libtest would. As PID 1 (see `../in-vm.sh`) it prepares the machine, runs the cases that need cgroup v2 too, and
//! switches the machine off.

#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

mod cgroups;
mod confinement;
mod failures;
mod filesystem;
mod hooks;
mod lifecycle;
mod namespaces;
mod support;
mod sys;
mod vm;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
};

/// A test: its name and what it does.
pub(crate) type Case = (&'static str, fn());

/// Names the functions of a module as cases.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub(crate) const CASES: &[$crate::Case] = &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}

fn main() -> ExitCode {
    bulkhead_executor::child_main();
    let in_vm = std::process::id() == 1;
    if in_vm {
        vm::prepare();
    }
    let filter = if in_vm { None } else { std::env::args().skip(1).find(|arg| !arg.starts_with('-')) };
    let passed = run(filter.as_deref().unwrap_or_default(), in_vm);
    if in_vm {
        vm::power_off();
    }
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(filter: &str, cgroups: bool) -> bool {
    let mut groups = vec![
        lifecycle::CASES,
        namespaces::CASES,
        filesystem::CASES,
        confinement::CASES,
        failures::CASES,
        hooks::CASES,
    ];
    let mut skipped = 0;
    if cgroups {
        groups.push(cgroups::CASES);
    } else {
        let cases = cgroups::CASES.len();
        if std::env::var_os("BULKHEAD_TEST_VM_FOLLOWS").is_some() {
            println!("{cases} cases of cgroups run in the VM that follows");
        } else {
            skipped = cases;
            println!(
                "skipped: {cases} cases of cgroups: they need a machine of their own, see tests/in-vm.sh"
            );
        }
    }
    let cases: Vec<_> = groups.concat().into_iter().filter(|(name, _)| name.contains(filter)).collect();
    if !rustix::process::geteuid().is_root() {
        println!("skipped: {} cases: containers need root", cases.len());
        println!("\ntest result: ok. 0 passed; 0 failed; {} ignored", skipped + cases.len());
        return true;
    }
    support::isolate();
    println!("\nrunning {} tests", cases.len());
    let mut failed = Vec::new();
    for (name, case) in &cases {
        let before = support::Census::take();
        let result = catch_unwind(AssertUnwindSafe(|| {
            case();
            before.compare();
        }));
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        if result.is_err() {
            support::kill_children();
            failed.push(*name);
        }
    }
    failed.iter().for_each(|name| println!("    failed: {name}"));
    println!(
        "\ntest result: {}. {} passed; {} failed; {skipped} ignored",
        if failed.is_empty() { "ok" } else { "FAILED" },
        cases.len() - failed.len(),
        failed.len(),
    );
    failed.is_empty()
}
