//! The server's socket: one per pod and containerd, at a path that both `start` and `delete` can compute.

use std::{
    io,
    os::unix::{
        fs::DirBuilderExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use nix::sys::stat::{Mode, umask};
use sha2::{Digest, Sha256};

/// Where sockets are made unless containerd names another directory. Short, for the limit of 107 bytes.
pub(crate) const DIRECTORY: &str = "/run/containerd/s";

/// What was found at the path.
#[derive(Debug)]
pub(crate) enum Bound {
    /// Nothing, or a socket without an owner: this listener is new.
    New(UnixListener),
    /// A living server.
    Alive,
}

/// The path of a group's socket: pods of different containerds and namespaces never meet.
pub(crate) fn path(directory: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    let digest = Sha256::digest(format!("{}/{namespace}/{group}", address.trim_end_matches('/')));
    directory.join(digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// The address containerd dials.
pub(crate) fn address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Whether somebody accepts connections there.
pub(crate) fn is_alive(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

/// Listens at `path`, for this user only. A socket that was left behind is replaced.
///
/// Sets the process' file mode mask for a moment: for a process of one thread.
pub(crate) fn listen(path: &Path) -> io::Result<Bound> {
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    match bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        other => return other.map(Bound::New),
    }
    match UnixStream::connect(path) {
        Ok(_) => Ok(Bound::Alive),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            remove(path)?;
            bind(path).map(Bound::New)
        }
        Err(error) => Err(error),
    }
}

/// Removes the socket; one that is gone is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let mask = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(mask);
    listener
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_path_tells_containerds_namespaces_and_groups_apart() {
        let of = |address, namespace, group| path(Path::new(DIRECTORY), address, namespace, group);
        let one = of("/run/containerd/containerd.sock", "k8s.io", "pod");
        // printf %s /run/containerd/containerd.sock/k8s.io/pod | sha256sum
        assert_eq!(
            one.file_name().unwrap().to_str().unwrap(),
            "b9cab8e84f817f3c3bb561c7ea8dcbfba051d5d8f56ec2c3f204bc387d13f7d0"
        );
        assert!(address(&one).len() < "unix://".len() + 107);
        assert_ne!(one, of("/run/other.sock", "k8s.io", "pod"));
        assert_ne!(one, of("/run/containerd/containerd.sock", "moby", "pod"));
        assert_ne!(one, of("/run/containerd/containerd.sock", "k8s.io", "pod2"));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s").join("x");
        let Bound::New(first) = listen(&path).unwrap() else { panic!("nothing was there") };
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(is_alive(&path));
        assert!(matches!(listen(&path).unwrap(), Bound::Alive));
        drop(first);
        assert!(!is_alive(&path));
        assert!(matches!(listen(&path).unwrap(), Bound::New(_)));
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}
