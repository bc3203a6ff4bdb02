//! Counts what a world holds, to see what a case left behind.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;

use crate::runner;

/// Where a container runtime makes cgroups: the hierarchies of cgroup v1, and the usual parents in v2.
const CGROUPS: [&str; 6] = ["memory", "devices", "unified", "system.slice", "default", "k8s.io"];
/// A teardown that goes on in the background (a shim that exits after its last answer) has this long.
const SETTLE: Duration = Duration::from_secs(15);

/// Everything in this world that a sandbox could leave: processes, mounts, sockets, namespaces, links, cgroups, files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    things: BTreeSet<String>,
}

impl Census {
    /// Counts now.
    pub fn take() -> Census {
        let mut things = BTreeSet::new();
        things.extend(processes());
        things.extend(lines("/proc/self/mountinfo").iter().filter_map(|line| mount(line)));
        things.extend(lines("/proc/net/unix").iter().filter_map(|line| socket(line)));
        things.extend(lines("/proc/self/net/dev").iter().filter_map(|line| link(line)));
        for (kind, folder) in [("netns", "/run/netns"), ("state", "/run/bulkhead"), ("shm", "/dev/shm")] {
            things.extend(entries(Path::new(folder)).map(|path| format!("{kind} {}", path.display())));
        }
        for hierarchy in CGROUPS {
            let hierarchy = Path::new("/sys/fs/cgroup").join(hierarchy);
            things.extend(tree(&hierarchy).map(|path| format!("cgroup {}", path.display())));
        }
        for root in ["/run", runner::RUNS] {
            things.extend(files(Path::new(root)).map(|path| format!("file {}", path.display())));
        }
        Census { things }
    }

    /// Fails when, after a bounded time to settle, there is more than before.
    pub fn nothing_more(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            let left: Vec<String> = Census::take().things.difference(&self.things).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > SETTLE {
                bail!("left behind:\n  {}", left.join("\n  "));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn lines(path: &str) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn is_folder(path: &Path) -> bool {
    path.is_dir() && !path.is_symlink()
}

/// Every folder below `root`.
fn tree(root: &Path) -> Box<dyn Iterator<Item = PathBuf>> {
    let folders = entries(root).filter(|path| is_folder(path));
    Box::new(folders.flat_map(|folder| std::iter::once(folder.clone()).chain(tree(&folder))))
}

/// Everything below `root` that is no folder; an empty folder is no leftover.
fn files(root: &Path) -> impl Iterator<Item = PathBuf> {
    std::iter::once(root.to_path_buf())
        .chain(tree(root))
        .flat_map(|folder| entries(&folder).filter(|path| !is_folder(path)))
}

fn processes() -> impl Iterator<Item = String> {
    entries(Path::new("/proc")).filter_map(|folder| {
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        let name = stat.split_once('(')?.1.rsplit_once(')')?.0.to_owned();
        let pid = folder.file_name()?.to_string_lossy().into_owned();
        pid.parse::<u32>().ok()?;
        let command = fs::read_to_string(folder.join("cmdline")).unwrap_or_default().replace('\0', " ");
        Some(format!("process {pid} ({name}) {command}"))
    })
}

/// A line of `/proc/net/dev`, whose first two are headings.
fn link(line: &str) -> Option<String> {
    let (name, figures) = line.split_once(':')?;
    (!figures.contains('|')).then(|| format!("link {}", name.trim()))
}

fn mount(line: &str) -> Option<String> {
    let mut fields = line.split(' ');
    Some(format!("mount {} (id {})", fields.nth(4)?, line.split(' ').next()?))
}

fn socket(line: &str) -> Option<String> {
    let path = line.split_whitespace().nth(7)?;
    // Connections repeat the listener's path; a listener has the flag __SO_ACCEPTCON.
    (line.split_whitespace().nth(3)? == "00010000").then(|| format!("socket {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_and_a_new_socket_are_seen() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let before = Census::take();
        fs::write(folder.path().join("left"), "").unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        let after = Census::take();
        let more: Vec<_> = after.things.difference(&before.things).collect();
        assert!(
            more.iter().any(|thing| thing.starts_with("socket") && thing.ends_with("/socket")),
            "{more:?}"
        );
    }

    #[test]
    fn folders_are_walked_and_empty_ones_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        assert_eq!(files(folder.path()).count(), 0);
        fs::write(folder.path().join("a/b/left"), "").unwrap();
        assert_eq!(files(folder.path()).count(), 1);
    }
}
