//! The vhost-user devices: one `bulkhead-backend` process each.
//!
//! Its socket is bound here, and the VMM's connection to it is made here too, before either process runs. So there is no
//! race on a path, the path can go at once, and the VMM needs no access to the directory.

use std::{
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use crate::{Endpoint, Error, Share, machine::Crew, process::Program, workdir::Workdir};

/// The guest's context id when no kernel hands it out: the first that is free for use.
const HYBRID_CID: u32 = 3;

/// Starts a file system device for `share`; returns the VMM's connection to it.
pub(crate) async fn start_fs(crew: &mut Crew, program: &Path, share: &Share) -> Result<OwnedFd, Error> {
    let (listener, vmm) = rendezvous(crew.dir(), "fs.sock")?;
    let backend = Program::new(program)
        .args(["fs", "--fd", &listener.as_raw_fd().to_string(), "--shared-dir"])
        .args([&share.path])
        .inherit(listener);
    crew.help("the file system backend", backend.spawn().await?)?;
    Ok(vmm)
}

/// Starts a vsock device; returns the VMM's connection to it and how host programs reach the guest through it.
pub(crate) async fn start_vsock(crew: &mut Crew, program: &Path) -> Result<(OwnedFd, Endpoint), Error> {
    let (listener, vmm) = rendezvous(crew.dir(), "vhost-vsock.sock")?;
    let hybrid = crew.dir().listen("vsock.sock")?;
    let path: PathBuf = crew.dir().join("vsock.sock");
    let backend = Program::new(program)
        .args(["vsock", "--fd", &listener.as_raw_fd().to_string()])
        .args(["--uds-fd", &hybrid.as_raw_fd().to_string()])
        .args(["--cid", &HYBRID_CID.to_string(), "--uds"])
        .args([&path])
        .inherit(listener)
        .inherit(hybrid);
    crew.help("the vsock backend", backend.spawn().await?)?;
    Ok((vmm, Endpoint::Hybrid { path }))
}

/// A listening socket with one connection already made to it, and no path any more.
fn rendezvous(dir: &Workdir, name: &str) -> Result<(UnixListener, OwnedFd), Error> {
    let listener = dir.listen(name)?;
    let path = dir.join(name);
    let stream = UnixStream::connect(&path).and_then(|stream| fs::remove_file(&path).map(|()| stream));
    Ok((listener, stream.map_err(Error::io(format!("connect to {}", path.display())))?.into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_rendezvous_is_connected_and_leaves_no_path() {
        let parent = tempfile::tempdir().unwrap();
        let dir = Workdir::create(&parent.path().join("vm")).unwrap();
        let (listener, vmm) = rendezvous(&dir, "fs.sock").unwrap();
        assert!(!dir.join("fs.sock").exists());
        let (mut backend, _) = listener.accept().unwrap();
        UnixStream::from(vmm).write_all(b"hello").unwrap();
        let mut said = String::new();
        backend.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");
    }
}
