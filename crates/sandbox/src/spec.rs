//! Every edit that the host makes to a container's OCI configuration before it goes to the guest, and nothing else.
//!
//! | what | becomes | why |
//! |---|---|---|
//! | hooks | refused | they name programs of the host, which the guest has not, and nobody runs them here yet |
//! | namespaces network, time | removed | the VM is the pod's network namespace; the guest has one clock |
//! | namespace pid | removed; with a path, the flag `sandbox_pidns` | the agent makes one for each container, or joins the pod's |
//! | paths of other namespaces | cleared | they name namespaces of the host |
//! | namespace cgroup | kept, new | |
//! | `root.path` | the path in the share | |
//! | mount sources | the path in the share, or the pod's shared memory | see `storage` |
//! | `cgroupsPath` | `/<container id>` | parents exist on the host only, where they limit the whole VM |
//! | cpuset `cpus`, `mems` | cleared | they number the host's processors |
//! | AppArmor profile, SELinux labels | cleared | the guest runs no policy |
//! | block devices | refused | the numbers would mean other disks in the guest |
//! | Intel RDT | refused | it belongs to the host's processor |
//! | device rules, pids, block I/O, seccomp, capabilities... | kept | the agent applies them |

use std::collections::BTreeMap;

use bulkhead_protocol::{oci, oci_json};
use oci_spec::runtime;

use crate::{
    Error,
    storage::{guest_rootfs, is_shm},
};

/// A configuration as the guest gets it.
#[derive(Debug)]
pub(crate) struct GuestSpec {
    pub(crate) spec: oci::Spec,
    /// The container joins the pod's pid namespace.
    pub(crate) sandbox_pidns: bool,
}

/// Rewrites a container's configuration for the guest; `sources` replaces mount sources by index.
pub(crate) fn for_guest(
    id: &str,
    mut spec: oci::Spec,
    sources: &BTreeMap<usize, String>,
) -> Result<GuestSpec, Error> {
    if spec.Process.is_none() {
        return Err(Error::Invalid("config.json has no process".into()));
    }
    if let Some(process) = spec.Process.as_mut() {
        clear_labels(process);
    }
    refuse_hooks(spec.Hooks.take())?;
    spec.Root.mut_or_insert_default().Path = guest_rootfs(id);
    for (index, mount) in spec.Mounts.iter_mut().enumerate() {
        if let Some(source) = sources.get(&index) {
            if is_shm(mount) {
                share_memory(mount);
            }
            mount.source.clone_from(source);
        }
    }
    let sandbox_pidns = linux(id, spec.Linux.mut_or_insert_default())?;
    // The guest has the pod's host name already; without a uts namespace there is no other to be set (a pod on the host's
    // network names its node all the same).
    if !spec.Linux.Namespaces.iter().any(|namespace| namespace.Type == "uts") {
        spec.Hostname.clear();
    }
    Ok(GuestSpec { spec, sandbox_pidns })
}

/// Rewrites an exec's process for the guest.
pub(crate) fn process_for_guest(process: &runtime::Process) -> Result<oci::Process, Error> {
    let mut process = oci_json::process(process)?;
    clear_labels(&mut process);
    Ok(process)
}

/// Rewrites new limits for the guest.
pub(crate) fn resources_for_guest(resources: &runtime::LinuxResources) -> Result<oci::LinuxResources, Error> {
    let mut resources = oci_json::resources(resources)?;
    clear_processor_numbers(&mut resources);
    Ok(resources)
}

fn refuse_hooks(hooks: Option<oci::Hooks>) -> Result<(), Error> {
    let hooks = hooks.unwrap_or_default();
    let lists = [
        &hooks.Prestart,
        &hooks.CreateRuntime,
        &hooks.CreateContainer,
        &hooks.StartContainer,
        &hooks.Poststart,
        &hooks.Poststop,
    ];
    match lists.into_iter().flatten().next() {
        Some(hook) => {
            Err(Error::Unsupported(format!("OCI hooks ({}); remove them from the configuration", hook.Path)))
        }
        None => Ok(()),
    }
}

fn linux(id: &str, linux: &mut oci::Linux) -> Result<bool, Error> {
    if linux.IntelRdt.is_some() {
        return Err(Error::Unsupported(
            "linux.intelRdt inside a VM; remove it from the configuration".into(),
        ));
    }
    if let Some(disk) = linux.Devices.iter().find(|device| device.Type == "b") {
        return Err(Error::Unsupported(format!(
            "the block device {} inside a VM; for privileged containers of containerd set privileged_without_host_devices",
            disk.Path
        )));
    }
    if let Some(resources) = linux.Resources.as_mut() {
        clear_processor_numbers(resources);
    }
    linux.CgroupsPath = format!("/{id}");
    linux.MountLabel.clear();
    let joins_pid =
        linux.Namespaces.iter().any(|namespace| namespace.Type == "pid" && !namespace.Path.is_empty());
    linux.Namespaces.retain(|namespace| !matches!(namespace.Type.as_str(), "network" | "time" | "pid"));
    for namespace in &mut linux.Namespaces {
        namespace.Path.clear();
    }
    Ok(joins_pid)
}

/// The options of a tmpfs or of the host's bind mean nothing for the pod's shared memory, except that it is read-only.
fn share_memory(mount: &mut oci::Mount) {
    let read_only = mount.options.iter().rev().find(|option| *option == "ro" || *option == "rw");
    let read_only = read_only.is_some_and(|last| last == "ro");
    mount.type_ = "bind".into();
    mount.options = vec!["rbind".into()];
    if read_only {
        mount.options.push("ro".into());
    }
}

fn clear_labels(process: &mut oci::Process) {
    process.ApparmorProfile.clear();
    process.SelinuxLabel.clear();
}

fn clear_processor_numbers(resources: &mut oci::LinuxResources) {
    if let Some(cpu) = resources.CPU.as_mut() {
        cpu.Cpus.clear();
        cpu.Mems.clear();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config() -> Value {
        let mut config: Value =
            serde_json::from_str(include_str!("../../protocol/test_data/config.json")).unwrap();
        config["linux"].as_object_mut().unwrap().remove("intelRdt");
        config["hooks"] = json!({"prestart": []});
        config
    }

    fn edited(config: Value, sources: &[(usize, &str)]) -> Result<GuestSpec, Error> {
        let spec: runtime::Spec = serde_json::from_value(config).unwrap();
        let sources = sources.iter().map(|(index, source)| (*index, (*source).to_owned())).collect();
        for_guest("c1", oci_json::spec(&spec)?, &sources)
    }

    #[test]
    fn what_names_things_of_the_host_is_gone() {
        let guest = edited(config(), &[]).unwrap();
        assert!(guest.spec.Hooks.is_none());
        let process = guest.spec.Process.as_ref().unwrap();
        assert_eq!((process.ApparmorProfile.as_str(), process.SelinuxLabel.as_str()), ("", ""));
        assert_eq!(guest.spec.Root.Path, "/run/kata-containers/shared/containers/c1/rootfs");
        assert!(guest.spec.Root.Readonly);
        let linux = guest.spec.Linux.as_ref().unwrap();
        assert_eq!((linux.MountLabel.as_str(), linux.CgroupsPath.as_str()), ("", "/c1"));
        let cpu = linux.Resources.CPU.as_ref().unwrap();
        assert_eq!((cpu.Cpus.as_str(), cpu.Mems.as_str(), cpu.Shares), ("", "", 512));
    }

    #[test]
    fn a_hostname_goes_with_a_uts_namespace() {
        let mut config = config();
        config["hostname"] = json!("box");
        config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
        assert_eq!(edited(config.clone(), &[]).unwrap().spec.Hostname, "box");
        config["linux"]["namespaces"] = json!([{"type": "mount"}]);
        assert_eq!(edited(config, &[]).unwrap().spec.Hostname, "");
    }

    #[test]
    fn what_the_agent_applies_is_kept() {
        let before: runtime::Spec = serde_json::from_value(config()).unwrap();
        let before = oci_json::spec(&before).unwrap();
        let guest = edited(config(), &[]).unwrap().spec;
        let (before, after) = (before.Linux.as_ref().unwrap(), guest.Linux.as_ref().unwrap());
        assert_eq!(after.Seccomp, before.Seccomp);
        assert_eq!(after.Devices, before.Devices);
        assert_eq!(after.Resources.Devices, before.Resources.Devices);
        assert_eq!(after.Resources.Pids, before.Resources.Pids);
        assert_eq!(after.Resources.BlockIO, before.Resources.BlockIO);
        assert_eq!(after.Resources.Memory, before.Resources.Memory);
        assert_eq!(after.MaskedPaths, before.MaskedPaths);
        assert_eq!(after.Sysctl, before.Sysctl);
    }

    #[test]
    fn namespaces_are_the_guests() {
        for (namespaces, kept, joins) in [
            (json!([{"type": "pid"}, {"type": "mount"}]), vec!["mount"], false),
            (
                json!([{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"}]),
                vec!["ipc"],
                true,
            ),
            (
                json!([{"type": "network", "path": "/run/netns/x"}, {"type": "time"}, {"type": "cgroup"}]),
                vec!["cgroup"],
                false,
            ),
            (
                json!([{"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "user"}]),
                vec!["uts", "user"],
                false,
            ),
        ] {
            let mut config = config();
            config["linux"]["namespaces"] = namespaces;
            let guest = edited(config, &[]).unwrap();
            let found = &guest.spec.Linux.Namespaces;
            assert_eq!(found.iter().map(|n| n.Type.as_str()).collect::<Vec<_>>(), kept);
            assert!(found.iter().all(|namespace| namespace.Path.is_empty()));
            assert_eq!(guest.sandbox_pidns, joins);
        }
    }

    #[test]
    fn planned_sources_replace_those_of_the_host() {
        let mut config = config();
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=1m", "ro"]}));
        let guest = edited(config, &[(3, "/guest/data"), (5, "/guest/shm")]).unwrap().spec;
        let sources: Vec<_> = guest.Mounts.iter().map(|mount| mount.source.as_str()).collect();
        assert_eq!(sources, ["proc", "tmpfs", "cgroup", "/guest/data", "", "/guest/shm"]);
        assert_eq!(guest.Mounts[3].options, ["rbind", "ro", "rprivate"]);
        assert_eq!(
            (guest.Mounts[5].type_.as_str(), guest.Mounts[5].options.join(",")),
            ("bind", "rbind,ro".into())
        );
    }

    #[test]
    fn what_cannot_be_in_a_vm_is_refused() {
        for (at, value, word) in [
            ("/linux/intelRdt", json!({"l3CacheSchema": "L3:0=1"}), "intelRdt"),
            (
                "/linux/devices",
                json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]),
                "/dev/sda",
            ),
            ("/hooks", json!({"poststop": [{"path": "/usr/bin/after"}]}), "/usr/bin/after"),
            ("/linux/personality", json!({"domain": "LINUX32"}), "linux.personality"),
        ] {
            let mut config = config();
            let (parent, name) = at.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[name] = value;
            let error = edited(config, &[]).unwrap_err();
            assert!(matches!(&error, Error::Unsupported(text) if text.contains(word)), "{error}");
        }
        let mut without = config();
        without.as_object_mut().unwrap().remove("process");
        assert!(matches!(edited(without, &[]), Err(Error::Invalid(_))));
    }

    #[test]
    fn execs_and_updates_lose_the_same_things() {
        let process: runtime::Process = serde_json::from_value(config()["process"].clone()).unwrap();
        let process = process_for_guest(&process).unwrap();
        assert_eq!((process.ApparmorProfile.as_str(), process.SelinuxLabel.as_str()), ("", ""));
        assert_eq!(process.Capabilities.Ambient, ["CAP_NET_BIND_SERVICE"]);
        let limits = json!({"cpu": {"quota": 5, "cpus": "0"}});
        let limits = resources_for_guest(&serde_json::from_value(limits).unwrap()).unwrap();
        assert_eq!((limits.CPU.Quota, limits.CPU.Cpus.as_str()), (5, ""));
    }
}
