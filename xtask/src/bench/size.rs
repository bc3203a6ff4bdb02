//! What it takes to have a container: sizes of the programs; and while a container runs under containerd and does
//! nothing, memory of the agent, the shim and its helpers, and the processor time of all but the VMM.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::agent;
use super::containerd::{Containerd, ID};
use crate::processes::{Process, tree};
use crate::progress::{heading, step};
use crate::rootfs;
use crate::workspace::Workspace;

/// Where sandboxes keep their state.
const STATE: &str = "/run/bulkhead";
/// How long nothing is watched to happen.
const IDLE: Duration = Duration::from_secs(10);
/// What is still going on when a container has just started: backends that close, pages that are given back.
const SETTLE: Duration = Duration::from_secs(3);

/// Measures and prints.
pub(super) fn run(workspace: &Workspace) -> Result<()> {
    heading("Sizes");
    let root = workspace.target.join("bench/rootfs");
    rootfs::make(&root)?;
    let before = sandboxes();
    let containerd = step("Starting a containerd", || Containerd::start(workspace))?;
    step("Starting a container", || containerd.run(&root))?;
    let measured = measure(&before);
    step("Removing the container", || containerd.remove())?;
    let measured = measured?;

    println!("\nOn disk");
    for file in [
        "libexec/bulkhead/bulkhead-agent",
        "bin/bulkhead",
        "bin/containerd-shim-bulkhead-v2",
        "libexec/bulkhead/bulkhead-backend",
        "share/bulkhead/initramfs.img",
        "share/bulkhead/vmlinuz",
    ] {
        let path = workspace.prefix().join(file);
        let size = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
        println!("  {file:<34} {:>9}", mib(size));
    }
    println!("{measured}");
    Ok(())
}

struct Measured {
    agent: Result<u64>,
    /// What it is, resident bytes and processor time while idle; the shim first.
    processes: Vec<(String, u64, Duration)>,
}

fn measure(before: &BTreeSet<PathBuf>) -> Result<Measured> {
    let sandbox = sandboxes().difference(before).next().cloned();
    let agent = sandbox
        .context(format!("the sandbox has no state in {STATE}"))
        .and_then(|path| agent::resident(&path));
    let processes: Vec<Process> = tree(shim()?).into_iter().filter(|process| !process.is_vmm()).collect();
    let text = format!("Watching {} idle processes for {} s", processes.len(), IDLE.as_secs());
    let processes = step(&text, || {
        thread::sleep(SETTLE);
        let start: Vec<Duration> = processes.iter().map(Process::processor_time).collect();
        thread::sleep(IDLE);
        let measured = processes.iter().zip(start).map(|(process, start)| {
            let used = process.processor_time().saturating_sub(start);
            (process.label(), process.resident(), used)
        });
        Ok(measured.collect())
    })?;
    Ok(Measured { agent, processes })
}

fn sandboxes() -> BTreeSet<PathBuf> {
    fs::read_dir(STATE).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// The shim of our container. It is nobody's child: it has made itself a daemon.
fn shim() -> Result<u32> {
    let all = tree(1).into_iter().chain(tree(std::process::id()));
    let shim = all.into_iter().find(|process| {
        process.name.starts_with("containerd-shim")
            && process.arguments().iter().any(|argument| argument == ID)
    });
    Ok(shim.context("the container has no shim")?.pid)
}

fn mib(bytes: u64) -> String {
    let hundredths = bytes * 100 / (1 << 20);
    format!("{}.{:02} MiB", hundredths / 100, hundredths % 100)
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "\nResident while a container runs and does nothing, and processor time in {} s",
            IDLE.as_secs()
        )?;
        match &self.agent {
            Ok(bytes) => writeln!(f, "  {:<34} {:>9}", "agent, in the guest", mib(*bytes))?,
            Err(error) => writeln!(f, "  {:<34} not measured: {error:#}", "agent, in the guest")?,
        }
        for (name, bytes, used) in &self.processes {
            writeln!(f, "  {name:<34} {:>9} {:>9.3} ms", mib(*bytes), used.as_secs_f64() * 1e3)?;
        }
        let total: Duration = self.processes.iter().map(|(_, _, used)| *used).sum();
        write!(f, "  {:<44} {:>9.3} ms", "all but the VMM", total.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mebibytes() {
        assert_eq!(mib(0), "0.00 MiB");
        assert_eq!(mib(1_118_016), "1.06 MiB");
    }
}
