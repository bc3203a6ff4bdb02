//! A bundle directory: the OCI configuration in it, what it says about the pod, and the files that shims keep beside it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use bulkhead_sandbox::{Error, Rootfs, RootfsMount, SandboxSpec};
use containerd_shim_protos::types::mount::Mount;
use nix::sys::statvfs::statvfs;
use oci_spec::runtime::{self as oci, LinuxNamespaceType};

use crate::{
    annotations::{Role, Size, size},
    error,
};

/// The address of the server, for a containerd that restarts.
pub(crate) const ADDRESS: &str = "address";
/// The server's pid, for `delete`.
pub(crate) const PID: &str = "shim.pid";
/// Where the pod keeps its state, for `delete`.
pub(crate) const STATE_ROOT: &str = "state-root";

/// Only what `start` and `delete` need of a configuration.
#[derive(Debug, Default, serde::Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

/// The annotations in the bundle's configuration.
pub(crate) fn annotations(bundle: &Path) -> Result<HashMap<String, String>, Error> {
    let path = bundle.join("config.json");
    let json = std::fs::read(&path).map_err(|source| error::io("read", &path, source))?;
    let annotated: Annotated = serde_json::from_slice(&json)
        .map_err(|source| Error::Invalid(format!("{}: {source}", path.display())))?;
    Ok(annotated.annotations.unwrap_or_default())
}

/// The bundle's configuration.
pub(crate) fn spec(bundle: &Path) -> Result<oci::Spec, Error> {
    let path = bundle.join("config.json");
    let json = std::fs::read(&path).map_err(|source| error::io("read", &path, source))?;
    serde_json::from_slice(&json).map_err(|source| Error::Invalid(format!("{}: {source}", path.display())))
}

/// Writes one of the shim's own files, whole or not at all.
pub(crate) fn write(bundle: &Path, name: &str, content: &str) -> Result<(), Error> {
    let (path, new) = (bundle.join(name), bundle.join(format!(".{name}")));
    std::fs::write(&new, content)
        .and_then(|()| std::fs::rename(&new, &path))
        .map_err(|source| error::io("write", &path, source))
}

/// The root file system of a Create request: its mounts, or the directory the configuration names.
pub(crate) fn rootfs(bundle: &Path, spec: &oci::Spec, mounts: Vec<Mount>) -> Rootfs {
    if mounts.is_empty() {
        let root = spec.root().as_ref().map_or(Path::new("rootfs"), |root| root.path());
        return Rootfs::Directory(bundle.join(root));
    }
    let mount =
        |mount: Mount| RootfsMount { kind: mount.type_, source: mount.source, options: mount.options };
    Rootfs::Mounts(mounts.into_iter().map(mount).collect())
}

/// The size of a pod that nobody sized.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DefaultSize {
    /// Virtual CPUs.
    pub(crate) vcpus: u32,
    /// MiB.
    pub(crate) memory_mib: u64,
}

/// What the pod is made from, by the configuration of the container that comes first. `default` is the size of a pod
/// that nobody sized.
pub(crate) fn sandbox_spec(id: &str, role: &Role, spec: &oci::Spec, default: DefaultSize) -> SandboxSpec {
    let annotations = spec.annotations().clone().unwrap_or_default();
    let limits = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let Size { vcpus, memory_mib } = size(role, &annotations, limits);
    SandboxSpec {
        id: id.to_owned(),
        hostname: spec.hostname().clone().unwrap_or_default(),
        dns: resolv_conf(spec),
        shm_bytes: shm(spec),
        vcpus: vcpus.map(|vcpus| vcpus.max(default.vcpus)),
        // The limits are the workload's own; the guest's kernel needs what it always needs.
        memory_mib: memory_mib.map(|mib| mib.saturating_add(default.memory_mib)),
        netns: netns(spec),
        ..Default::default()
    }
}

fn mount_source<'a>(spec: &'a oci::Spec, destination: &str) -> Option<&'a PathBuf> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts.iter().find(|mount| mount.destination() == Path::new(destination))?.source().as_ref()
}

fn resolv_conf(spec: &oci::Spec) -> Vec<String> {
    let text = mount_source(spec, "/etc/resolv.conf").and_then(|path| std::fs::read_to_string(path).ok());
    text.map(|text| text.lines().map(str::to_owned).collect()).unwrap_or_default()
}

/// The size of the tmpfs that containerd made for the pod, if it made one.
fn shm(spec: &oci::Spec) -> Option<u64> {
    let source = mount_source(spec, "/dev/shm")
        .filter(|source| source.is_absolute() && *source != Path::new("/dev/shm"))?;
    let fs = statvfs(source).ok()?;
    Some(fs.blocks().saturating_mul(fs.fragment_size())).filter(|bytes| *bytes > 0)
}

fn netns(spec: &oci::Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_deref()?;
    namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?.path().clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_read_from_the_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let resolv = directory.path().join("resolv.conf");
        std::fs::write(&resolv, "nameserver 10.0.0.1\nsearch a b\n").unwrap();
        let json = serde_json::json!({
            "ociVersion": "1.0.2",
            "hostname": "pod",
            "root": {"path": "rootfs"},
            "annotations": {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-memory": "104857600"},
            "mounts": [
                {"destination": "/etc/resolv.conf", "type": "bind", "source": resolv},
                {"destination": "/dev/shm", "type": "bind", "source": "/proc"}
            ],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}]}
        });
        std::fs::write(directory.path().join("config.json"), json.to_string()).unwrap();
        assert_eq!(annotations(directory.path()).unwrap().len(), 2);
        let spec = spec(directory.path()).unwrap();
        let sandbox = sandbox_spec("s", &Role::Sandbox, &spec, DefaultSize { vcpus: 1, memory_mib: 256 });
        assert_eq!((sandbox.id.as_str(), sandbox.hostname.as_str()), ("s", "pod"));
        assert_eq!(sandbox.dns, ["nameserver 10.0.0.1", "search a b"]);
        assert_eq!(sandbox.netns, Some("/run/netns/x".into()));
        assert_eq!((sandbox.vcpus, sandbox.memory_mib), (None, Some(356)));
        assert_eq!(sandbox.shm_bytes, None, "proc has no size");
        assert!(
            matches!(rootfs(directory.path(), &spec, vec![]), Rootfs::Directory(path) if path.ends_with("rootfs"))
        );
    }

    #[test]
    fn a_bad_configuration_names_its_file() {
        let directory = tempfile::tempdir().unwrap();
        assert!(annotations(directory.path()).unwrap_err().to_string().contains("config.json"));
        assert!(spec(directory.path()).unwrap_err().to_string().contains("config.json"));
        for json in ["not json", r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"wormhole"}]}}"#] {
            std::fs::write(directory.path().join("config.json"), json).unwrap();
            let error = spec(directory.path()).unwrap_err();
            assert!(matches!(&error, Error::Invalid(text) if text.contains("config.json")), "{error}");
        }
    }
}
