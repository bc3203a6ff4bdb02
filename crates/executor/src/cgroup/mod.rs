//! A container's cgroup (version 2): made, limited, frozen, killed, counted and removed.

mod limits;
pub(crate) mod stats;

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use bulkhead_protocol::oci::{LinuxDevice, LinuxResources};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Error, device_filter::DeviceFilter, sys};
use limits::Supply;

/// How long the kernel may take to freeze or kill everything.
const PATIENCE: Duration = Duration::from_secs(10);

/// A container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: PathBuf,
    /// The directories above it that did not exist before, outermost first.
    made: Vec<PathBuf>,
    filter: Mutex<Option<DeviceFilter>>,
}

/// Refuses limits on a machine that can set none.
pub(crate) fn refuse_limits(resources: &LinuxResources) -> Result<(), Error> {
    let limits = limits::limits(resources, &Supply::here())?;
    if limits.is_empty() {
        return Ok(());
    }
    Err(Error::Unsupported(format!("resource limits ({}) without cgroup v2", limits.join(", "))))
}

impl Cgroup {
    /// Makes the cgroup at `path` below `mount` and sets its limits and its device filter; nothing is left behind when
    /// that fails.
    pub(crate) fn create(
        mount: &Path,
        relative: &Path,
        resources: &LinuxResources,
        nodes: &[LinuxDevice],
    ) -> Result<Cgroup, Error> {
        let mut cgroup = Cgroup { dir: mount.to_owned(), made: Vec::new(), filter: Mutex::new(None) };
        let result = cgroup
            .make(mount, relative)
            .and_then(|()| cgroup.apply(resources))
            .and_then(|()| cgroup.filter_devices(resources, nodes));
        match result {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                // What failed is the news; an empty directory that stays is not.
                cgroup.remove_directories(mount);
                Err(error)
            }
        }
    }

    /// Walks down from the mount, making directories and passing the controllers on.
    fn make(&mut self, mount: &Path, relative: &Path) -> Result<(), Error> {
        let parts: Vec<_> = relative.components().collect();
        let mut dir = mount.to_owned();
        for (i, part) in parts.iter().enumerate() {
            enable_controllers(&dir)?;
            dir.push(part);
            match fs::create_dir(&dir) {
                Ok(()) if i + 1 < parts.len() => self.made.push(dir.clone()),
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && i + 1 < parts.len() => {}
                // A leftover without processes is made anew, so that no old limit stays.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    if stats::is_populated(&dir)? {
                        return Err(Error::Invalid(format!("cgroup {} is in use", dir.display())));
                    }
                    remove_tree(&dir)?;
                    fs::create_dir(&dir).map_err(|source| Error::Cgroup { path: dir.clone(), source })?;
                }
                Err(source) => return Err(Error::Cgroup { path: dir, source }),
            }
        }
        self.dir = dir;
        Ok(())
    }

    /// Its directory, for clone3 to put a process into.
    ///
    /// A container that manages cgroups itself has moved its processes into some below: a cgroup that distributes
    /// controllers can hold none. A further process then goes where init is.
    pub(crate) fn open(&self, init: Option<i32>) -> Result<OwnedFd, Error> {
        let mut dir = self.dir.clone();
        let distributes = self.read("cgroup.subtree_control")?.is_some_and(|text| !text.trim().is_empty());
        if let (true, Some(init)) = (distributes, init)
            && let Some(of_init) = self.cgroup_of(init)
        {
            dir = of_init;
        }
        let file = File::open(&dir).map_err(|source| Error::Cgroup { path: dir, source })?;
        Ok(file.into())
    }

    /// The cgroup of a process, if it is this one or below.
    fn cgroup_of(&self, pid: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        let own = self.dir.file_name()?.to_str()?;
        // The path is seen from the caller's cgroup namespace, the directory from the mount: what follows the
        // container's own name is common to both.
        let below = path.split_once(&format!("/{own}"))?.1;
        (below.is_empty() || below.starts_with('/')).then(|| self.dir.join(below.trim_start_matches('/')))
    }

    /// Applies limits and, if there are any, device rules; what is left out stays as it is.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        crate::device_filter::check(&resources.Devices)?;
        self.apply(resources)?;
        if resources.Devices.is_empty() {
            return Ok(());
        }
        self.filter_devices(resources, &[])
    }

    fn apply(&self, resources: &LinuxResources) -> Result<(), Error> {
        let read = |file: &str| fs::read_to_string(self.dir.join(file)).ok();
        for setting in limits::settings(resources, &read)? {
            let path = self.dir.join(&setting.file);
            match fs::write(&path, &setting.value) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::EACCES) => {
                    if !setting.is_limit(&Supply::here()) {
                        tracing::debug!(
                            file = setting.file,
                            value = setting.value,
                            "there is nothing to limit"
                        );
                        continue;
                    }
                    return Err(Error::Unsupported(format!(
                        "{} = {}: this kernel or its configuration does not offer it",
                        setting.file, setting.value
                    )));
                }
                Err(source) => return Err(Error::Cgroup { path, source }),
            }
        }
        Ok(())
    }

    fn filter_devices(&self, resources: &LinuxResources, nodes: &[LinuxDevice]) -> Result<(), Error> {
        let dir = self.open(None)?;
        let mut filter = self.filter.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *filter = Some(DeviceFilter::attach(dir.as_fd(), &resources.Devices, nodes, filter.as_ref())?);
        Ok(())
    }

    /// The pids of every process in it and below.
    pub(crate) fn pids(&self) -> Result<Vec<i32>, Error> {
        let mut pids = Vec::new();
        for dir in tree(&self.dir)? {
            let path = dir.join("cgroup.procs");
            match fs::read_to_string(&path) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
                // Gone meanwhile, or threaded: then its processes are listed above.
                Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(source) => return Err(Error::Cgroup { path, source }),
            }
        }
        Ok(pids)
    }

    /// Sends a signal to every process, which are frozen meanwhile so that none is missed and no pid is reused.
    pub(crate) fn signal(&self, signal: i32, frozen: bool) -> Result<(), Error> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        if !frozen {
            self.freeze(true)?;
        }
        let result = self.pids().map(|pids| {
            for pid in pids {
                // Frozen processes cannot end, but one that was ending already may be gone.
                let _ = sys::kill(pid, signal);
            }
        });
        if !frozen {
            self.freeze(false)?;
        }
        result
    }

    fn kill(&self) -> Result<(), Error> {
        match self.write("cgroup.kill", "1") {
            // Before Linux 5.14. New processes may appear while old ones are killed; they inherit the cgroup.
            Err(Error::Cgroup { source, .. }) if source.kind() == io::ErrorKind::NotFound => loop {
                let pids = self.pids()?;
                if pids.iter().filter(|pid| sys::kill(**pid, libc::SIGKILL).is_ok()).count() == 0 {
                    return Ok(());
                }
                self.wait("populated", 0)?;
            },
            other => other,
        }
    }

    /// Freezes or thaws everything; returns when that is done.
    pub(crate) fn freeze(&self, freeze: bool) -> Result<(), Error> {
        let value = u64::from(freeze);
        self.write("cgroup.freeze", &value.to_string())?;
        match self.wait("frozen", value) {
            Err(error) if freeze => {
                self.write("cgroup.freeze", "0")?;
                Err(error)
            }
            result => result,
        }
    }

    /// Waits for a value in `cgroup.events`, whose changes poll(2) reports as exceptional.
    fn wait(&self, key: &str, value: u64) -> Result<(), Error> {
        let path = self.dir.join("cgroup.events");
        let deadline = Instant::now() + PATIENCE;
        let failed = |source| Error::Cgroup { path: path.clone(), source };
        let mut file = File::open(&path).map_err(failed)?;
        loop {
            let mut text = String::new();
            file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(failed)?;
            if stats::keyed(&text).get(key) == Some(&value) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&file, PollFlags::PRI)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => {
                    return Err(failed(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("not \"{key} {value}\" after {} s", PATIENCE.as_secs()),
                    )));
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(failed(e.into())),
            }
        }
    }

    /// Its figures.
    pub(crate) fn stats(&self) -> Result<stats::Stats, Error> {
        stats::read(&self.dir)
    }

    /// The path of one of its files.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Kills what is in it and removes it, with all below and those directories above that were made for it and are
    /// empty now. Idempotent.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        if !self.dir.exists() {
            return Ok(());
        }
        self.kill()?;
        self.wait("populated", 0)?;
        remove_tree(&self.dir)?;
        self.remove_made();
        Ok(())
    }

    /// After a failure to create it.
    fn remove_directories(&self, mount: &Path) {
        if self.dir != mount {
            let _ = fs::remove_dir(&self.dir);
        }
        self.remove_made();
    }

    fn remove_made(&self) {
        for dir in self.made.iter().rev() {
            // Another container may live in it.
            let _ = fs::remove_dir(dir);
        }
    }

    fn read(&self, name: &str) -> Result<Option<String>, Error> {
        stats::optional(&self.dir.join(name))
    }

    fn write(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        fs::write(&path, value).map_err(|source| Error::Cgroup { path, source })
    }
}

/// Where below the mount: systemd's `slice:prefix:name` is read as a path.
pub(crate) fn relative_path(path: &str) -> Result<PathBuf, Error> {
    let path = path.replace(':', "/");
    let mut relative = PathBuf::new();
    for part in Path::new(&path).components() {
        match part {
            Component::Normal(part) => relative.push(part),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(Error::Invalid(format!("cgroups path {path:?}"))),
        }
    }
    if relative.as_os_str().is_empty() {
        return Err(Error::Invalid(format!("cgroups path {path:?} is the root")));
    }
    Ok(relative)
}

/// Passes on to the cgroups below what `dir` has. One that cannot be passed on (it may be in use by version 1) is
/// missed only by a limit that needs it, which then says so.
fn enable_controllers(dir: &Path) -> Result<(), Error> {
    let available = dir.join("cgroup.controllers");
    let available =
        fs::read_to_string(&available).map_err(|source| Error::Cgroup { path: available, source })?;
    let file = dir.join("cgroup.subtree_control");
    for controller in available.split_whitespace() {
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            tracing::debug!(controller, file = %file.display(), %error, "cannot be passed on");
        }
    }
    Ok(())
}

/// A cgroup and all below, innermost last.
fn tree(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut dirs = vec![dir.to_owned()];
    let mut next = 0;
    while let Some(dir) = dirs.get(next).cloned() {
        match fs::read_dir(&dir) {
            Ok(entries) => dirs.extend(
                entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()),
            ),
            Err(e) if gone(&e) => {}
            Err(source) => return Err(Error::Cgroup { path: dir, source }),
        }
        next += 1;
    }
    Ok(dirs)
}

fn remove_tree(dir: &Path) -> Result<(), Error> {
    for dir in tree(dir)?.into_iter().rev() {
        match fs::remove_dir(&dir) {
            Ok(()) => {}
            Err(e) if gone(&e) => {}
            Err(source) => return Err(Error::Cgroup { path: dir, source }),
        }
    }
    Ok(())
}

/// A file of a cgroup that was removed meanwhile.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(any(test, fuzzing))]
/// Limits of anybody: each is for a file right in the cgroup, and is one line.
pub(crate) fn fuzz_limits(resources: &LinuxResources) {
    let _ = refuse_limits(resources);
    for present in [None, Some("max"), Some("10000 100000")] {
        for setting in limits::settings(resources, &|_| present.map(str::to_owned)).into_iter().flatten() {
            assert!(!setting.file.contains('/') && !setting.value.contains('\n'), "{setting:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_stays_below_the_mount() {
        for (path, wanted) in [
            ("/kubepods/pod1/c1", "kubepods/pod1/c1"),
            ("c1", "c1"),
            ("system.slice:bulkhead:c1", "system.slice/bulkhead/c1"),
            ("//a/./b/", "a/b"),
        ] {
            assert_eq!(relative_path(path).unwrap(), Path::new(wanted), "{path}");
        }
        for path in ["", "/", "..", "/a/../../b", "a:..:b"] {
            assert!(relative_path(path).is_err(), "{path}");
        }
    }

    /// In `/proc` no file can be made, as in a cgroup.
    #[test]
    fn a_file_that_is_missing_matters_to_limits_only() {
        let cgroup = Cgroup { dir: "/proc".into(), made: Vec::new(), filter: Mutex::new(None) };
        let mut resources = LinuxResources::new();
        let memory = resources.Memory.mut_or_insert_default();
        (memory.Limit, memory.Swap) = (-1, -1);
        resources.CPU.mut_or_insert_default().Shares = 2;
        resources.HugepageLimits.push(bulkhead_protocol::oci::LinuxHugepageLimit {
            Pagesize: "3MB".into(),
            ..Default::default()
        });
        cgroup.apply(&resources).unwrap();
        resources.Pids.mut_or_insert_default().Limit = 5;
        let error = cgroup.apply(&resources).unwrap_err().to_string();
        assert!(error.starts_with("not supported: pids.max = 5"), "{error}");
    }

    #[test]
    fn limits_need_cgroups() {
        let mut resources = LinuxResources::new();
        refuse_limits(&resources).unwrap();
        resources.Pids.mut_or_insert_default().Limit = 5;
        let error = refuse_limits(&resources).unwrap_err().to_string();
        assert_eq!(error, "not supported: resource limits (pids.max) without cgroup v2");
    }
}
