//! The container's file system: mounts, devices, and what is protected in it.

use bulkhead_protocol::oci;
use serde::{Deserialize, Serialize};

use super::{
    MountKind, MountPlan, NamespaceKind, NamespacePlan, absolute,
    mounts::{ATTR_RDONLY, Attributes, CgroupView},
    no_nul,
};
use crate::Error;

/// The file system to make.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RootfsPlan {
    /// The directory that becomes the root.
    pub(crate) path: String,
    /// Whether mounts travel between container and caller.
    pub(crate) propagation: Propagation,
    /// The root is read-only in the end.
    pub(crate) readonly: bool,
    /// In this order.
    pub(crate) mounts: Vec<MountPlan>,
    /// Device nodes, the default ones included. Empty when the caller's own `/dev` is the container's.
    pub(crate) devices: Vec<Device>,
    /// The links that belong beside the device nodes.
    pub(crate) device_links: bool,
    /// `/dev` becomes read-only once it is filled.
    pub(crate) readonly_dev: bool,
    /// To be hidden.
    pub(crate) masked: Vec<String>,
    /// To be made read-only.
    pub(crate) readonly_paths: Vec<String>,
}

/// Which mounts travel between the container and the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Propagation {
    /// The caller's reach the container.
    #[default]
    Slave,
    /// None.
    Private,
    /// None, and the root cannot be bound elsewhere.
    Unbindable,
    /// Those below shared binds, both ways.
    Shared,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device {
    /// Inside the container.
    pub(crate) path: String,
    /// What the node is.
    pub(crate) kind: DeviceKind,
    /// Device number, major.
    pub(crate) major: u32,
    /// Device number, minor.
    pub(crate) minor: u32,
    /// Permissions.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
}

/// What a device node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DeviceKind {
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
}

/// What the OCI specification promises every container.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

impl RootfsPlan {
    /// What the spec asks for.
    pub(super) fn new(
        spec: &oci::Spec,
        linux: &oci::Linux,
        cgroup: Option<&str>,
    ) -> Result<RootfsPlan, Error> {
        let root = spec.Root.as_ref().ok_or_else(|| Error::Invalid("the spec has no root".to_owned()))?;
        let path = absolute("root path", &root.Path)?;
        no_nul("mount label", &linux.MountLabel)?;
        let view = match (cgroup, NamespacePlan::new(&linux.Namespaces)?.has(NamespaceKind::Cgroup)) {
            (None, _) => CgroupView::Absent,
            (Some(_), true) => CgroupView::Namespace,
            (Some(dir), false) => CgroupView::Shared(dir),
        };
        let mut mounts = spec
            .Mounts
            .iter()
            .map(|m| MountPlan::new(m, view, &linux.MountLabel))
            .collect::<Result<Vec<_>, _>>()?;
        let own_dev = !mounts.iter().any(|m| is_dev(m) && matches!(m.kind, MountKind::Bind { .. }));
        let paths = |what, list: &[String]| list.iter().map(|p| absolute(what, p)).collect::<Result<_, _>>();
        Ok(RootfsPlan {
            path,
            propagation: propagation(&linux.RootfsPropagation)?,
            readonly: root.Readonly,
            devices: if own_dev { devices(&linux.Devices)? } else { Vec::new() },
            device_links: own_dev,
            readonly_dev: own_dev && defer_readonly_dev(&mut mounts),
            mounts,
            masked: paths("masked path", &linux.MaskedPaths)?,
            readonly_paths: paths("read-only path", &linux.ReadonlyPaths)?,
        })
    }
}

fn is_dev(mount: &MountPlan) -> bool {
    mount.target.trim_end_matches('/') == "/dev"
}

/// A read-only `/dev` must be filled first. Takes the flag off the mount; returns whether it was there.
fn defer_readonly_dev(mounts: &mut [MountPlan]) -> bool {
    let Some(dev) = mounts.iter_mut().rfind(|m| is_dev(m)) else { return false };
    let MountKind::Filesystem { flags, .. } = &mut dev.kind else { return false };
    let readonly = *flags & libc::MS_RDONLY != 0;
    *flags &= !libc::MS_RDONLY;
    readonly
}

fn propagation(text: &str) -> Result<Propagation, Error> {
    Ok(match text {
        "" | "slave" | "rslave" => Propagation::Slave,
        "private" | "rprivate" => Propagation::Private,
        "unbindable" | "runbindable" => Propagation::Unbindable,
        "shared" | "rshared" => Propagation::Shared,
        _ => return Err(Error::Invalid(format!("unknown rootfs propagation {text:?}"))),
    })
}

/// The devices of the spec, and those default ones that it does not list itself.
fn devices(list: &[oci::LinuxDevice]) -> Result<Vec<Device>, Error> {
    let mut devices = list.iter().map(device).collect::<Result<Vec<_>, _>>()?;
    for (path, major, minor) in DEFAULT_DEVICES {
        if !devices.iter().any(|d| d.path == path) {
            let kind = DeviceKind::Char;
            devices.push(Device { path: path.into(), kind, major, minor, mode: 0o666, uid: 0, gid: 0 });
        }
    }
    Ok(devices)
}

fn device(device: &oci::LinuxDevice) -> Result<Device, Error> {
    let path = absolute("device path", &device.Path)?;
    let kind = match device.Type.as_str() {
        "c" | "u" => DeviceKind::Char,
        "b" => DeviceKind::Block,
        "p" => DeviceKind::Fifo,
        other => return Err(Error::Invalid(format!("device {path}: unknown type {other:?}"))),
    };
    let number = |what: &str, number: i64| {
        u32::try_from(number).map_err(|_| Error::Invalid(format!("device {path}: {what} {number}")))
    };
    let (major, minor) = match kind {
        DeviceKind::Fifo => (0, 0),
        _ => (number("major", device.Major)?, number("minor", device.Minor)?),
    };
    let mode = if device.FileMode == 0 { 0o666 } else { device.FileMode & 0o7777 };
    Ok(Device { path, kind, major, minor, mode, uid: device.UID, gid: device.GID })
}

impl RootfsPlan {
    /// The attribute that makes a mount read-only.
    pub(crate) const READONLY: Attributes = Attributes { set: ATTR_RDONLY, clear: 0 };
}

#[cfg(test)]
mod tests {
    use super::{
        super::test_spec::{minimal, namespace},
        *,
    };

    fn rootfs(change: impl FnOnce(&mut oci::Spec)) -> Result<RootfsPlan, Error> {
        let mut spec = minimal();
        change(&mut spec);
        RootfsPlan::new(&spec, &spec.Linux, Some("/cg/c1"))
    }

    fn mount(destination: &str, type_: &str, options: &[&str]) -> oci::Mount {
        oci::Mount {
            destination: destination.into(),
            source: "/src".into(),
            type_: type_.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn default_devices_are_added_unless_listed() {
        assert_eq!(rootfs(|_| {}).unwrap().devices.len(), 6);
        let plan = rootfs(|s| {
            s.Linux.as_mut().unwrap().Devices.push(oci::LinuxDevice {
                Path: "/dev/null".into(),
                Type: "c".into(),
                Major: 1,
                Minor: 3,
                FileMode: 0o20600,
                UID: 5,
                ..Default::default()
            });
        })
        .unwrap();
        assert_eq!(plan.devices.len(), 6);
        assert_eq!((plan.devices[0].mode, plan.devices[0].uid), (0o600, 5));
    }

    #[test]
    fn a_bound_dev_is_left_alone() {
        let plan = rootfs(|s| s.Mounts.push(mount("/dev/", "bind", &["rbind"]))).unwrap();
        assert!(plan.devices.is_empty() && !plan.device_links);
    }

    #[test]
    fn a_read_only_dev_is_made_so_after_it_is_filled() {
        let plan = rootfs(|s| s.Mounts.push(mount("/dev", "tmpfs", &["ro", "nosuid"]))).unwrap();
        assert!(plan.readonly_dev);
        let MountKind::Filesystem { flags, .. } = plan.mounts[0].kind else { panic!() };
        assert_eq!(flags, libc::MS_NOSUID);
    }

    #[test]
    fn the_view_of_cgroups_follows_the_namespaces() {
        let cgroup = || mount("/sys/fs/cgroup", "cgroup", &["ro"]);
        let plan = rootfs(|s| s.Mounts.push(cgroup())).unwrap();
        assert_eq!(plan.mounts[0].kind, MountKind::Bind { source: "/cg/c1".into(), recursive: false });
        let plan = rootfs(|s| {
            s.Mounts.push(cgroup());
            s.Linux.as_mut().unwrap().Namespaces.push(namespace("cgroup"));
        })
        .unwrap();
        assert!(matches!(&plan.mounts[0].kind, MountKind::Filesystem { fstype, .. } if fstype == "cgroup2"));
    }

    #[test]
    fn bad_values_are_refused() {
        let linux = |change: fn(&mut oci::Linux)| rootfs(|s| change(s.Linux.as_mut().unwrap())).unwrap_err();
        for (error, text) in [
            (linux(|l| l.RootfsPropagation = "odd".into()), "propagation"),
            (linux(|l| l.MaskedPaths.push("proc".into())), "not absolute"),
            (linux(|l| l.ReadonlyPaths.push("/a/../b".into())), "\"..\""),
            (linux(|l| l.Devices.push(oci::LinuxDevice::new())), "not absolute"),
            (linux(|l| l.MountLabel = "a\0b".into()), "NUL"),
            (rootfs(|s| s.Root.as_mut().unwrap().Path = "rootfs".into()).unwrap_err(), "not absolute"),
        ] {
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
