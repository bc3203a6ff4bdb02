//! A mount namespace of this process alone, so that its mounts cannot outlive it, however it dies.

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::{Error, error::os};

/// Moves the calling process into a private mount namespace that still receives the host's new mounts. To be called while
/// the process has one thread, before any sandbox is started: threads that exist already would stay outside.
pub fn enter_private_mount_namespace() -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(os("making a private mount namespace"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .map_err(os("making the mounts below / slaves of the host's"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_inside_stays_inside() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounting needs root");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap().to_owned();
        let mounted = |table: &str| std::fs::read_to_string(table).unwrap().contains(&path);
        // A thread is enough of a process here: the namespace is the thread's own.
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter_private_mount_namespace().unwrap();
                mount(Some("x"), directory.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
                (mounted("/proc/thread-self/mountinfo"), mounted("/proc/self/mountinfo"))
            });
            assert_eq!(inside.join().unwrap(), (true, false));
        });
    }
}
