//! Runs the cases of a file one after the other, each in a world of its own, and counts what happened.
//!
//! A case runs in new process, mount and network namespaces with an empty `/run`, so that the census sees what the case
//! left and nothing of the machine's, and what a failed case leaves is gone with its world. Three processes take part:
//! the one that was started ([`run`]), the first process of the world, which only reaps ([`reap`]), and the case itself.

use std::{
    env, fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use nix::{
    errno::Errno,
    sys::wait::{WaitStatus, wait},
    unistd::Pid,
};

use crate::{Census, Scratch};

const REAP: &str = "--reap";
const CASE: &str = "--case";
/// Where the command line unpacks images.
pub(crate) const RUNS: &str = "/var/cache/bulkhead/runs";
const PASSED: u8 = 0;
const FAILED: u8 = 1;
const SKIPPED: u8 = 77;

/// One end-to-end test.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// What it does; an error fails it, a [`Skip`] skips it.
    pub run: fn(&Scratch) -> anyhow::Result<()>,
}

/// Why a case cannot run here.
#[derive(Debug)]
pub struct Skip(
    /// The reason, for the one who reads the output.
    pub String,
);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Runs the cases whose name contains the first argument that is not an option (all without one), prints a line for each,
/// and closes with `N passed, N failed, N skipped`.
pub fn run(cases: &[Case]) -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match &args[..] {
        [mode, name] if mode == REAP => {
            ExitCode::from(reap(name).unwrap_or_else(|error| failed(name, &error)))
        }
        [mode, name] if mode == CASE => {
            ExitCode::from(cases.iter().find(|case| case.name == name).map_or(FAILED, |case| alone(*case)))
        }
        _ => all(cases, args.iter().find(|arg| !arg.starts_with('-')).map_or("", String::as_str)),
    }
}

fn all(cases: &[Case], filter: &str) -> ExitCode {
    let (mut passed, mut failures, mut skipped) = (0, 0, 0);
    for case in cases.iter().filter(|case| case.name.contains(filter)) {
        match in_a_world(case.name).unwrap_or_else(|error| failed(case.name, &error)) {
            PASSED => passed += 1,
            SKIPPED => skipped += 1,
            _ => failures += 1,
        }
    }
    println!("{passed} passed, {failures} failed, {skipped} skipped");
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn failed(name: &str, error: &anyhow::Error) -> u8 {
    println!("test {name} ... FAILED\n{error:?}");
    FAILED
}

/// Starts the first process of a new world and returns how the case ended.
fn in_a_world(name: &str) -> anyhow::Result<u8> {
    if !nix::unistd::geteuid().is_root() {
        println!("test {name} ... skipped: needs root");
        return Ok(SKIPPED);
    }
    let status = Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--propagation",
            "private",
            "--",
        ])
        .arg(env::current_exe()?)
        .args([REAP, name])
        .status()
        .context("starting unshare (package util-linux)")?;
    status.code().and_then(|code| u8::try_from(code).ok()).context("the case was killed")
}

/// The first process of a world: furnishes it, starts the case, and reaps whatever is orphaned until the case ends.
fn reap(name: &str) -> anyhow::Result<u8> {
    std::fs::create_dir_all(RUNS)?;
    for folder in ["/run", "/dev/shm", RUNS] {
        tool("mount", &["-t", "tmpfs", "-o", "mode=755", "e2e", folder])?;
    }
    tool("ip", &["link", "set", "lo", "up"])?;
    let case = Command::new(env::current_exe()?).args([CASE, name]).spawn()?;
    let case = Pid::from_raw(i32::try_from(case.id())?);
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == case => return Ok(u8::try_from(code)?),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == case => bail!("the case died of {signal}"),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn tool(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let status = Command::new(program).args(args).status().with_context(|| format!("starting {program}"))?;
    ensure!(status.success(), "{program} {} failed", args.join(" "));
    Ok(())
}

/// Runs a case between two counts, prints its line, and returns its exit code.
fn alone(case: Case) -> u8 {
    let start = Instant::now();
    let (code, text) = match counted(case) {
        Ok(()) => (PASSED, "ok".to_owned()),
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(skip) => (SKIPPED, format!("skipped: {skip}")),
            None => (FAILED, format!("FAILED\n{error:?}")),
        },
    };
    println!("test {} ({:.1} s) ... {text}", case.name, start.elapsed().as_secs_f32());
    code
}

fn counted(case: Case) -> anyhow::Result<()> {
    let scratch = Scratch::new()?;
    let before = Census::take();
    let result = catch_unwind(AssertUnwindSafe(|| (case.run)(&scratch)));
    let result = result.unwrap_or_else(|_| bail!("the case panicked; see above"));
    let left = before.nothing_more();
    match (result, left) {
        (Err(error), Err(left)) => Err(error.context(left)),
        (result, left) => result.and(left),
    }
}
