//! `-v HOST:GUEST[:ro]`: a directory or file of the host, shown in the container.

use std::{path::Path, str::FromStr};

use anyhow::{Error, Result, bail, ensure};

/// One bind mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Absolute path on the host.
    pub(crate) host: String,
    /// Absolute path in the container.
    pub(crate) guest: String,
    /// The container cannot write to it.
    pub(crate) read_only: bool,
}

impl FromStr for Volume {
    type Err = Error;

    fn from_str(text: &str) -> Result<Volume> {
        let parts: Vec<&str> = text.split(':').collect();
        let (host, guest, mode) = match parts.as_slice() {
            [host, guest] => (*host, *guest, "rw"),
            [host, guest, mode] => (*host, *guest, *mode),
            _ => bail!("a volume is HOST:GUEST or HOST:GUEST:ro"),
        };
        ensure!(host.starts_with('/'), "the host's path {host:?} must be absolute");
        ensure!(guest.starts_with('/'), "the container's path {guest:?} must be absolute");
        ensure!(!guest.trim_matches('/').is_empty(), "a volume cannot cover the container's root");
        ensure!(
            !guest.split('/').any(|name| name == ".."),
            "the container's path {guest:?} must not contain .."
        );
        let read_only = match mode {
            "ro" => true,
            "rw" => false,
            other => bail!("the mode {other:?} is neither ro nor rw"),
        };
        Ok(Volume { host: host.to_owned(), guest: guest.to_owned(), read_only })
    }
}

impl Volume {
    /// Says early that the host has no such path.
    pub(crate) fn check(&self) -> Result<()> {
        let exists = Path::new(&self.host).try_exists()?;
        ensure!(exists, "volume {}: no such file or directory on the host; make it first", self.host);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        let volume: Volume = "/a:/b".parse().unwrap();
        assert_eq!((volume.host.as_str(), volume.guest.as_str(), volume.read_only), ("/a", "/b", false));
        assert!("/a:/b:ro".parse::<Volume>().unwrap().read_only);
        for text in ["", "/a", "a:/b", "/a:b", "/a:/", "/a:/b:rx", "/a:/b:ro:x", "/a:/b/../c"] {
            assert!(text.parse::<Volume>().is_err(), "{text}");
        }
        assert!("/no/such/path:/b".parse::<Volume>().unwrap().check().is_err());
        assert!("/:/b".parse::<Volume>().unwrap().check().is_ok());
    }
}
