//! Mounts that one container makes and another one gets: cloned in the first one's mount namespace, attached in the
//! second one's.
//!
//! A thread of its own enters both, since a mount namespace can only be entered with a root and working directory that no
//! other thread shares. The mount may still have to be made: the kernel tells of every change of a mount namespace, and
//! the thread waits for that, or for the end of the container. Paths are resolved inside each container, on descriptors.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Weak, mpsc},
    time::{Duration, Instant},
};

use bulkhead_executor::{Node, Root};
use bulkhead_protocol::agent::SharedMount;
use nix::sched::CloneFlags;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxAttributes, StatxFlags, openat},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::{
    container::Container,
    error::{During, Error, Result},
};

/// A source container may take this long to make its mount.
const PATIENCE: Duration = Duration::from_secs(10);
/// And this much longer to answer: a file system of its own may be in the way.
const MARGIN: Duration = Duration::from_secs(5);

/// Attaches one mount of `source` in `target`, whose init is parked. Blocks.
pub(crate) fn share(source: &Arc<Container>, target: &Arc<Container>, mount: &SharedMount) -> Result<()> {
    for path in [&mount.src_path, &mount.dst_path] {
        if !path.starts_with('/') || path.contains('\0') {
            return Err(Error::Invalid(format!("{path:?}, to be shared, is not an absolute path")));
        }
    }
    let (answer, answered) = mpsc::channel();
    // It may never come back from the source, and must not keep the target, which goes when this fails.
    let (from, to, what) = (Arc::clone(source), Arc::downgrade(target), mount.clone());
    let work = move || answer.send(in_thread(&from, &to, &what)).unwrap_or_default();
    std::thread::Builder::new().spawn(work).during(|| "start a thread".into())?;
    answered.recv_timeout(PATIENCE + MARGIN).unwrap_or_else(|_| {
        let (path, source) = (&mount.src_path, source.id());
        Err(Error::Timeout(format!("cannot share {path:?} of container {source:?}: its file system hangs")))
    })
}

fn in_thread(source: &Container, target: &Weak<Container>, mount: &SharedMount) -> Result<()> {
    let procfs = openat(CWD, "/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during(|| "open /proc".into())?;
    nix::sched::unshare(CloneFlags::CLONE_FS).during(|| "leave the agent's root".into())?;

    let from = || format!("{:?} of container {:?}", mount.src_path, source.id());
    enter(&source.executor.mount_namespace()?, source)?;
    let changes = openat(&procfs, "thread-self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .during(|| "open /proc/thread-self/mountinfo".into())?;
    let tree = take(&changes, source.executor.init_pidfd(), &mount.src_path, PATIENCE, &from)?;

    let gone = || Error::State(format!("{} is shared too late: who should get it is gone", from()));
    let target = target.upgrade().ok_or_else(gone)?;
    let to = || format!("share {} at {:?} of container {:?}", from(), mount.dst_path, target.id());
    enter(&target.executor.mount_namespace()?, &target)?;
    attach(&tree, &mount.dst_path).during(to)
}

fn enter(namespace: &OwnedFd, container: &Container) -> Result<()> {
    nix::sched::setns(namespace, CloneFlags::CLONE_NEWNS)
        .during(|| format!("enter the mount namespace of container {:?}", container.id()))
}

/// A copy of what is mounted at `path`, once something is. `changes` is the list of this thread's mounts, opened before
/// the first look: what changes after that is told.
fn take(
    changes: &OwnedFd,
    ended: BorrowedFd<'_>,
    path: &str,
    patience: Duration,
    from: &dyn Fn() -> String,
) -> Result<OwnedFd> {
    let what = || format!("wait for a mount at {}", from());
    let root = Root::own().during(what)?;
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = mount_at(&root, path).during(what)? {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH
                | OpenTreeFlags::AT_RECURSIVE;
            return open_tree(&found, "", flags).during(|| format!("copy the mount at {}", from()));
        }
        // Looked at whatever woke this: in a busy container there always is something.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let waited = patience.as_secs();
            return Err(Error::Timeout(format!("nothing was mounted at {} within {waited} s", from())));
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(changes, PollFlags::PRI), PollFd::from_borrowed_fd(ended, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) if fds.iter().skip(1).any(|fd| !fd.revents().is_empty()) => {
                return Err(Error::State(format!("nothing was mounted at {} before it ended", from())));
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).during(what),
        }
    }
}

/// What is at `path`, if it is the root of a mount.
fn mount_at(root: &Root, path: &str) -> io::Result<Option<OwnedFd>> {
    let found = match root.open(path, OFlags::PATH) {
        Ok(found) => found,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // What the kernel knows will do: a file system that does not answer is not asked.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&found, "", flags, StatxFlags::TYPE)?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT).then_some(found))
}

/// Attaches a copy, at a directory or a file that is made if it is missing.
fn attach(tree: &OwnedFd, path: &str) -> io::Result<()> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let mode = rustix::fs::statx(tree, "", flags, StatxFlags::TYPE)?.stx_mode;
    let directory = FileType::from_raw_mode(mode.into()) == FileType::Directory;
    let node = if directory { Node::Directory } else { Node::File };
    let at = Root::own()?.create(path, node)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree.as_fd(), "", &at, "", flags)?)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use rustix::{
        net::{SendFlags, send},
        process::{PidfdFlags, getpid, pidfd_open},
    };

    use super::*;

    #[test]
    fn a_wait_ends_in_a_container_that_always_mounts_something_else() {
        // As the list of mounts would: it always has something to tell.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let busy = OwnedFd::from(listener.accept().unwrap().0);
        send(&peer, b"!", SendFlags::OOB).unwrap();
        let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let (done, result) = mpsc::channel();
        std::thread::spawn(move || {
            let patience = Duration::from_millis(100);
            done.send(take(&busy, own.as_fd(), "/not/there", patience, &|| "x".into())).unwrap();
        });
        let result = result.recv_timeout(Duration::from_secs(30)).expect("it does not end");
        assert!(matches!(result, Err(Error::Timeout(_))));
    }
}
