//! What the drivers have in common: mount options, mount points that no symbolic link can move, and the mount itself.

use std::{
    ffi::CString,
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags},
};

use bulkhead_protocol::ports::GUEST_STATE;

use super::{Mounted, Undo};
use crate::error::{During, Error, Result};

/// Mount options, sorted into what the kernel takes as bits and what the file system takes as text.
#[derive(Debug, PartialEq)]
pub(super) struct Options {
    /// Bits for mount(2).
    pub(super) flags: MountFlags,
    /// `bind` or `rbind` was asked for, and whether recursively.
    pub(super) bind: Option<bool>,
    /// Propagation is changed after the mount.
    propagation: Option<MountPropagationFlags>,
    /// The rest, in order.
    pub(super) data: Vec<String>,
}

impl Options {
    /// Sorts the options of a storage; each element may itself be a comma-separated list.
    pub(super) fn parse(options: &[String]) -> Result<Options> {
        let mut parsed =
            Options { flags: MountFlags::empty(), bind: None, propagation: None, data: Vec::new() };
        for option in
            options.iter().flat_map(|list| list.split(',')).map(str::trim).filter(|option| !option.is_empty())
        {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<()> {
        if let Some((set, bits)) = flag(option) {
            self.flags.set(bits, set);
        } else if let Some(propagation) = propagation(option) {
            self.propagation = Some(propagation);
        } else {
            match option {
                "defaults" => {}
                "bind" => self.bind = Some(false),
                "rbind" => self.bind = Some(true),
                "loop" => return Err(Error::Unsupported("the mount option loop".into())),
                _ => self.data.push(option.to_owned()),
            }
        }
        Ok(())
    }

    /// Takes the value of a `key=value` option out of the rest.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let prefix = format!("{key}=");
        let index = self.data.iter().position(|option| option.starts_with(&prefix))?;
        Some(self.data.remove(index).split_off(prefix.len()))
    }

    /// Takes the group of `fsgid=<gid>` out of the rest.
    pub(super) fn take_group(&mut self) -> Result<Option<u32>> {
        let read =
            |gid: String| gid.parse().map_err(|_| Error::Invalid(format!("fsgid={gid} is not a group id")));
        self.take("fsgid").map(read).transpose()
    }
}

fn flag(option: &str) -> Option<(bool, MountFlags)> {
    Some(match option {
        "ro" => (true, MountFlags::RDONLY),
        "rw" => (false, MountFlags::RDONLY),
        "nosuid" => (true, MountFlags::NOSUID),
        "suid" => (false, MountFlags::NOSUID),
        "nodev" => (true, MountFlags::NODEV),
        "dev" => (false, MountFlags::NODEV),
        "noexec" => (true, MountFlags::NOEXEC),
        "exec" => (false, MountFlags::NOEXEC),
        "sync" => (true, MountFlags::SYNCHRONOUS),
        "async" => (false, MountFlags::SYNCHRONOUS),
        "dirsync" => (true, MountFlags::DIRSYNC),
        "noatime" => (true, MountFlags::NOATIME),
        "atime" => (false, MountFlags::NOATIME),
        "nodiratime" => (true, MountFlags::NODIRATIME),
        "diratime" => (false, MountFlags::NODIRATIME),
        "relatime" => (true, MountFlags::RELATIME),
        "norelatime" => (false, MountFlags::RELATIME),
        "strictatime" => (true, MountFlags::STRICTATIME),
        "nostrictatime" => (false, MountFlags::STRICTATIME),
        "lazytime" => (true, MountFlags::LAZYTIME),
        "nolazytime" => (false, MountFlags::LAZYTIME),
        "silent" => (true, MountFlags::SILENT),
        "loud" => (false, MountFlags::SILENT),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let (recursive, name) = match option.strip_prefix('r') {
        Some(name) => (MountPropagationFlags::REC, name),
        None => (MountPropagationFlags::empty(), option),
    };
    let kind = match name {
        "private" => MountPropagationFlags::PRIVATE,
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

/// A place to mount on: made if need be, and held by a descriptor, so that what was checked is what is used.
pub(super) struct Target {
    descriptor: OwnedFd,
    path: PathBuf,
    /// It was missing.
    made: bool,
    file: bool,
}

impl Target {
    /// A directory, made with those above it (0755) where missing.
    pub(super) fn directory(path: &str, mounted: &mut Mounted) -> Result<Target> {
        Ok(Self::walk(path, false)?.noted(mounted))
    }

    /// A file, made empty (0644) where missing.
    pub(super) fn file(path: &str, mounted: &mut Mounted) -> Result<Target> {
        Ok(Self::walk(path, true)?.noted(mounted))
    }

    /// What the agent made, it removes.
    fn noted(self, mounted: &mut Mounted) -> Target {
        match (self.made, self.file) {
            (false, _) => {}
            (true, false) => mounted.did(Undo::RemoveDirectory(self.path.clone())),
            (true, true) => mounted.did(Undo::RemoveFile(self.path.clone())),
        }
        self
    }

    /// Whether it was missing and is the agent's.
    pub(super) fn made(&self) -> bool {
        self.made
    }

    /// What is mounted on it, or would be hidden by a mount.
    pub(super) fn is_mount_point(&self) -> Result<bool> {
        let statx = rustix::fs::statx(&self.descriptor, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())
            .during(|| format!("look at {}", self.path.display()))?;
        Ok(statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    }

    /// Its path, as it was asked for.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A path to it that cannot be redirected while this lives.
    pub(super) fn fixed_path(&self) -> String {
        format!("/proc/self/fd/{}", self.descriptor.as_raw_fd())
    }

    /// Goes down one name at a time and follows no symbolic link: part of the way may be on a file system that others
    /// write to.
    fn walk(path: &str, file: bool) -> Result<Target> {
        let names = names(path)?;
        let what = || format!("prepare the mount point {path}");
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at = rustix::fs::open(c"/", flags | OFlags::DIRECTORY, Mode::empty()).during(what)?;
        let mut made = false;
        for (index, name) in names.iter().enumerate() {
            let last_file = file && index + 1 == names.len();
            let flags = if last_file { flags } else { flags | OFlags::DIRECTORY };
            at = match rustix::fs::openat(&at, *name, flags, Mode::empty()) {
                Err(Errno::NOENT) => {
                    made = make(&at, name, last_file).during(what)?;
                    rustix::fs::openat(&at, *name, flags, Mode::empty())
                }
                opened => opened,
            }
            .during(what)?;
        }
        Ok(Target { descriptor: at, path: PathBuf::from(path), made, file })
    }
}

/// Returns whether it was this call that made it.
fn make(at: &OwnedFd, name: &std::ffi::OsStr, file: bool) -> rustix::io::Result<bool> {
    let made = if file {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(at, name, flags, Mode::from_raw_mode(0o644)).map(drop)
    } else {
        rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755))
    };
    match made {
        Err(Errno::EXIST) => Ok(false),
        made => made.map(|()| true),
    }
}

/// A mount point as it is known by: absolute, without `..`, `.` and doubled slashes. In the agent's own guest it lies where
/// the hosts put theirs, below [`GUEST_STATE`] or, of a host that is not root, a user's runtime directory: a mount anywhere
/// else could only cover what the agent itself stands on.
pub(super) fn point(path: &str, own_guest: bool) -> Result<String> {
    let path =
        names(path)?.iter().fold(String::new(), |path, name| format!("{path}/{}", name.to_string_lossy()));
    let below = |parent: &str| path.strip_prefix(parent).is_some_and(|rest| rest.starts_with('/'));
    if own_guest && !below(GUEST_STATE) && !below("/run/user") {
        return Err(Error::Invalid(format!(
            "the mount point {path:?} is outside {GUEST_STATE}, where storages belong"
        )));
    }
    Ok(path)
}

/// The names on an absolute path without `..`.
fn names(path: &str) -> Result<Vec<&std::ffi::OsStr>> {
    let invalid =
        || Error::Invalid(format!("the mount point {path:?} must be an absolute path without \"..\""));
    let mut names = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => names.push(name),
            _ => return Err(invalid()),
        }
    }
    if !path.starts_with('/') || names.is_empty() { Err(invalid()) } else { Ok(names) }
}

/// Mounts a file system on a target.
pub(super) fn mount(
    source: &str,
    target: &Target,
    fstype: &str,
    options: &Options,
    mounted: &mut Mounted,
) -> Result<()> {
    let what = || format!("mount {fstype} {source:?} on {}", target.path.display());
    let data = options.data.join(",");
    // The kernel reads one page and would silently cut the rest.
    if data.len() >= 4096 {
        return Err(Error::Invalid(format!("{}: the options are longer than 4095 bytes", what())));
    }
    let data = CString::new(data).during(what)?;
    rustix::mount::mount(source, target.fixed_path(), fstype, options.flags, data.as_c_str()).during(what)?;
    mounted.did(Undo::Unmount(target.path.clone()));
    propagate(target, options)
}

/// Binds a file or directory to a target. Flags need a second call: the first one ignores them.
pub(super) fn bind(source: &Target, target: &Target, options: &Options, mounted: &mut Mounted) -> Result<()> {
    let what = || format!("bind {} to {}", source.path.display(), target.path.display());
    let (from, to) = (source.fixed_path(), target.fixed_path());
    if options.bind == Some(true) {
        rustix::mount::mount_bind_recursive(from, to).during(what)?;
    } else {
        rustix::mount::mount_bind(from, to).during(what)?;
    }
    mounted.did(Undo::Unmount(target.path.clone()));
    if !options.flags.is_empty() {
        let flags = options.flags | MountFlags::BIND;
        rustix::mount::mount_remount(&target.path, flags, c"").during(what)?;
    }
    propagate(target, options)
}

fn propagate(target: &Target, options: &Options) -> Result<()> {
    match options.propagation {
        // By path: the descriptor still refers to what the mount has covered.
        Some(propagation) => rustix::mount::mount_change(&target.path, propagation)
            .during(|| format!("set the propagation of {}", target.path.display())),
        None => Ok(()),
    }
}

/// Opens what is to be bound, without following a symbolic link on the way.
pub(super) fn source(path: &str) -> Result<(Target, bool)> {
    let mut at = rustix::fs::open(c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during(|| "open /".into())?;
    for name in names(path)? {
        at = rustix::fs::openat(&at, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("open {path}, the source of a mount"))?;
    }
    let status = rustix::fs::fstat(&at).during(|| format!("look at {path}"))?;
    let directory = rustix::fs::FileType::from_raw_mode(status.st_mode).is_dir();
    Ok((Target { descriptor: at, path: PathBuf::from(path), made: false, file: !directory }, directory))
}

/// Hands a directory to a group, whose members then own what is made in it.
pub(super) fn give_to_group(path: &Path, gid: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let what = || format!("give {} to group {gid}", path.display());
    std::os::unix::fs::chown(path, None, Some(gid)).during(what)?;
    let mode = std::fs::metadata(path).during(what)?.permissions().mode();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode | 0o2000)).during(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn options_are_sorted_into_bits_and_text() {
        let cases: &[(&[&str], MountFlags, &[&str])] = &[
            (&[], MountFlags::empty(), &[]),
            (&["defaults", ""], MountFlags::empty(), &[]),
            (
                &["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"],
                MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV,
                &["mode=1777", "size=67108864"],
            ),
            (&["ro,dax", "rw"], MountFlags::empty(), &["dax"]),
        ];
        for (options, flags, data) in cases {
            let parsed = parse(options);
            assert_eq!((parsed.flags, &parsed.data[..]), (*flags, &data.map_strings()[..]), "{options:?}");
        }
        assert_eq!(parse(&["rbind", "rslave"]).bind, Some(true));
        assert_eq!(
            parse(&["rbind", "rslave"]).propagation,
            Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        );
        assert!(Options::parse(&["loop".to_owned()]).is_err());
    }

    trait Strings {
        fn map_strings(&self) -> Vec<String>;
    }

    impl Strings for &[&str] {
        fn map_strings(&self) -> Vec<String> {
            self.iter().map(|text| (*text).to_owned()).collect()
        }
    }

    #[test]
    fn a_value_is_taken_out() {
        let mut options = parse(&["fsgid=5", "size=1k"]);
        assert_eq!(options.take("fsgid").as_deref(), Some("5"));
        assert_eq!(options.take("fsgid"), None);
        assert_eq!(options.data, ["size=1k"]);
        assert_eq!(parse(&["size=1k", "fsgid=5"]).take_group().unwrap(), Some(5));
        assert_eq!(parse(&["size=1k"]).take_group().unwrap(), None);
        assert!(parse(&["fsgid=-1"]).take_group().is_err());
    }

    #[test]
    fn mount_points_are_plain_absolute_paths() {
        for path in ["", "/", "a", "./a", "/a/../b"] {
            assert!(matches!(names(path), Err(Error::Invalid(_))), "{path:?}");
        }
        assert_eq!(point("/a//b/./", false).unwrap(), "/a/b");
    }

    #[test]
    fn in_its_own_guest_a_storage_is_where_hosts_put_theirs() {
        for path in ["/run/kata-containers/sandbox/shm/", "/run/user/1000/run/kata-containers/x"] {
            point(path, true).unwrap();
        }
        for path in
            ["/proc", "/run", "/run/kata-containers", "/run/kata-containers-x/y", "/dev/shm", "/run/../x"]
        {
            let error = point(path, true).unwrap_err();
            assert!(matches!(&error, Error::Invalid(text) if text.contains(path)), "{error}");
        }
    }

    #[test]
    fn a_symbolic_link_on_the_way_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("link")).unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let mut mounted = Mounted::default();
        assert!(Target::directory(&path("link/a"), &mut mounted).is_err());
        assert!(Target::directory(&path("link"), &mut mounted).is_err());
        assert!(
            source(&path("link")).map(|(target, _)| target.path).is_ok_and(|_| true),
            "a link itself can be bound"
        );
        assert!(source(&path("link/tmp")).is_err());
        assert!(!Target::directory(&path("a/b"), &mut mounted).unwrap().is_mount_point().unwrap());
        Target::file(&path("a/c"), &mut mounted).unwrap();
        assert!(directory.path().join("a/c").is_file());
        // A second look makes nothing, so there is nothing more to undo.
        Target::file(&path("a/c"), &mut mounted).unwrap();
        let made = [Undo::RemoveDirectory(path("a/b").into()), Undo::RemoveFile(path("a/c").into())];
        assert_eq!(mounted.undo, made);
    }
}
