//! Container configurations, as an engine would send them.

use bulkhead_protocol::{oci, protobuf::MessageField};

/// Capabilities of a container by default, in the usual engines' choice.
const CAPABILITIES: [&str; 6] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"];

/// A complete configuration that runs a command in a root file system of the guest. In a VM containers have a cgroup
/// (named by `cgroup`), without one there may be none that can limit.
pub fn spec(rootfs: &str, command: &[&str]) -> oci::Spec {
    let namespace = |kind: &str| oci::LinuxNamespace { Type: kind.into(), ..Default::default() };
    oci::Spec {
        Version: "1.0.2".into(),
        Process: MessageField::some(process(command)),
        Root: MessageField::some(oci::Root { Path: rootfs.into(), ..Default::default() }),
        Mounts: vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount(
                "/dev/pts",
                "devpts",
                "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
            ),
        ],
        Linux: MessageField::some(oci::Linux {
            Namespaces: ["ipc", "uts", "mount", "network"].map(namespace).to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A mount of a container.
pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.into(),
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    }
}

/// A process that runs a command, without a terminal.
pub fn process(command: &[&str]) -> oci::Process {
    let mut process = oci::Process {
        Args: command.iter().map(|argument| (*argument).to_owned()).collect(),
        Env: vec!["PATH=/bin".into(), "TERM=xterm".into()],
        Cwd: "/".into(),
        ..Default::default()
    };
    grant(&mut process, &CAPABILITIES);
    process
}

/// Gives a process these capabilities and no others.
pub fn grant(process: &mut oci::Process, capabilities: &[&str]) {
    let set = || capabilities.iter().map(|capability| (*capability).to_owned()).collect::<Vec<_>>();
    process.Capabilities = MessageField::some(oci::LinuxCapabilities {
        Bounding: set(),
        Effective: set(),
        Permitted: set(),
        ..Default::default()
    });
}
