//! Mounts: what the options of an OCI mount mean to the kernel.

use bulkhead_protocol::oci;
use serde::{Deserialize, Serialize};

use super::{absolute, no_nul};
use crate::Error;

/// A mount to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountPlan {
    /// Where, inside the container.
    pub(crate) target: String,
    /// What.
    pub(crate) kind: MountKind,
    /// Attributes of the mount itself; a file system gets them by its flags instead.
    pub(crate) attributes: Attributes,
    /// Attributes of the mount and all below it (`rro` and its like).
    pub(crate) recursive_attributes: Attributes,
    /// Propagation to set, in order, and whether for the mounts below too.
    pub(crate) propagation: Vec<(u64, bool)>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MountKind {
    /// A file or directory of the caller's.
    Bind {
        /// Which.
        source: String,
        /// With the mounts below it.
        recursive: bool,
    },
    /// A file system.
    Filesystem {
        /// Its type.
        fstype: String,
        /// Its device, or a name.
        source: String,
        /// `MS_*`.
        flags: u64,
        /// Its own options.
        data: String,
    },
}

/// `MOUNT_ATTR_*` to set and to clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attributes {
    /// To set.
    pub(crate) set: u64,
    /// To clear.
    pub(crate) clear: u64,
}

impl Attributes {
    /// Whether there is nothing to change.
    pub(crate) fn is_empty(self) -> bool {
        self == Attributes::default()
    }

    fn apply(&mut self, set: u64, clear: u64) {
        // The kernel wants the access time policy cleared as a whole whenever a part of it is set.
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear | clear) & !(set & !ATTR_ATIME);
    }
}

/// How the container sees cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CgroupView<'p> {
    /// Through a namespace of its own.
    Namespace,
    /// Through the caller's namespace: its own directory is bound, which shows none of the others.
    Shared(&'p str),
    /// There are none.
    Absent,
}

pub(crate) const ATTR_RDONLY: u64 = 0x1;
const ATTR_NOSUID: u64 = 0x2;
const ATTR_NODEV: u64 = 0x4;
const ATTR_NOEXEC: u64 = 0x8;
const ATTR_ATIME: u64 = 0x70;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

/// An option that concerns the mount: its name, the `MS_*` flag and whether it is set or cleared, and what that is as
/// attributes to set and to clear. The latter exist with an `r` in front of their name too, for a whole tree.
type FlagOption = (&'static str, u64, bool, u64, u64);

const ATTRIBUTE_OPTIONS: [FlagOption; 18] = [
    ("ro", libc::MS_RDONLY, true, ATTR_RDONLY, 0),
    ("rw", libc::MS_RDONLY, false, 0, ATTR_RDONLY),
    ("nosuid", libc::MS_NOSUID, true, ATTR_NOSUID, 0),
    ("suid", libc::MS_NOSUID, false, 0, ATTR_NOSUID),
    ("nodev", libc::MS_NODEV, true, ATTR_NODEV, 0),
    ("dev", libc::MS_NODEV, false, 0, ATTR_NODEV),
    ("noexec", libc::MS_NOEXEC, true, ATTR_NOEXEC, 0),
    ("exec", libc::MS_NOEXEC, false, 0, ATTR_NOEXEC),
    ("nodiratime", libc::MS_NODIRATIME, true, ATTR_NODIRATIME, 0),
    ("diratime", libc::MS_NODIRATIME, false, 0, ATTR_NODIRATIME),
    ("noatime", libc::MS_NOATIME, true, ATTR_NOATIME, ATTR_ATIME),
    ("atime", libc::MS_NOATIME, false, 0, ATTR_ATIME),
    ("relatime", libc::MS_RELATIME, true, 0, ATTR_ATIME),
    ("norelatime", libc::MS_RELATIME, false, 0, ATTR_ATIME),
    ("strictatime", libc::MS_STRICTATIME, true, ATTR_STRICTATIME, ATTR_ATIME),
    ("nostrictatime", libc::MS_STRICTATIME, false, 0, ATTR_ATIME),
    ("nosymfollow", MS_NOSYMFOLLOW, true, ATTR_NOSYMFOLLOW, 0),
    ("symfollow", MS_NOSYMFOLLOW, false, 0, ATTR_NOSYMFOLLOW),
];

/// Options that concern the file system only.
const SUPERBLOCK_OPTIONS: [(&str, u64, bool); 14] = [
    ("sync", libc::MS_SYNCHRONOUS, true),
    ("async", libc::MS_SYNCHRONOUS, false),
    ("dirsync", libc::MS_DIRSYNC, true),
    ("mand", libc::MS_MANDLOCK, true),
    ("nomand", libc::MS_MANDLOCK, false),
    ("lazytime", MS_LAZYTIME, true),
    ("nolazytime", MS_LAZYTIME, false),
    ("iversion", libc::MS_I_VERSION, true),
    ("noiversion", libc::MS_I_VERSION, false),
    ("silent", libc::MS_SILENT, true),
    ("loud", libc::MS_SILENT, false),
    ("acl", libc::MS_POSIXACL, true),
    ("noacl", libc::MS_POSIXACL, false),
    ("remount", libc::MS_REMOUNT, true),
];

const MS_NOSYMFOLLOW: u64 = 256;
const MS_LAZYTIME: u64 = 1 << 25;

/// Everything that the options of one mount say.
#[derive(Default)]
struct Options {
    flags: u64,
    bind: Option<bool>,
    attributes: Attributes,
    recursive_attributes: Attributes,
    propagation: Vec<(u64, bool)>,
    data: Vec<String>,
}

impl Options {
    fn parse(options: &[String]) -> Result<Options, Error> {
        let mut parsed = Options::default();
        for option in options {
            no_nul("mount option", option)?;
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<(), Error> {
        let named = |name: &str| ATTRIBUTE_OPTIONS.iter().find(|o| o.0 == name);
        if let Some(&(_, flag, on, set, clear)) = named(option) {
            self.flag(flag, on);
            self.attributes.apply(set, clear);
        } else if let Some(&(_, flag, on)) = SUPERBLOCK_OPTIONS.iter().find(|o| o.0 == option) {
            self.flag(flag, on);
        } else if let Some(&(.., set, clear)) = option.strip_prefix('r').and_then(named) {
            self.recursive_attributes.apply(set, clear);
        } else if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
        } else {
            match option {
                "bind" => self.bind = Some(self.bind.unwrap_or(false)),
                "rbind" => self.bind = Some(true),
                "defaults" | "" => {}
                "idmap" | "ridmap" | "tmpcopyup" => {
                    return Err(Error::Unsupported(format!("mount option {option:?}")));
                }
                data => self.data.push(data.to_owned()),
            }
        }
        Ok(())
    }

    fn flag(&mut self, flag: u64, on: bool) {
        if on { self.flags |= flag } else { self.flags &= !flag }
    }
}

/// `private`, `rslave`, ...: the `MS_*` flag, and whether it is for the whole tree.
fn propagation(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "shared" => (libc::MS_SHARED, false),
        "rshared" => (libc::MS_SHARED, true),
        "slave" => (libc::MS_SLAVE, false),
        "rslave" => (libc::MS_SLAVE, true),
        "private" => (libc::MS_PRIVATE, false),
        "rprivate" => (libc::MS_PRIVATE, true),
        "unbindable" => (libc::MS_UNBINDABLE, false),
        "runbindable" => (libc::MS_UNBINDABLE, true),
        _ => return None,
    })
}

impl MountPlan {
    /// What a mount of the spec asks for. `label` is the SELinux label for file systems, if any.
    pub(super) fn new(mount: &oci::Mount, view: CgroupView<'_>, label: &str) -> Result<MountPlan, Error> {
        let target = absolute("mount destination", &mount.destination)?;
        no_nul("mount source", &mount.source)?;
        no_nul("mount type", &mount.type_)?;
        let options = Options::parse(&mount.options)?;
        let remount = options.flags & libc::MS_REMOUNT != 0;
        let kind = if (options.bind.is_some() || mount.type_ == "bind") && !remount {
            if !mount.source.starts_with('/') {
                return Err(Error::Invalid(format!(
                    "bind mount at {target}: source {:?} is not absolute",
                    mount.source
                )));
            }
            MountKind::Bind { source: mount.source.clone(), recursive: options.bind.unwrap_or(false) }
        } else if matches!(mount.type_.as_str(), "cgroup" | "cgroup2") {
            cgroup(view, options.flags)
        } else {
            filesystem(mount, &options, label)?
        };
        Ok(MountPlan {
            target,
            attributes: match kind {
                MountKind::Filesystem { .. } => Attributes::default(),
                _ => options.attributes,
            },
            kind,
            recursive_attributes: options.recursive_attributes,
            propagation: options.propagation,
        })
    }
}

/// Version 1's type names all of them; there is only version 2 here.
fn cgroup(view: CgroupView<'_>, flags: u64) -> MountKind {
    let filesystem = |fstype: &str, flags, data: &str| MountKind::Filesystem {
        fstype: fstype.to_owned(),
        source: "cgroup".to_owned(),
        flags,
        data: data.to_owned(),
    };
    match view {
        CgroupView::Namespace => filesystem("cgroup2", flags, ""),
        CgroupView::Shared(dir) => MountKind::Bind { source: dir.to_owned(), recursive: false },
        // An empty directory says that there are none, without showing the caller's.
        CgroupView::Absent => filesystem("tmpfs", flags | libc::MS_RDONLY, "size=4k,nr_inodes=1,mode=755"),
    }
}

fn filesystem(mount: &oci::Mount, options: &Options, label: &str) -> Result<MountKind, Error> {
    let bind = if options.bind.is_some() { libc::MS_BIND } else { 0 };
    if matches!(mount.type_.as_str(), "" | "none") && options.flags & libc::MS_REMOUNT == 0 {
        return Err(Error::Invalid(format!(
            "mount at {} has neither a type nor \"bind\"",
            mount.destination
        )));
    }
    let mut data = options.data.clone();
    if !label.is_empty() && !matches!(mount.type_.as_str(), "proc" | "sysfs" | "mqueue") {
        data.push(format!("context=\"{label}\""));
    }
    Ok(MountKind::Filesystem {
        fstype: mount.type_.clone(),
        source: if mount.source.is_empty() { mount.type_.clone() } else { mount.source.clone() },
        flags: options.flags | bind,
        data: data.join(","),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(type_: &str, source: &str, options: &[&str]) -> Result<MountPlan, Error> {
        let mount = oci::Mount {
            destination: "/mnt".into(),
            source: source.into(),
            type_: type_.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Default::default()
        };
        MountPlan::new(&mount, CgroupView::Namespace, "")
    }

    fn filesystem(type_: &str, options: &[&str]) -> (u64, String) {
        match plan(type_, "src", options).unwrap().kind {
            MountKind::Filesystem { flags, data, .. } => (flags, data),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_of_a_file_system_become_flags_and_data() {
        let (flags, data) = filesystem("tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(flags, libc::MS_NOSUID | libc::MS_STRICTATIME);
        assert_eq!(data, "mode=755,size=65536k");
        assert_eq!(filesystem("tmpfs", &["ro", "rw", "defaults"]), (0, String::new()));
        assert_eq!(filesystem("xfs", &["sync", "lazytime"]).0, libc::MS_SYNCHRONOUS | 1 << 25);
    }

    #[test]
    fn options_of_a_bind_become_attributes() {
        let bind = plan("none", "/src", &["rbind", "rprivate", "ro", "nosuid"]).unwrap();
        assert_eq!(bind.kind, MountKind::Bind { source: "/src".into(), recursive: true });
        assert_eq!(bind.attributes, Attributes { set: ATTR_RDONLY | ATTR_NOSUID, clear: 0 });
        assert_eq!(bind.propagation, [(libc::MS_PRIVATE, true)]);

        let later = plan("bind", "/src", &["ro", "rw"]).unwrap();
        assert_eq!(later.kind, MountKind::Bind { source: "/src".into(), recursive: false });
        assert_eq!(later.attributes, Attributes { set: 0, clear: ATTR_RDONLY });
        let earlier = plan("bind", "/src", &["rw", "ro"]).unwrap();
        assert_eq!(earlier.attributes, Attributes { set: ATTR_RDONLY, clear: 0 });
    }

    #[test]
    fn an_access_time_policy_replaces_the_one_before() {
        let bind = plan("bind", "/src", &["noatime", "strictatime"]).unwrap();
        assert_eq!(bind.attributes, Attributes { set: ATTR_STRICTATIME, clear: ATTR_ATIME });
        let bind = plan("bind", "/src", &["noatime", "relatime"]).unwrap();
        assert_eq!(bind.attributes, Attributes { set: 0, clear: ATTR_ATIME });
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let bind = plan("bind", "/src", &["rbind", "rro", "rnosuid"]).unwrap();
        assert!(bind.attributes.is_empty());
        assert_eq!(bind.recursive_attributes, Attributes { set: ATTR_RDONLY | ATTR_NOSUID, clear: 0 });
    }

    #[test]
    fn cgroup_mounts_depend_on_what_there_is() {
        let mount = |view| {
            let mount = oci::Mount {
                destination: "/sys/fs/cgroup".into(),
                type_: "cgroup".into(),
                options: vec!["ro".into(), "nosuid".into()],
                ..Default::default()
            };
            MountPlan::new(&mount, view, "").unwrap()
        };
        let ro = libc::MS_RDONLY | libc::MS_NOSUID;
        for (view, wanted) in [(CgroupView::Namespace, "cgroup2"), (CgroupView::Absent, "tmpfs")] {
            let MountKind::Filesystem { fstype, flags, .. } = mount(view).kind else { panic!() };
            assert_eq!((fstype.as_str(), flags), (wanted, ro));
        }
        let own = mount(CgroupView::Shared("/sys/fs/cgroup/c1"));
        assert_eq!(own.kind, MountKind::Bind { source: "/sys/fs/cgroup/c1".into(), recursive: false });
        assert_eq!(own.attributes.set, ATTR_RDONLY | ATTR_NOSUID);
    }

    #[test]
    fn a_label_goes_to_file_systems_that_take_one() {
        for (type_, wanted) in [("tmpfs", "size=1,context=\"a:b\""), ("proc", "size=1")] {
            let mount = oci::Mount {
                destination: "/x".into(),
                type_: type_.into(),
                options: vec!["size=1".into()],
                ..Default::default()
            };
            let plan = MountPlan::new(&mount, CgroupView::Absent, "a:b").unwrap();
            let MountKind::Filesystem { data, .. } = plan.kind else { panic!() };
            assert_eq!(data, wanted);
        }
    }

    #[test]
    fn bad_mounts_are_refused() {
        for (type_, source, options, text) in [
            ("bind", "relative", vec![], "not absolute"),
            ("", "x", vec!["ro"], "neither a type"),
            ("tmpfs", "x", vec!["tmpcopyup"], "not supported"),
            ("bind", "/x", vec!["idmap"], "not supported"),
            ("tmpfs", "x", vec!["size=1\0"], "NUL"),
        ] {
            let error = plan(type_, source, &options).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        for destination in ["proc", "/a/../b"] {
            let mount =
                oci::Mount { destination: destination.into(), type_: "proc".into(), ..Default::default() };
            assert!(MountPlan::new(&mount, CgroupView::Absent, "").is_err());
        }
    }
}
