//! From an OCI spec to what a child has to do: pure functions over values, so that every decision can be tested.
//!
//! The child takes no decision; what is malformed, contradictory or not offered is refused here, before anything exists.

mod capabilities;
pub(crate) mod labels;
mod mounts;
mod namespaces;
mod process;
mod rootfs;
mod sysctls;

use bulkhead_protocol::oci;
use serde::{Deserialize, Serialize};

pub(crate) use capabilities::Capabilities;
pub(crate) use mounts::{Attributes, MountKind, MountPlan};
pub(crate) use namespaces::{NamespaceKind, NamespacePlan};
pub use process::UserNames;
pub(crate) use process::{ProcessPlan, rlimit_name};
pub(crate) use rootfs::{Device, DeviceKind, Propagation, RootfsPlan};
pub(crate) use sysctls::Sysctl;

use crate::{Error, hooks::ChildHooks, seccomp};

/// What the plan must know about where it will be carried out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    /// The capabilities that can be granted.
    pub(crate) capabilities: u64,
    /// The executor runs in PID 1, so that what the container shares with it belongs to nobody else.
    pub(crate) owns_machine: bool,
}

/// Everything a child has to do. The descriptors that travel with it are, in this order: the cgroup's directory, the
/// standard streams (without a terminal), the namespaces to join.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// A new container, or a further process.
    pub(crate) kind: Kind,
    /// Whether a cgroup's directory comes along.
    pub(crate) cgroup: bool,
    /// Namespaces to make and to join.
    pub(crate) namespaces: NamespacePlan,
    /// The container around the process; empty for a further one.
    pub(crate) setup: Setup,
    /// The process itself.
    pub(crate) process: ProcessPlan,
}

/// What the child is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Makes a container and parks before its command.
    Create,
    /// Joins a container and executes a command.
    Exec,
}

/// What is done once a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// For a new UTS namespace.
    pub(crate) hostname: Option<String>,
    /// Kernel parameters.
    pub(crate) sysctls: Vec<Sysctl>,
    /// The file system.
    pub(crate) rootfs: RootfsPlan,
    /// The hooks.
    pub(crate) hooks: ChildHooks,
}

/// The plan for a new container, whose cgroup will be at `cgroup`.
pub(crate) fn create(spec: &oci::Spec, host: Host, cgroup: Option<&str>) -> Result<Plan, Error> {
    let process =
        spec.Process.as_ref().ok_or_else(|| Error::Invalid("the spec has no process".to_owned()))?;
    let linux =
        spec.Linux.as_ref().ok_or_else(|| Error::Invalid("the spec has no linux section".to_owned()))?;
    refuse_unsupported(linux)?;
    let namespaces = NamespacePlan::new(&linux.Namespaces)?;
    let setup = Setup {
        hostname: hostname(&spec.Hostname, &namespaces)?,
        sysctls: sysctls::plan(&linux.Sysctl, &namespaces, host.owns_machine)?,
        rootfs: RootfsPlan::new(spec, linux, cgroup)?,
        hooks: ChildHooks::default(),
    };
    let seccomp = linux.Seccomp.as_ref().map(seccomp::compile).transpose()?;
    let process = ProcessPlan::new(process, seccomp, host)?;
    Ok(Plan { kind: Kind::Create, cgroup: cgroup.is_some(), namespaces, setup, process })
}

/// The plan for a further process in the container made from `spec`, whose `namespaces` are joined. Its filter has been
/// compiled already, which is most of the work.
pub(crate) fn exec(
    process: &oci::Process,
    spec: &oci::Spec,
    seccomp: Option<seccomp::Filter>,
    host: Host,
    namespaces: Vec<NamespaceKind>,
    cgroup: bool,
) -> Result<Plan, Error> {
    let mut process = process.clone();
    if process.Capabilities.is_none()
        && let Some(init) = spec.Process.as_ref()
    {
        process.Capabilities = init.Capabilities.clone();
    }
    Ok(Plan {
        kind: Kind::Exec,
        cgroup,
        namespaces: NamespacePlan { new: Vec::new(), join: namespaces },
        setup: Setup::default(),
        process: ProcessPlan::new(&process, seccomp, host)?,
    })
}

fn refuse_unsupported(linux: &oci::Linux) -> Result<(), Error> {
    let unsupported = |what: &str| Err(Error::Unsupported(what.to_owned()));
    if !linux.UIDMappings.is_empty() || !linux.GIDMappings.is_empty() {
        return unsupported("user and group id mappings");
    }
    if linux.IntelRdt.as_ref().is_some_and(|rdt| !rdt.L3CacheSchema.is_empty()) {
        return unsupported("Intel RDT");
    }
    Ok(())
}

fn hostname(name: &str, namespaces: &NamespacePlan) -> Result<Option<String>, Error> {
    if name.is_empty() {
        return Ok(None);
    }
    if !namespaces.has(NamespaceKind::Uts) {
        return Err(Error::Invalid(format!("hostname {name:?} without a uts namespace")));
    }
    if name.len() > 64 {
        return Err(Error::Invalid(format!("hostname {name:?} is longer than 64 bytes")));
    }
    // A joined namespace keeps the name that its maker gave it: it belongs to the whole sandbox.
    Ok(namespaces.new.contains(&NamespaceKind::Uts).then(|| name.to_owned()))
}

/// A string that will be handed to the kernel.
fn no_nul(what: &str, text: &str) -> Result<(), Error> {
    if text.contains('\0') {
        return Err(Error::Invalid(format!("{what} contains a NUL byte: {text:?}")));
    }
    Ok(())
}

/// An absolute path inside the container. `..` is refused rather than guessed at.
fn absolute(what: &str, path: &str) -> Result<String, Error> {
    no_nul(what, path)?;
    if !path.starts_with('/') {
        return Err(Error::Invalid(format!("{what} {path:?} is not absolute")));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(Error::Invalid(format!("{what} {path:?} contains \"..\"")));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
pub(crate) mod test_spec {
    //! Specs to start from.
    use super::*;

    /// A host that can everything.
    pub(crate) const HOST: Host = Host { capabilities: u64::MAX, owns_machine: true };

    /// The least that is accepted.
    pub(crate) fn minimal() -> oci::Spec {
        let mut spec = oci::Spec::new();
        let process = spec.Process.mut_or_insert_default();
        process.Args = vec!["/bin/true".into()];
        process.Cwd = "/".into();
        spec.Root.mut_or_insert_default().Path = "/rootfs".into();
        let linux = spec.Linux.mut_or_insert_default();
        linux.Namespaces = ["mount", "pid", "uts", "ipc"].map(namespace).to_vec();
        spec
    }

    /// A namespace to make.
    pub(crate) fn namespace(kind: &str) -> oci::LinuxNamespace {
        oci::LinuxNamespace { Type: kind.into(), ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::{test_spec::*, *};

    fn refused(change: impl FnOnce(&mut oci::Spec)) -> String {
        let mut spec = minimal();
        change(&mut spec);
        create(&spec, HOST, None).unwrap_err().to_string()
    }

    #[test]
    fn a_minimal_spec_is_planned() {
        let plan = create(&minimal(), HOST, None).unwrap();
        assert_eq!(plan.namespaces.new.len(), 4);
        assert_eq!(plan.setup.hostname, None);
        assert_eq!(plan.setup.rootfs.path, "/rootfs");
        let bytes = postcard::to_allocvec(&plan).unwrap();
        assert_eq!(postcard::from_bytes::<Plan>(&bytes).unwrap(), plan);
    }

    #[test]
    fn what_is_not_offered_is_an_error() {
        assert!(refused(|s| s.Process.clear()).contains("no process"));
        assert!(refused(|s| s.Linux.clear()).contains("no linux"));
        assert!(refused(|s| s.Root.clear()).contains("no root"));
        let map = oci::LinuxIDMapping::new();
        assert!(refused(|s| s.Linux.as_mut().unwrap().UIDMappings.push(map)).contains("id mappings"));
        let rdt = "L3:0=f".to_owned();
        assert!(
            refused(|s| s.Linux.as_mut().unwrap().IntelRdt.mut_or_insert_default().L3CacheSchema = rdt)
                .contains("RDT")
        );
    }

    #[test]
    fn a_hostname_needs_a_uts_namespace_and_is_set_in_a_new_one_only() {
        let mut spec = minimal();
        spec.Hostname = "box".into();
        assert_eq!(create(&spec, HOST, None).unwrap().setup.hostname.as_deref(), Some("box"));

        let linux = spec.Linux.as_mut().unwrap();
        linux.Namespaces[2].Path = "/run/ns/uts".into();
        assert_eq!(create(&spec, HOST, None).unwrap().setup.hostname, None);

        spec.Linux.as_mut().unwrap().Namespaces.remove(2);
        assert!(create(&spec, HOST, None).unwrap_err().to_string().contains("uts namespace"));
        assert!(refused(|s| s.Hostname = "x".repeat(65)).contains("64 bytes"));
    }

    #[test]
    fn an_exec_takes_absent_capabilities_from_the_container() {
        let mut spec = minimal();
        spec.Process.as_mut().unwrap().Capabilities.mut_or_insert_default().Bounding =
            vec!["CAP_KILL".into()];
        let mut process = oci::Process::new();
        process.Args = vec!["id".into()];
        process.Cwd = "/".into();
        let plan = exec(&process, &spec, None, HOST, vec![NamespaceKind::Mount], false).unwrap();
        assert_eq!(plan.process.capabilities.bounding, 1 << 5);

        process.Capabilities.mut_or_insert_default();
        let plan = exec(&process, &spec, None, HOST, vec![NamespaceKind::Mount], false).unwrap();
        assert_eq!(plan.process.capabilities.bounding, 0);
    }
}
