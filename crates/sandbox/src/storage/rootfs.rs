//! The root file system in containerd's form: mounts, applied one over the other on `<bundle>/rootfs`.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use super::options::{self, Options};
use crate::{Error, RootfsMount, error::os};

/// mount(2) takes one page of data, its terminating NUL included.
const DATA_MAX: usize = 4095;

/// Mounts on a directory; unmounted by [`Mounted::unmount`], at the latest when dropped.
#[derive(Debug)]
pub(crate) struct Mounted {
    target: PathBuf,
    layers: usize,
}

impl Mounted {
    /// Applies the mounts in their order. On error nothing stays mounted.
    pub(crate) fn apply(mounts: &[RootfsMount], target: &Path) -> Result<Mounted, Error> {
        let mut mounted = Mounted { target: target.to_owned(), layers: 0 };
        for layer in mounts {
            apply_one(layer, target)?;
            mounted.layers += 1;
        }
        Ok(mounted)
    }

    /// Takes the mounts away again; what somebody else has unmounted is fine.
    pub(crate) fn unmount(&mut self) -> Result<(), Error> {
        while self.layers > 0 {
            match umount2(&self.target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => self.layers -= 1,
                Err(nix::Error::EINVAL | nix::Error::ENOENT) => self.layers = 0,
                Err(errno) => return Err(os(format!("unmounting {}", self.target.display()))(errno)),
            }
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::warn!("{error}");
        }
    }
}

fn apply_one(layer: &RootfsMount, target: &Path) -> Result<(), Error> {
    let Options { flags, data } = options::parse(&layer.options)?;
    let failed = |source: io::Error| Error::Io {
        what: format!("mounting {} {} on {}", layer.kind, layer.source, target.display()),
        source,
    };
    if layer.kind == "bind" || flags.contains(MsFlags::MS_BIND) {
        return bind(&layer.source, target, flags).map_err(failed);
    }
    let joined = data.join(",");
    if joined.len() <= DATA_MAX {
        let data = Some(joined.as_str()).filter(|data| !data.is_empty());
        return mount(Some(layer.source.as_str()), target, Some(layer.kind.as_str()), flags, data)
            .map_err(|errno| failed(errno.into()));
    }
    let (directory, short) = shorten(&data).ok_or_else(|| {
        Error::Unsupported(format!(
            "{} mount with {} bytes of options: the kernel takes {DATA_MAX}; use fewer layers",
            layer.kind,
            joined.len()
        ))
    })?;
    mount_from(&directory, &layer.source, target, &layer.kind, flags, &short).map_err(failed)
}

/// A bind ignores every other flag when it is made; they are applied to it afterwards.
fn bind(source: &str, target: &Path, flags: MsFlags) -> io::Result<()> {
    let recursion = flags & MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | recursion, None::<&str>)?;
    let attributes = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
    if attributes.is_empty() {
        return Ok(());
    }
    let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | attributes;
    mount(None::<&str>, target, None::<&str>, remount, None::<&str>).map_err(|errno| {
        let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        errno.into()
    })
}

/// Overlay options whose lower directories are relative to the directory that all of them are in, so that many layers
/// fit into a page. `None` when that does not help.
fn shorten(data: &[String]) -> Option<(PathBuf, String)> {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = layers.first()?.parent()?.to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&common)) {
        common = common.parent()?.to_owned();
    }
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&common).ok()?.to_str().filter(|rest| !rest.is_empty()))
        .collect();
    let lower = format!("lowerdir={}", relative?.join(":"));
    let data: Vec<&str> = data
        .iter()
        .map(|option| if option.starts_with("lowerdir=") { &lower } else { option.as_str() })
        .collect();
    let data = data.join(",");
    (data.len() <= DATA_MAX).then_some((common, data))
}

/// Mounts with `directory` as the working directory, in a thread that has one of its own.
fn mount_from(
    directory: &Path,
    source: &str,
    target: &Path,
    kind: &str,
    flags: MsFlags,
    data: &str,
) -> io::Result<()> {
    let target = std::path::absolute(target)?;
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_FS)?;
                nix::unistd::chdir(directory)?;
                mount(Some(source), &target, Some(OsStr::from_bytes(kind.as_bytes())), flags, Some(data))?;
                Ok(())
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(layers: usize) -> Vec<String> {
        let lower: Vec<String> = (0..layers)
            .map(|n| format!("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"))
            .collect();
        vec![format!("lowerdir={}", lower.join(":")), "upperdir=/u".into(), "workdir=/w".into()]
    }

    #[test]
    fn many_layers_become_relative_to_their_common_directory() {
        let (directory, data) = shorten(&overlay(100)).unwrap();
        assert_eq!(
            directory,
            Path::new("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots")
        );
        assert!(data.starts_with("lowerdir=0/fs:1/fs:2/fs:"), "{data}");
        assert!(data.ends_with(":99/fs,upperdir=/u,workdir=/w"), "{data}");
    }

    #[test]
    fn too_many_layers_are_an_error_of_their_own() {
        assert_eq!(shorten(&overlay(1000)), None);
        let layer = RootfsMount { kind: "overlay".into(), source: "overlay".into(), options: overlay(1000) };
        let error = Mounted::apply(&[layer], Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("4095")), "{error}");
    }

    #[test]
    fn a_failed_mount_says_what_and_where() {
        let layer = RootfsMount { kind: "nosuchfs".into(), source: "src".into(), options: vec![] };
        let error = Mounted::apply(&[layer], Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(error.starts_with("mounting nosuchfs src on /nonexistent: "), "{error}");
    }

    #[test]
    fn an_overlay_of_many_layers_is_mounted_and_goes() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounting needs root");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let layers =
            place.path().join("a-rather-long-name-for-a-directory-of-snapshots-so-that-a-page-is-too-short");
        let lower: Vec<String> =
            (0..60).map(|n| layers.join(format!("{n}/fs")).to_str().unwrap().to_owned()).collect();
        for (n, layer) in lower.iter().enumerate() {
            std::fs::create_dir_all(layer).unwrap();
            std::fs::write(Path::new(layer).join(format!("file-{n}")), n.to_string()).unwrap();
        }
        let target = place.path().join("rootfs");
        std::fs::create_dir(&target).unwrap();
        let options = vec![format!("lowerdir={}", lower.join(":"))];
        assert!(options[0].len() > DATA_MAX);
        let overlay = RootfsMount { kind: "overlay".into(), source: "overlay".into(), options };
        let over = RootfsMount {
            kind: "bind".into(),
            source: lower[0].clone(),
            options: vec!["rbind".into(), "ro".into()],
        };
        let mut mounted = Mounted::apply(&[overlay, over], &target).unwrap();
        let error = std::fs::write(target.join("x"), "").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1, "the bind is over the overlay");
        umount2(&target, MntFlags::MNT_DETACH).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("file-59")).unwrap(), "59");
        mounted.unmount().unwrap();
        drop(mounted);
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
    }
}
