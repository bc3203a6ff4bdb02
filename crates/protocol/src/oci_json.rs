//! The OCI runtime configuration (`config.json`, as oci-spec parses it) as the wire's messages; for the host.
//!
//! A field that would change what the container is and that the wire has no place for is an [`Unrepresentable`] error,
//! never dropped. proto3 scalars have no presence, so "absent" is a value of its own:
//!
//! | field | absent | special values that are passed on |
//! |---|---|---|
//! | memory `limit`, `reservation`, `swap`, `kernel`, `kernelTCP` | 0 | -1 is unlimited |
//! | memory `swappiness` | 0 (an explicit 0 cannot be told from it) | |
//! | cpu `quota`, `realtimeRuntime` | 0 | -1 is unlimited |
//! | cpu `shares`, `period`, `realtimePeriod` | 0 | |
//! | pids `limit` | the whole message is absent | 0 or less is unlimited |
//! | block I/O weights, network class id | 0 | |
//! | device rule `major`, `minor` | -1, any number | -1 is the specification's own wildcard |
//! | device node `fileMode`, `uid`, `gid` | 0: mode 0666, root | |
//! | `oomScoreAdj` | 0: left alone | |
//! | hook `timeout` | 0: no limit of its own | |
//! | capabilities, resources and their parts, seccomp, hooks | the message is absent | |

use std::{collections::HashMap, fmt, path::Path};

use oci_spec::runtime as json;
use protobuf::MessageField;

use crate::oci;

/// A field of the configuration that the wire cannot carry, named as in `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unrepresentable {
    /// The field.
    pub field: &'static str,
}

impl fmt::Display for Unrepresentable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the container configuration's {}", self.field)
    }
}

impl std::error::Error for Unrepresentable {}

type Result<T> = std::result::Result<T, Unrepresentable>;

/// The whole configuration.
pub fn spec(spec: &json::Spec) -> Result<oci::Spec> {
    refuse(spec.solaris().is_some(), "solaris section")?;
    refuse(spec.windows().is_some(), "windows section")?;
    refuse(spec.vm().is_some(), "vm section")?;
    refuse(spec.zos().is_some(), "zos section")?;
    refuse(text(spec.domainname()).is_some(), "domainname")?;
    Ok(oci::Spec {
        Version: spec.version().clone(),
        Process: field(spec.process(), process)?,
        Root: field(spec.root(), root)?,
        Hostname: spec.hostname().clone().unwrap_or_default(),
        Mounts: list(spec.mounts(), mount)?,
        Hooks: field(spec.hooks(), hooks)?,
        Annotations: spec.annotations().clone().unwrap_or_default(),
        Linux: field(spec.linux(), linux)?,
        ..Default::default()
    })
}

/// A process: a container's own, or an exec's.
pub fn process(process: &json::Process) -> Result<oci::Process> {
    refuse(process.io_priority().is_some(), "process.ioPriority")?;
    refuse(process.scheduler().is_some(), "process.scheduler")?;
    refuse(process.exec_cpu_affinity().is_some(), "process.execCPUAffinity")?;
    refuse(process.user().umask().is_some(), "process.user.umask")?;
    let user = process.user();
    let console = process.console_size();
    Ok(oci::Process {
        Terminal: process.terminal().unwrap_or_default(),
        ConsoleSize: field(&console, |size| {
            let narrow =
                |n: u64| u32::try_from(n).map_err(|_| Unrepresentable { field: "process.consoleSize" });
            Ok(oci::Box {
                Height: narrow(size.height())?,
                Width: narrow(size.width())?,
                ..Default::default()
            })
        })?,
        User: MessageField::some(oci::User {
            UID: user.uid(),
            GID: user.gid(),
            AdditionalGids: user.additional_gids().clone().unwrap_or_default(),
            Username: user.username().clone().unwrap_or_default(),
            ..Default::default()
        }),
        Args: process.args().clone().unwrap_or_default(),
        Env: process.env().clone().unwrap_or_default(),
        Cwd: path(process.cwd(), "process.cwd")?,
        Capabilities: field(process.capabilities(), capabilities)?,
        Rlimits: list(process.rlimits(), |limit| {
            Ok(oci::POSIXRlimit {
                Type: limit.typ().to_string(),
                Hard: limit.hard(),
                Soft: limit.soft(),
                ..Default::default()
            })
        })?,
        NoNewPrivileges: process.no_new_privileges().unwrap_or_default(),
        ApparmorProfile: process.apparmor_profile().clone().unwrap_or_default(),
        OOMScoreAdj: process.oom_score_adj().unwrap_or_default().into(),
        SelinuxLabel: process.selinux_label().clone().unwrap_or_default(),
        ..Default::default()
    })
}

/// A container's limits.
pub fn resources(resources: &json::LinuxResources) -> Result<oci::LinuxResources> {
    refuse(!empty(resources.rdma()), "linux.resources.rdma")?;
    refuse(!empty(resources.unified()), "linux.resources.unified")?;
    Ok(oci::LinuxResources {
        Devices: list(resources.devices(), device_rule)?,
        Memory: field(resources.memory(), memory)?,
        CPU: field(resources.cpu(), cpu)?,
        Pids: field(resources.pids(), |pids| {
            Ok(oci::LinuxPids { Limit: pids.limit(), ..Default::default() })
        })?,
        BlockIO: field(resources.block_io(), block_io)?,
        HugepageLimits: list(resources.hugepage_limits(), |limit| {
            Ok(oci::LinuxHugepageLimit {
                Pagesize: limit.page_size().clone(),
                Limit: u64::try_from(limit.limit())
                    .map_err(|_| Unrepresentable { field: "linux.resources.hugepageLimits (negative)" })?,
                ..Default::default()
            })
        })?,
        Network: field(resources.network(), |network| {
            Ok(oci::LinuxNetwork {
                ClassID: network.class_id().unwrap_or_default(),
                Priorities: list(network.priorities(), |priority| {
                    Ok(oci::LinuxInterfacePriority {
                        Name: priority.name().clone(),
                        Priority: priority.priority(),
                        ..Default::default()
                    })
                })?,
                ..Default::default()
            })
        })?,
        ..Default::default()
    })
}

fn root(root: &json::Root) -> Result<oci::Root> {
    Ok(oci::Root {
        Path: path(root.path(), "root.path")?,
        Readonly: root.readonly().unwrap_or_default(),
        ..Default::default()
    })
}

fn mount(mount: &json::Mount) -> Result<oci::Mount> {
    let mapped = |ids: &Option<Vec<json::LinuxIdMapping>>| ids.as_ref().is_some_and(|ids| !ids.is_empty());
    refuse(mapped(mount.uid_mappings()) || mapped(mount.gid_mappings()), "mounts[].uidMappings")?;
    Ok(oci::Mount {
        destination: path(mount.destination(), "mounts[].destination")?,
        source: mount
            .source()
            .as_deref()
            .map(|source| path(source, "mounts[].source"))
            .transpose()?
            .unwrap_or_default(),
        type_: mount.typ().clone().unwrap_or_default(),
        options: mount.options().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn hooks(hooks: &json::Hooks) -> Result<oci::Hooks> {
    #[allow(deprecated, reason = "deprecated, but still what Docker and CNI setups send")]
    let prestart = hooks.prestart();
    Ok(oci::Hooks {
        Prestart: list(prestart, hook)?,
        Poststart: list(hooks.poststart(), hook)?,
        Poststop: list(hooks.poststop(), hook)?,
        CreateRuntime: list(hooks.create_runtime(), hook)?,
        CreateContainer: list(hooks.create_container(), hook)?,
        StartContainer: list(hooks.start_container(), hook)?,
        ..Default::default()
    })
}

fn hook(hook: &json::Hook) -> Result<oci::Hook> {
    Ok(oci::Hook {
        Path: path(hook.path(), "hooks[].path")?,
        Args: hook.args().clone().unwrap_or_default(),
        Env: hook.env().clone().unwrap_or_default(),
        Timeout: hook.timeout().unwrap_or_default(),
        ..Default::default()
    })
}

fn linux(linux: &json::Linux) -> Result<oci::Linux> {
    refuse(!empty(linux.net_devices()), "linux.netDevices")?;
    refuse(linux.memory_policy().is_some(), "linux.memoryPolicy")?;
    refuse(linux.personality().is_some(), "linux.personality")?;
    refuse(!empty(linux.time_offsets()), "linux.timeOffsets")?;
    Ok(oci::Linux {
        UIDMappings: list(linux.uid_mappings(), id_mapping)?,
        GIDMappings: list(linux.gid_mappings(), id_mapping)?,
        Sysctl: linux.sysctl().clone().unwrap_or_default(),
        Resources: field(linux.resources(), resources)?,
        CgroupsPath: linux
            .cgroups_path()
            .as_deref()
            .map(|cgroup| path(cgroup, "linux.cgroupsPath"))
            .transpose()?
            .unwrap_or_default(),
        Namespaces: list(linux.namespaces(), namespace)?,
        Devices: list(linux.devices(), device)?,
        Seccomp: field(linux.seccomp(), seccomp)?,
        RootfsPropagation: linux.rootfs_propagation().clone().unwrap_or_default(),
        MaskedPaths: linux.masked_paths().clone().unwrap_or_default(),
        ReadonlyPaths: linux.readonly_paths().clone().unwrap_or_default(),
        MountLabel: linux.mount_label().clone().unwrap_or_default(),
        IntelRdt: field(linux.intel_rdt(), intel_rdt)?,
        ..Default::default()
    })
}

fn id_mapping(mapping: &json::LinuxIdMapping) -> Result<oci::LinuxIDMapping> {
    Ok(oci::LinuxIDMapping {
        HostID: mapping.host_id(),
        ContainerID: mapping.container_id(),
        Size: mapping.size(),
        ..Default::default()
    })
}

fn namespace(namespace: &json::LinuxNamespace) -> Result<oci::LinuxNamespace> {
    let kind = match namespace.typ() {
        json::LinuxNamespaceType::Mount => "mount",
        json::LinuxNamespaceType::Cgroup => "cgroup",
        json::LinuxNamespaceType::Uts => "uts",
        json::LinuxNamespaceType::Ipc => "ipc",
        json::LinuxNamespaceType::User => "user",
        json::LinuxNamespaceType::Pid => "pid",
        json::LinuxNamespaceType::Network => "network",
        json::LinuxNamespaceType::Time => "time",
    };
    Ok(oci::LinuxNamespace {
        Type: kind.to_owned(),
        Path: namespace
            .path()
            .as_deref()
            .map(|at| path(at, "linux.namespaces[].path"))
            .transpose()?
            .unwrap_or_default(),
        ..Default::default()
    })
}

fn device(device: &json::LinuxDevice) -> Result<oci::LinuxDevice> {
    Ok(oci::LinuxDevice {
        Path: path(device.path(), "linux.devices[].path")?,
        Type: device.typ().as_str().to_owned(),
        Major: device.major(),
        Minor: device.minor(),
        FileMode: device.file_mode().unwrap_or_default(),
        UID: device.uid().unwrap_or_default(),
        GID: device.gid().unwrap_or_default(),
        ..Default::default()
    })
}

fn device_rule(rule: &json::LinuxDeviceCgroup) -> Result<oci::LinuxDeviceCgroup> {
    Ok(oci::LinuxDeviceCgroup {
        Allow: rule.allow(),
        Type: rule.typ().map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
        Major: rule.major().unwrap_or(-1),
        Minor: rule.minor().unwrap_or(-1),
        Access: rule.access().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn memory(memory: &json::LinuxMemory) -> Result<oci::LinuxMemory> {
    refuse(memory.check_before_update() == Some(true), "linux.resources.memory.checkBeforeUpdate")?;
    Ok(oci::LinuxMemory {
        Limit: memory.limit().unwrap_or_default(),
        Reservation: memory.reservation().unwrap_or_default(),
        Swap: memory.swap().unwrap_or_default(),
        Kernel: memory.kernel().unwrap_or_default(),
        KernelTCP: memory.kernel_tcp().unwrap_or_default(),
        Swappiness: memory.swappiness().unwrap_or_default(),
        DisableOOMKiller: memory.disable_oom_killer().unwrap_or_default(),
        ..Default::default()
    })
}

fn cpu(cpu: &json::LinuxCpu) -> Result<oci::LinuxCPU> {
    refuse(cpu.idle().is_some_and(|idle| idle != 0), "linux.resources.cpu.idle")?;
    refuse(cpu.burst().is_some_and(|burst| burst != 0), "linux.resources.cpu.burst")?;
    Ok(oci::LinuxCPU {
        Shares: cpu.shares().unwrap_or_default(),
        Quota: cpu.quota().unwrap_or_default(),
        Period: cpu.period().unwrap_or_default(),
        RealtimeRuntime: cpu.realtime_runtime().unwrap_or_default(),
        RealtimePeriod: cpu.realtime_period().unwrap_or_default(),
        Cpus: cpu.cpus().clone().unwrap_or_default(),
        Mems: cpu.mems().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn block_io(limits: &json::LinuxBlockIo) -> Result<oci::LinuxBlockIO> {
    Ok(oci::LinuxBlockIO {
        Weight: limits.weight().unwrap_or_default().into(),
        LeafWeight: limits.leaf_weight().unwrap_or_default().into(),
        WeightDevice: list(limits.weight_device(), |device| {
            Ok(oci::LinuxWeightDevice {
                Major: device.major(),
                Minor: device.minor(),
                Weight: device.weight().unwrap_or_default().into(),
                LeafWeight: device.leaf_weight().unwrap_or_default().into(),
                ..Default::default()
            })
        })?,
        ThrottleReadBpsDevice: list(limits.throttle_read_bps_device(), throttle)?,
        ThrottleWriteBpsDevice: list(limits.throttle_write_bps_device(), throttle)?,
        ThrottleReadIOPSDevice: list(limits.throttle_read_iops_device(), throttle)?,
        ThrottleWriteIOPSDevice: list(limits.throttle_write_iops_device(), throttle)?,
        ..Default::default()
    })
}

fn throttle(limit: &json::LinuxThrottleDevice) -> Result<oci::LinuxThrottleDevice> {
    Ok(oci::LinuxThrottleDevice {
        Major: limit.major(),
        Minor: limit.minor(),
        Rate: limit.rate(),
        ..Default::default()
    })
}

fn intel_rdt(rdt: &json::LinuxIntelRdt) -> Result<oci::LinuxIntelRdt> {
    #[allow(deprecated, reason = "a deprecated field that is set still asks for something")]
    let monitoring = rdt.enable_cmt().or(*rdt.enable_mbm()).or(*rdt.enable_monitoring());
    let more = rdt.clos_id().is_some() || rdt.schemata().is_some() || rdt.mem_bw_schema().is_some();
    refuse(more || monitoring == Some(true), "linux.intelRdt beyond l3CacheSchema")?;
    Ok(oci::LinuxIntelRdt {
        L3CacheSchema: rdt.l3_cache_schema().clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn seccomp(profile: &json::LinuxSeccomp) -> Result<oci::LinuxSeccomp> {
    // The wire's default action has no errno; its receivers use EPERM.
    const EPERM: u32 = 1;
    refuse(
        profile.default_errno_ret().is_some_and(|errno| errno != EPERM),
        "linux.seccomp.defaultErrnoRet other than EPERM",
    )?;
    refuse(profile.listener_path().is_some(), "linux.seccomp.listenerPath")?;
    Ok(oci::LinuxSeccomp {
        DefaultAction: profile.default_action().to_string(),
        Architectures: names(profile.architectures()),
        Flags: names(profile.flags()),
        Syscalls: list(profile.syscalls(), |rule| {
            Ok(oci::LinuxSyscall {
                Names: rule.names().clone(),
                Action: rule.action().to_string(),
                Args: list(rule.args(), seccomp_arg)?,
                ErrnoRet: rule.errno_ret().map(oci::linux_syscall::ErrnoRet::Errnoret),
                ..Default::default()
            })
        })?,
        ..Default::default()
    })
}

fn seccomp_arg(arg: &json::LinuxSeccompArg) -> Result<oci::LinuxSeccompArg> {
    Ok(oci::LinuxSeccompArg {
        Index: u64::try_from(arg.index())
            .map_err(|_| Unrepresentable { field: "linux.seccomp argument index" })?,
        Value: arg.value(),
        ValueTwo: arg.value_two().unwrap_or_default(),
        Op: arg.op().to_string(),
        ..Default::default()
    })
}

fn capabilities(sets: &json::LinuxCapabilities) -> Result<oci::LinuxCapabilities> {
    // oci-spec keeps sets; sorted, the message is the same for the same configuration.
    let set = |set: &Option<json::Capabilities>| {
        let mut names: Vec<String> =
            set.iter().flatten().map(|capability| format!("CAP_{capability}")).collect();
        names.sort();
        names
    };
    Ok(oci::LinuxCapabilities {
        Bounding: set(sets.bounding()),
        Effective: set(sets.effective()),
        Inheritable: set(sets.inheritable()),
        Permitted: set(sets.permitted()),
        Ambient: set(sets.ambient()),
        ..Default::default()
    })
}

fn refuse(present: bool, field: &'static str) -> Result<()> {
    if present { Err(Unrepresentable { field }) } else { Ok(()) }
}

fn path(path: &Path, field: &'static str) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or(Unrepresentable { field })
}

fn text(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn empty<V>(map: &Option<HashMap<String, V>>) -> bool {
    map.as_ref().is_none_or(HashMap::is_empty)
}

fn names<T: fmt::Display>(values: &Option<Vec<T>>) -> Vec<String> {
    values.iter().flatten().map(T::to_string).collect()
}

fn list<T, W>(values: &Option<Vec<T>>, convert: impl Fn(&T) -> Result<W>) -> Result<Vec<W>> {
    values.iter().flatten().map(convert).collect()
}

fn field<T, W>(value: &Option<T>, convert: impl Fn(&T) -> Result<W>) -> Result<MessageField<W>> {
    value.as_ref().map(convert).transpose().map(MessageField::from_option)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config() -> Value {
        serde_json::from_str(include_str!("../test_data/config.json")).unwrap()
    }

    fn convert(config: Value) -> Result<oci::Spec> {
        spec(&serde_json::from_value(config).unwrap())
    }

    /// Reads the values of `at` as strings, to compare with what arrived.
    fn strings(config: &Value, at: &str) -> Vec<String> {
        let values = config.pointer(at).unwrap().as_array().unwrap();
        values.iter().map(|value| value.as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_process_arrives_whole() {
        let spec = convert(config()).unwrap();
        assert_eq!(spec.Version, "1.1.0");
        assert_eq!(spec.Hostname, "web-0");
        let process = spec.Process.as_ref().unwrap();
        assert!(process.Terminal && process.NoNewPrivileges);
        assert_eq!((process.ConsoleSize.Height, process.ConsoleSize.Width), (40, 120));
        assert_eq!((process.User.UID, process.User.GID), (1000, 1001));
        assert_eq!(
            (process.User.AdditionalGids.as_slice(), process.User.Username.as_str()),
            (&[10, 20][..], "app")
        );
        assert_eq!(process.Args, strings(&config(), "/process/args"));
        assert_eq!(process.Env[1], "SPACED= a b ");
        assert_eq!((process.Cwd.as_str(), process.OOMScoreAdj), ("/srv", -998));
        assert_eq!(process.ApparmorProfile, "default-profile");
        assert_eq!(process.SelinuxLabel, "system_u:system_r:container_t:s0:c1,c2");
        let limits: Vec<_> = process.Rlimits.iter().map(|l| (l.Type.as_str(), l.Hard, l.Soft)).collect();
        assert_eq!(limits, [("RLIMIT_NOFILE", 4096, 1024), ("RLIMIT_CORE", u64::MAX, 0)]);
    }

    #[test]
    fn every_capability_keeps_its_name() {
        let spec = convert(config()).unwrap();
        let sets = spec.Process.Capabilities.as_ref().unwrap();
        let mut bounding = strings(&config(), "/process/capabilities/bounding");
        bounding.sort();
        assert_eq!(sets.Bounding.len(), 41);
        assert_eq!(sets.Bounding, bounding);
        assert_eq!(sets.Effective, ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
        assert_eq!(sets.Permitted, ["CAP_CHOWN"]);
        assert_eq!(sets.Ambient, ["CAP_NET_BIND_SERVICE"]);
        assert!(sets.Inheritable.is_empty());
    }

    #[test]
    fn root_mounts_and_hooks_arrive() {
        let spec = convert(config()).unwrap();
        assert_eq!((spec.Root.Path.as_str(), spec.Root.Readonly), ("rootfs", true));
        let bind = &spec.Mounts[3];
        assert_eq!((bind.destination.as_str(), bind.source.as_str()), ("/data", "/srv/data"));
        assert_eq!((bind.type_.as_str(), bind.options.join(",")), ("bind", "rbind,ro,rprivate".to_owned()));
        assert_eq!(spec.Mounts.len(), 5);
        assert!(spec.Mounts[4].source.is_empty() && spec.Mounts[4].type_.is_empty());
        let hooks = spec.Hooks.as_ref().unwrap();
        let first = &hooks.Prestart[0];
        assert_eq!((first.Path.as_str(), first.Timeout), ("/usr/bin/net-setup", 7));
        assert_eq!((first.Args.len(), first.Env.as_slice()), (2, &["A=1".to_owned()][..]));
        for (list, path) in [
            (&hooks.CreateRuntime, "/hooks/create-runtime"),
            (&hooks.CreateContainer, "/hooks/create-container"),
            (&hooks.StartContainer, "/hooks/start-container"),
            (&hooks.Poststart, "/hooks/poststart"),
            (&hooks.Poststop, "/hooks/poststop"),
        ] {
            assert_eq!(list.iter().map(|hook| hook.Path.as_str()).collect::<Vec<_>>(), [path]);
        }
        assert_eq!(spec.Annotations["io.kubernetes.cri.container-type"], "container");
        assert_eq!(spec.Annotations.len(), 2);
    }

    #[test]
    fn the_linux_section_arrives() {
        let spec = convert(config()).unwrap();
        let linux = spec.Linux.as_ref().unwrap();
        let ids = |list: &[oci::LinuxIDMapping]| (list[0].ContainerID, list[0].HostID, list[0].Size);
        assert_eq!(ids(&linux.UIDMappings), (0, 100_000, 65_536));
        assert_eq!(ids(&linux.GIDMappings), (0, 200_000, 65_536));
        assert_eq!(linux.Sysctl["net.ipv4.ip_unprivileged_port_start"], "0");
        let namespaces: Vec<_> =
            linux.Namespaces.iter().map(|n| (n.Type.as_str(), n.Path.as_str())).collect();
        assert_eq!(
            namespaces,
            [
                ("pid", ""),
                ("network", "/var/run/netns/cni-1"),
                ("ipc", "/proc/7/ns/ipc"),
                ("uts", "/proc/7/ns/uts"),
                ("mount", ""),
                ("cgroup", ""),
                ("user", ""),
                ("time", ""),
            ]
        );
        let fuse = &linux.Devices[0];
        assert_eq!(
            (fuse.Path.as_str(), fuse.Type.as_str(), fuse.Major, fuse.Minor),
            ("/dev/fuse", "c", 10, 229)
        );
        assert_eq!((fuse.FileMode, fuse.UID, fuse.GID), (0o666, 3, 4));
        assert_eq!((linux.Devices[1].FileMode, linux.Devices[1].UID), (0, 0));
        assert_eq!(linux.CgroupsPath, "kubepods-besteffort.slice:cri-containerd:abc");
        assert_eq!(linux.RootfsPropagation, "rslave");
        assert_eq!(linux.MaskedPaths, ["/proc/kcore", "/sys/firmware"]);
        assert_eq!(linux.ReadonlyPaths, ["/proc/sys"]);
        assert_eq!(linux.MountLabel, "system_u:object_r:container_file_t:s0:c1,c2");
        assert_eq!(linux.IntelRdt.L3CacheSchema, "L3:0=ffff0");
    }

    #[test]
    fn resources_arrive_with_their_special_values() {
        let spec = convert(config()).unwrap();
        let resources = spec.Linux.Resources.as_ref().unwrap();
        let rules: Vec<_> = resources
            .Devices
            .iter()
            .map(|rule| (rule.Allow, rule.Type.as_str(), rule.Major, rule.Minor, rule.Access.as_str()))
            .collect();
        // Minor 0 is a minor; an absent number is any number.
        assert_eq!(rules, [(false, "", -1, -1, "rwm"), (true, "c", 1, 0, "rw"), (true, "c", 136, -1, "rwm")]);
        let memory = resources.Memory.as_ref().unwrap();
        assert_eq!((memory.Limit, memory.Reservation, memory.Swap), (512 << 20, 256 << 20, -1));
        assert_eq!(
            (memory.Kernel, memory.KernelTCP, memory.Swappiness, memory.DisableOOMKiller),
            (11, 12, 60, true)
        );
        let cpu = resources.CPU.as_ref().unwrap();
        assert_eq!((cpu.Shares, cpu.Quota, cpu.Period), (512, -1, 100_000));
        assert_eq!((cpu.RealtimeRuntime, cpu.RealtimePeriod), (950_000, 1_000_000));
        assert_eq!((cpu.Cpus.as_str(), cpu.Mems.as_str()), ("0-1,3", "0"));
        assert_eq!(resources.Pids.Limit, 100);
        let io = resources.BlockIO.as_ref().unwrap();
        assert_eq!((io.Weight, io.LeafWeight), (300, 301));
        assert_eq!(
            (io.WeightDevice[0].Major, io.WeightDevice[0].Weight, io.WeightDevice[0].LeafWeight),
            (8, 500, 501)
        );
        let rate = |list: &[oci::LinuxThrottleDevice]| (list[0].Minor, list[0].Rate);
        assert_eq!(rate(&io.ThrottleReadBpsDevice), (1, 1001));
        assert_eq!(rate(&io.ThrottleWriteBpsDevice), (2, 1002));
        assert_eq!(rate(&io.ThrottleReadIOPSDevice), (3, 1003));
        assert_eq!(rate(&io.ThrottleWriteIOPSDevice), (4, 1004));
        assert_eq!(
            (resources.HugepageLimits[0].Pagesize.as_str(), resources.HugepageLimits[0].Limit),
            ("2MB", 4 << 20)
        );
        assert_eq!((resources.Network.ClassID, resources.Network.Priorities[0].Priority), (1_048_577, 5));
    }

    #[test]
    fn seccomp_keeps_the_names_of_config_json() {
        let spec = convert(config()).unwrap();
        let profile = spec.Linux.Seccomp.as_ref().unwrap();
        assert_eq!(profile.DefaultAction, "SCMP_ACT_ERRNO");
        assert_eq!(profile.Architectures, strings(&config(), "/linux/seccomp/architectures"));
        assert_eq!(profile.Flags, strings(&config(), "/linux/seccomp/flags"));
        assert_eq!(profile.Syscalls[0].Names, ["read", "write", "exit_group"]);
        assert_eq!(profile.Syscalls[0].ErrnoRet, None);
        let mask = &profile.Syscalls[1].Args[0];
        assert_eq!((mask.Index, mask.Value, mask.ValueTwo), (0, 2_114_060_288, 0));
        assert_eq!(mask.Op, "SCMP_CMP_MASKED_EQ");
        assert_eq!(profile.Syscalls[2].ErrnoRet, Some(oci::linux_syscall::ErrnoRet::Errnoret(38)));
        assert_eq!(profile.Syscalls[3].Action, "SCMP_ACT_KILL_PROCESS");
        assert_eq!(
            (profile.Syscalls[3].Args[0].Index, profile.Syscalls[3].Args[0].Op.as_str()),
            (1, "SCMP_CMP_NE")
        );
    }

    #[test]
    fn absent_parts_stay_absent() {
        let spec = convert(json!({"ociVersion": "1.0.2"})).unwrap();
        assert!(
            spec.Process.is_none() && spec.Root.is_none() && spec.Linux.is_none() && spec.Hooks.is_none()
        );
        let limits = resources(&serde_json::from_value(json!({"memory": {}, "cpu": {}})).unwrap()).unwrap();
        assert_eq!((limits.Memory.Limit, limits.CPU.Quota, limits.CPU.Shares), (0, 0, 0));
        assert!(limits.Pids.is_none() && limits.BlockIO.is_none());
        let process = process(&serde_json::from_value(json!({"user": {}, "cwd": "/"})).unwrap()).unwrap();
        assert!(process.Capabilities.is_none() && process.ConsoleSize.is_none());
        assert_eq!(process.OOMScoreAdj, 0);
    }

    #[test]
    fn what_the_wire_cannot_carry_is_refused_by_name() {
        for (at, value, field) in [
            ("/domainname", json!("example.org"), "domainname"),
            ("/process/user/umask", json!(18), "process.user.umask"),
            (
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0}),
                "process.ioPriority",
            ),
            ("/process/scheduler", json!({"policy": "SCHED_BATCH"}), "process.scheduler"),
            ("/process/execCPUAffinity", json!({"initial": "0"}), "process.execCPUAffinity"),
            (
                "/mounts/3/uidMappings",
                json!([{"containerID": 0, "hostID": 1, "size": 1}]),
                "mounts[].uidMappings",
            ),
            ("/linux/timeOffsets", json!({"boottime": {"secs": 3}}), "linux.timeOffsets"),
            ("/linux/personality", json!({"domain": "LINUX32"}), "linux.personality"),
            ("/linux/netDevices", json!({"eth0": {}}), "linux.netDevices"),
            ("/linux/resources/unified", json!({"memory.high": "1"}), "linux.resources.unified"),
            ("/linux/resources/rdma", json!({"mlx5_0": {"hcaHandles": 1}}), "linux.resources.rdma"),
            ("/linux/resources/cpu/idle", json!(1), "linux.resources.cpu.idle"),
            ("/linux/resources/cpu/burst", json!(10), "linux.resources.cpu.burst"),
            ("/linux/seccomp/defaultErrnoRet", json!(38), "linux.seccomp.defaultErrnoRet other than EPERM"),
            ("/linux/seccomp/listenerPath", json!("/run/x"), "linux.seccomp.listenerPath"),
            ("/linux/intelRdt/closID", json!("x"), "linux.intelRdt beyond l3CacheSchema"),
        ] {
            let mut config = config();
            let (parent, name) = at.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[name] = value;
            assert_eq!(convert(config), Err(Unrepresentable { field }), "{at}");
        }
    }
}
