//! What processes of this machine use, from /proc.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// A process among the descendants of another.
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// At most 15 bytes of its name.
    pub(crate) name: String,
    /// When it started, which tells it from a later one with its number.
    started: u64,
}

/// A process and all below it, itself first.
pub(crate) fn tree(root: u32) -> Vec<Process> {
    let mut processes = BTreeMap::new();
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some((process, parent)) = Process::find(pid) {
            processes.insert(pid, process);
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        found.extend(processes.remove(&pid));
        next.extend(children.remove(&pid).unwrap_or_default());
    }
    found
}

impl Process {
    /// A process and its parent's number.
    fn find(pid: u32) -> Option<(Process, u32)> {
        Process::parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// From `12 (name) S 1 ...`; a name may hold anything, parentheses too. The third field is the first behind it.
    fn parse(pid: u32, stat: &str) -> Option<(Process, u32)> {
        let (front, rest) = stat.rsplit_once(')')?;
        let name = front.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let (parent, started) = (fields.get(4 - 3)?.parse().ok()?, fields.get(22 - 3)?.parse().ok()?);
        Some((Process { pid, name, started }, parent))
    }

    /// Whether it is still there.
    pub(crate) fn is_alive(&self) -> bool {
        Process::find(self.pid).is_some_and(|(process, _)| process.started == self.started)
    }

    /// The argument behind this option.
    pub(crate) fn argument(&self, option: &str) -> Option<String> {
        self.arguments().into_iter().skip_while(|argument| argument != option).nth(1)
    }

    /// Whether this is the VMM.
    pub(crate) fn is_vmm(&self) -> bool {
        self.name.starts_with("qemu-system")
    }

    /// Its arguments, with the program's name.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let words = bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        words.filter(|word| !word.is_empty()).collect()
    }

    /// Its program's name, and the subcommand if there is one.
    pub(crate) fn label(&self) -> String {
        let arguments = self.arguments();
        let program = arguments.first().and_then(|program| program.rsplit('/').next()).unwrap_or(&self.name);
        match arguments.get(1).filter(|argument| !argument.starts_with('-')) {
            Some(subcommand) => format!("{program} {subcommand}"),
            None => program.to_owned(),
        }
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    }

    /// Processor time of all its threads so far, to the nanosecond (the first field of `schedstat`).
    pub(crate) fn processor_time(&self) -> Duration {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let times = threads.filter_map(|thread| {
            let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            schedstat.split_whitespace().next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(times.sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let stat = "12 (a) b) S 7 12 12 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 1000 2";
        let (process, parent) = Process::parse(12, stat).unwrap();
        assert_eq!((process.name.as_str(), process.started, parent), ("a) b", 4711, 7));
        assert!(Process::parse(12, "").is_none());
    }

    #[test]
    fn this_process_and_its_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let tree = tree(std::process::id());
        let found = tree.iter().find(|process| process.pid == child.id());
        let found = found.map(|process| (process.label(), process.argument("sleep"), process.is_alive()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.unwrap(), ("sleep 60".to_owned(), Some("60".to_owned()), true));
        assert_eq!(tree[0].pid, std::process::id());
        assert!(tree[0].resident() > 0);
        assert!(tree[0].processor_time() > Duration::ZERO);
    }
}
