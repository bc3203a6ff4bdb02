//! Whether a sandbox left anything on this machine: processes, mounts, sockets, state, network interfaces and namespaces.
//!
//! Other sandboxes may come and go meanwhile; so what counts is what this one had, found by its processes and its id.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::processes::{Process, tree};

/// Where sandboxes keep their state.
const STATE: &str = "/run/bulkhead";

/// What a running sandbox has.
pub(crate) struct Belongings {
    id: String,
    processes: Vec<Process>,
    /// Interfaces and namespaces of before: they don't tell whose they are.
    network: BTreeSet<PathBuf>,
}

/// The network interfaces and namespaces there are now.
pub(crate) fn network() -> BTreeSet<PathBuf> {
    ["/sys/class/net", "/run/netns"].into_iter().flat_map(entries).collect()
}

impl Belongings {
    /// Of the sandbox that a process runs; `network` is from before it did.
    pub(crate) fn of(runner: u32, network: BTreeSet<PathBuf>) -> Result<Belongings> {
        let processes = tree(runner);
        let vmm = processes.iter().find(|process| process.is_vmm()).context("the container has no VMM")?;
        let name = vmm.argument("-name").context("the VMM has no name")?;
        let id = name.strip_prefix("sandbox-").unwrap_or(&name).to_owned();
        Ok(Belongings { id, processes, network })
    }

    /// Fails if anything of it is still there.
    pub(crate) fn are_gone(&self) -> Result<()> {
        let mut left: Vec<String> = Vec::new();
        let processes = self.processes.iter().filter(|process| process.is_alive());
        left.extend(processes.map(|process| format!("process {} ({})", process.pid, process.name)));
        left.extend(lines("/proc/self/mountinfo").filter_map(|line| mount(&line, &self.id)));
        left.extend(lines("/proc/net/unix").filter_map(|line| socket(&line, &self.id)));
        let state = entries(STATE).filter(|path| path.ends_with(&self.id));
        left.extend(state.map(|path| path.display().to_string()));
        left.extend(network().difference(&self.network).map(|path| path.display().to_string()));
        if !left.is_empty() {
            bail!("sandbox {} left behind:\n  {}", self.id, left.join("\n  "));
        }
        Ok(())
    }
}

fn lines(path: &str) -> impl Iterator<Item = String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect::<Vec<_>>().into_iter()
}

fn entries(directory: impl AsRef<Path>) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn mount(line: &str, id: &str) -> Option<String> {
    let point = line.split(' ').nth(4)?;
    point.contains(id).then(|| format!("mount {point}"))
}

fn socket(line: &str, id: &str) -> Option<String> {
    let path = line.split_whitespace().nth(7)?;
    path.contains(id).then(|| format!("socket {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_is_left_is_named() {
        let id = format!("leftovers-{}", std::process::id());
        let path = std::env::temp_dir().join(&id);
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let belongings = Belongings { id, processes: tree(child.id()), network: network() };
        let message = belongings.are_gone().unwrap_err().to_string();
        assert!(message.contains(&format!("socket {}", path.display())), "{message}");
        assert!(message.contains(&format!("process {} (sleep)", child.id())), "{message}");

        child.kill().unwrap();
        child.wait().unwrap();
        drop(socket);
        fs::remove_file(&path).unwrap();
        // Another id: a test that forks at this moment holds the socket a little longer.
        Belongings { id: "another".to_owned(), ..belongings }.are_gone().unwrap();
    }

    #[test]
    fn lines_of_the_kernel() {
        let line = "41 25 0:35 / /run/bulkhead/x1/share/c/rootfs rw shared:1 - ext4 /dev/sda rw";
        assert_eq!(mount(line, "x1").unwrap(), "mount /run/bulkhead/x1/share/c/rootfs");
        assert!(mount(line, "x2").is_none());
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/bulkhead/x1/vm/qmp";
        assert_eq!(self::socket(line, "x1").unwrap(), "socket /run/bulkhead/x1/vm/qmp");
    }
}
