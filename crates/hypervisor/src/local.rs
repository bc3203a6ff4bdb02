//! No VM: a plain process that stands for one. The test double; it isolates nothing.
//!
//! It gets a mount namespace in which the shared directory is bound where a guest would mount it. Mounts that the owner
//! makes in the shared directory later arrive there too: the directory is a shared mount, its copies are slaves of it.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change, unmount,
    },
    process::Signal,
    thread::LinkNameSpaceType,
};
use tokio::sync::oneshot;

use crate::{
    Accel, Device, Endpoint, Error, Vm, VmConfig, VmExit,
    machine::{Crew, Machine},
    process::Program,
    sys,
    workdir::Workdir,
};

/// What an agent keeps its state below; in the process' namespace it is empty and its own.
const GUEST_STATE: &str = "/run/kata-containers";

/// The process that stands for a VM.
struct Local {
    endpoint: Endpoint,
    machine: Machine,
    // After the machine: nobody uses it any more.
    share: Option<SharedMount>,
}

/// Starts the program; see [`crate::Kind::Local`].
pub(crate) async fn boot(
    config: &VmConfig,
    program: &Path,
    args: &[String],
    share_at: &Path,
) -> Result<Box<dyn Vm>, Error> {
    if !program.is_file() {
        let remedy = "build or install it, or set its path in the configuration";
        return Err(Error::Missing {
            what: "the program that stands for a VM",
            path: program.to_owned(),
            remedy,
        });
    }
    let crew = Crew::new(Workdir::create(&config.dir)?);
    let share = match &config.share {
        Some(share) => SharedMount::ensure(&share.path)
            .map_err(Error::io(format!("make {} a shared mount", share.path.display())))?,
        None => None,
    };
    let source = config.share.as_ref().map(|share| share.path.clone());
    let mounts = mount_namespace(source, share_at.to_owned()).await;
    let mounts = mounts.map_err(Error::io(format!("bind the shared directory at {}", share_at.display())))?;
    let mut process = Program::new(program).args(args);
    process.environment = true;
    if let Some(netns) = &config.netns {
        process.namespaces.push(crate::netns(netns)?);
    }
    process.namespaces.push((mounts, LinkNameSpaceType::Mount));
    let endpoint = Endpoint::Unix { path: crew.dir().join("agent.sock") };
    let machine = crew.man("the process", process.spawn().await?)?;
    Ok(Box::new(Local { endpoint, machine, share }))
}

#[async_trait::async_trait]
impl Vm for Local {
    /// Native speed: no bound needs to be stretched.
    fn accel(&self) -> Accel {
        Accel::Kvm
    }

    fn pid(&self) -> u32 {
        self.machine.pid()
    }

    fn helper_pids(&self) -> Vec<u32> {
        self.machine.helper_pids()
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn last_words(&self) -> String {
        self.machine.tail().text()
    }

    async fn attach(&self, _: Device) -> Result<String, Error> {
        Err(unsupported("plugging a device in"))
    }

    async fn pause(&self) -> Result<(), Error> {
        Err(unsupported("pausing the VM"))
    }

    async fn resume(&self) -> Result<(), Error> {
        Err(unsupported("resuming the VM"))
    }

    async fn wait(&self) -> VmExit {
        self.machine.wait().await
    }

    async fn stop(&self, grace: Duration) -> Result<VmExit, Error> {
        let exit = self.machine.stop(grace, async { self.machine.vmm().signal(Signal::TERM) }).await;
        if let Some(share) = &self.share {
            share.undo();
        }
        Ok(exit)
    }
}

fn unsupported(operation: &'static str) -> Error {
    Error::Unsupported { operation, backend: "a local process" }
}

/// A mount namespace in which `source` is bound at `target`, made by a thread that ends with it.
async fn mount_namespace(source: Option<PathBuf>, target: PathBuf) -> io::Result<OwnedFd> {
    let (reply, made) = oneshot::channel();
    thread::Builder::new().name("mounts".into()).spawn(move || {
        // The caller may have gone; then the namespace goes too.
        drop(reply.send(make_mount_namespace(source.as_deref(), &target)));
    })?;
    made.await.unwrap_or_else(|_| Err(io::Error::other("the thread that mounts is gone")))
}

fn make_mount_namespace(source: Option<&Path>, target: &Path) -> io::Result<OwnedFd> {
    let below_state = target.starts_with(GUEST_STATE);
    if below_state {
        fs::create_dir_all(GUEST_STATE)?;
    }
    sys::unshare_mounts()?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    if below_state {
        mount("tmpfs", GUEST_STATE, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")?;
    }
    if let Some(source) = source {
        fs::create_dir_all(target)?;
        mount_bind_recursive(source, target)?;
    }
    Ok(File::open("/proc/thread-self/ns/mnt")?.into())
}

/// A directory that was made a mount of its own, whose mounts propagate; undone on drop.
struct SharedMount(std::sync::Mutex<Option<PathBuf>>);

impl SharedMount {
    /// Makes the directory a shared mount, unless its owner has done so already.
    fn ensure(path: &Path) -> io::Result<Option<SharedMount>> {
        let path = fs::canonicalize(path)?;
        if is_shared_mount(&fs::read_to_string("/proc/thread-self/mountinfo")?, &path) {
            return Ok(None);
        }
        mount_bind_recursive(&path, &path)?;
        let shared = SharedMount(std::sync::Mutex::new(Some(path.clone())));
        mount_change(&path, MountPropagationFlags::SHARED)?;
        Ok(Some(shared))
    }

    /// Unmounts it, with whatever is mounted below.
    fn undo(&self) {
        let path = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(path) = path
            && let Err(error) = unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        {
            tracing::warn!(path = %path.display(), %error, "cannot unmount the shared directory");
        }
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        self.undo();
    }
}

/// Whether the topmost mount at `path` is a shared one.
fn is_shared_mount(mountinfo: &str, path: &Path) -> bool {
    let mut at_path = mountinfo.lines().filter_map(|line| {
        // id parent major:minor root mount-point options optional-fields... - type ...
        let fields: Vec<&str> = line.split(' ').take_while(|field| *field != "-").collect();
        (fields.get(4).map(|point| unescaped(point))? == path.to_str()?).then_some(fields)
    });
    at_path.next_back().is_some_and(|fields| fields.iter().skip(6).any(|field| field.starts_with("shared:")))
}

/// Undoes the octal escapes of mountinfo.
fn unescaped(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |field, (code, char)| field.replace(code, char))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_decides() {
        let info = "\
            29 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            90 29 8:1 /s /run/my\\040share rw master:1 - ext4 /dev/sda1 rw\n\
            91 90 8:1 /s /run/my\\040share rw shared:7 master:1 - ext4 /dev/sda1 rw\n\
            92 29 8:1 /t /run/top rw shared:8 - ext4 /dev/sda1 rw\n\
            93 92 8:1 /t /run/top rw - ext4 /dev/sda1 rw\n";
        for (path, expected) in [("/", true), ("/run/my share", true), ("/run/top", false), ("/run", false)] {
            assert_eq!(is_shared_mount(info, Path::new(path)), expected, "{path}");
        }
    }
}
