//! Being PID 1 of a machine made for these tests.

use std::{fs, path::PathBuf};

use rustix::mount::{MountFlags, mount, mount_move};

/// The cgroup2 mount, in a VM only: elsewhere the machine's cgroups are not ours.
pub(crate) fn cgroup_mount() -> Option<PathBuf> {
    (std::process::id() == 1).then(|| "/sys/fs/cgroup".into())
}

/// Mounts what an agent would. An initramfs cannot be pivoted from, so that the root moves to a tmpfs first.
pub(crate) fn prepare() {
    let none = MountFlags::empty();
    fs::create_dir_all("/new").unwrap();
    mount("root", "/new", "tmpfs", none, c"mode=755").unwrap();
    for dir in ["bin", "proc", "sys", "dev", "tmp", "run"] {
        fs::create_dir(format!("/new/{dir}")).unwrap();
    }
    fs::copy("/bin/busybox", "/new/bin/busybox").unwrap();
    rustix::process::chdir("/new").unwrap();
    mount_move(".", "/").unwrap();
    rustix::process::chroot(".").unwrap();
    rustix::process::chdir("/").unwrap();
    mount("proc", "/proc", "proc", none, None).unwrap();
    mount("sysfs", "/sys", "sysfs", none, None).unwrap();
    mount("devtmpfs", "/dev", "devtmpfs", none, None).unwrap();
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", none, None).unwrap();
    println!("kernel {}", fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
}

/// The end.
pub(crate) fn power_off() {
    crate::sys::power_off().unwrap();
}
