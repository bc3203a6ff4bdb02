//! A container's last words: the file at its termination message path, as it lies in the guest.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use bulkhead_protocol::{oci, ports::GUEST_SHARE};
use rustix::fs::{FileType, OFlags};

use crate::tree;

/// The annotation that names the path within the container.
const ANNOTATION: &str = "io.kubernetes.container.terminationMessagePath";
/// So many bytes are kept of a termination message.
const LENGTH: u64 = 4096;

/// What is mounted at a container's termination message path, if it has one.
pub(crate) fn termination_log(spec: &oci::Spec) -> Option<String> {
    let path = Path::new(spec.Annotations.get(ANNOTATION)?);
    let mount = spec.Mounts.iter().find(|mount| Path::new(&mount.destination) == path)?;
    Some(mount.source.clone())
}

/// The beginning of a termination log; of one that is not there, nothing. Blocks.
pub(crate) fn read(source: &str) -> io::Result<String> {
    let file = match open(source) {
        Err(rustix::io::Errno::NOENT) => return Ok(String::new()),
        file => file?,
    };
    if !FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode).is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut content = Vec::new();
    File::from(file).take(LENGTH).read_to_end(&mut content)?;
    Ok(String::from_utf8_lossy(&content).into_owned())
}

/// On the share, links count as long as they stay there; elsewhere none does. A pipe in place of a file blocks nobody.
fn open(source: &str) -> rustix::io::Result<rustix::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    match Path::new(source).strip_prefix(GUEST_SHARE) {
        Ok(below) => {
            let share = tree::open(Path::new(GUEST_SHARE), OFlags::PATH | OFlags::DIRECTORY)?;
            tree::open_below(share, below, flags)
        }
        Err(_) => tree::open(Path::new(source), flags),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_at_the_annotated_path_is_found() {
        let mut spec = oci::Spec::new();
        let mount = |destination: &str, source: &str| oci::Mount {
            destination: destination.into(),
            source: source.into(),
            ..Default::default()
        };
        spec.Mounts = vec![mount("/dev", "devtmpfs"), mount("/dev/termination-log", "/share/log")];
        assert_eq!(termination_log(&spec), None);
        spec.Annotations.insert(ANNOTATION.into(), "/dev/termination-log/".into());
        assert_eq!(termination_log(&spec).as_deref(), Some("/share/log"));
        spec.Annotations.insert(ANNOTATION.into(), "/elsewhere".into());
        assert_eq!(termination_log(&spec), None);
    }

    #[test]
    fn only_the_beginning_of_a_regular_file_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        assert_eq!(read(&path("missing")).unwrap(), "");
        // Far larger than the memory of this machine, were it read whole.
        let file = File::create(path("log")).unwrap();
        file.set_len(1 << 42).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"bye\xff", 0).unwrap();
        let log = read(&path("log")).unwrap();
        assert!(log.starts_with("bye\u{fffd}\0") && log.chars().count() == 4096);
        std::os::unix::fs::symlink(path("log"), path("link")).unwrap();
        assert!(read(&path("link")).is_err());
        assert!(read(&path("link/x")).is_err());
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("pipe").as_str(),
            FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        assert!(read(&path("pipe")).is_err());
        assert!(read(directory.path().to_str().unwrap()).is_err());
    }
}
