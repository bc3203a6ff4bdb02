//! The directory of one VM: made with it, removed with it.

use std::{
    fs, io,
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt, net::UnixListener},
    path::{Path, PathBuf},
};

use crate::Error;

/// A socket's path has 107 bytes; this leaves room for the names below.
const PATH_BYTES: usize = 80;

/// A directory that goes when its handle goes.
pub(crate) struct Workdir(PathBuf);

impl Workdir {
    /// Makes the directory, for this user alone. Its parent must exist, it must not.
    pub(crate) fn create(path: &Path) -> Result<Workdir, Error> {
        if path.as_os_str().len() > PATH_BYTES || !path.is_absolute() {
            return Err(Error::Invalid(format!(
                "the VM's directory {} must be an absolute path of at most {PATH_BYTES} bytes",
                path.display()
            )));
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(path)
            .map_err(Error::io(format!("create the VM's directory {}", path.display())))?;
        Ok(Workdir(path.to_owned()))
    }

    /// The path of an entry.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Binds a listening socket.
    pub(crate) fn listen(&self, name: &str) -> Result<UnixListener, Error> {
        let path = self.join(name);
        UnixListener::bind(&path).map_err(Error::io(format!("listen on {}", path.display())))
    }

    /// Removes the directory now; removing it again does nothing.
    pub(crate) fn remove(&self) {
        debug_assert!(self.0.as_os_str().as_bytes().starts_with(b"/"));
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.0.display(), %error, "cannot remove the VM's directory");
        }
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn it_is_private_and_goes_with_its_sockets() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("vm");
        let dir = Workdir::create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let _listener = dir.listen("a.sock").unwrap();
        assert!(Workdir::create(&path).is_err(), "two VMs in one directory");
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused_with_its_reason() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(PATH_BYTES)));
        let error = Workdir::create(&path).err().unwrap().to_string();
        assert!(error.contains("at most 80 bytes"), "{error}");
    }
}
