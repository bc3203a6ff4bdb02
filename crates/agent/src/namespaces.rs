//! Which namespaces a container gets: its own, the pod's, or the guest's.
//!
//! The pod's IPC and UTS namespaces are made with the sandbox and kept by descriptors, its pid namespace is that of its
//! first container (the pause container). The network is the guest's for all of them.

use std::{fs::File, os::fd::AsRawFd, os::fd::OwnedFd, sync::Arc};

use bulkhead_protocol::oci;
use nix::sched::CloneFlags;

use crate::error::{During, Result};

/// The namespaces that containers of a pod share.
#[derive(Clone, Default)]
pub(crate) struct Shared {
    /// IPC and UTS, there once the sandbox is.
    pub(crate) pod: Option<Arc<Pod>>,
    /// The pid namespace, for a container that asked to join it.
    pub(crate) pid: Option<Arc<OwnedFd>>,
}

/// The pod's IPC and UTS namespaces.
pub(crate) struct Pod {
    ipc: OwnedFd,
    uts: OwnedFd,
    hostname: String,
}

impl Pod {
    /// Makes both namespaces in a thread of their own, which leaves them to the descriptors. Blocks for that long.
    pub(crate) fn create(hostname: &str) -> Result<Pod> {
        let name = hostname.to_owned();
        let make = move || {
            nix::sched::unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
                .during(|| "make the pod's IPC and UTS namespaces".into())?;
            if !name.is_empty() {
                rustix::system::sethostname(name.as_bytes())
                    .during(|| format!("set the pod's hostname to {name:?}"))?;
            }
            let open = |kind: &str| {
                let path = format!("/proc/thread-self/ns/{kind}");
                File::open(&path).during(|| format!("open {path}")).map(OwnedFd::from)
            };
            Ok(Pod { ipc: open("ipc")?, uts: open("uts")?, hostname: name })
        };
        let thread = std::thread::Builder::new().spawn(make).during(|| "start a thread".into())?;
        thread
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("it panicked")).during(|| "run a thread".into()))
    }
}

/// A path that names the namespace behind a descriptor of this process, for any process that sees it in /proc.
fn path_of(namespace: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd())
}

/// Settles a container's namespaces in its spec.
pub(crate) fn settle(spec: &mut oci::Spec, shared: &Shared) {
    let linux = spec.Linux.mut_or_insert_default();
    // Only these are decided here: user and time namespaces stay as the host wants them.
    linux.Namespaces.retain(|namespace| !matches!(namespace.Type.as_str(), "network" | "net" | "pid"));
    for namespace in &mut linux.Namespaces {
        match (namespace.Type.as_str(), &shared.pod) {
            ("ipc", Some(pod)) => namespace.Path = path_of(&pod.ipc),
            ("uts", Some(pod)) => {
                namespace.Path = path_of(&pod.uts);
                // It is the pod's name that counts; a member must not rename them all.
                if !pod.hostname.is_empty() {
                    spec.Hostname.clear();
                }
            }
            _ => {}
        }
    }
    let pid = shared.pid.as_ref().map(|namespace| path_of(namespace)).unwrap_or_default();
    linux.Namespaces.push(oci::LinuxNamespace { Type: "pid".into(), Path: pid, ..Default::default() });
    for (kind, alias) in [("mount", "mnt"), ("cgroup", "cgroup")] {
        if !linux.Namespaces.iter().any(|namespace| namespace.Type == kind || namespace.Type == alias) {
            linux.Namespaces.push(oci::LinuxNamespace { Type: kind.into(), ..Default::default() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn settled(listed: &[(&str, &str)], hostname: &str, shared: &Shared) -> (Vec<(String, String)>, String) {
        let mut spec = oci::Spec { Hostname: hostname.into(), ..Default::default() };
        spec.Linux.mut_or_insert_default().Namespaces = listed
            .iter()
            .map(|(kind, path)| oci::LinuxNamespace {
                Type: (*kind).into(),
                Path: (*path).into(),
                ..Default::default()
            })
            .collect();
        settle(&mut spec, shared);
        let namespaces = &spec.Linux.Namespaces;
        (namespaces.iter().map(|n| (n.Type.clone(), n.Path.clone())).collect(), spec.Hostname)
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(kind, path)| ((*kind).to_owned(), (*path).to_owned())).collect()
    }

    #[test]
    fn without_a_pod_everything_is_the_containers_own_but_the_network() {
        let listed = [("pid", "/x"), ("network", ""), ("ipc", ""), ("uts", ""), ("mount", ""), ("user", "")];
        let (namespaces, hostname) = settled(&listed, "h", &Shared::default());
        let expected = [("ipc", ""), ("uts", ""), ("mount", ""), ("user", ""), ("pid", ""), ("cgroup", "")];
        assert_eq!(namespaces, pairs(&expected));
        assert_eq!(hostname, "h");
    }

    #[test]
    fn a_pods_containers_share_what_a_pod_shares() {
        let pod = Pod { ipc: null(), uts: null(), hostname: "pod".into() };
        let (ipc, uts) = (path_of(&pod.ipc), path_of(&pod.uts));
        let pid = Arc::new(null());
        let shared = Shared { pod: Some(Arc::new(pod)), pid: Some(Arc::clone(&pid)) };
        let (namespaces, hostname) = settled(&[("ipc", ""), ("uts", ""), ("cgroup", "")], "member", &shared);
        let expected =
            [("ipc", &*ipc), ("uts", &*uts), ("cgroup", ""), ("pid", &*path_of(&pid)), ("mount", "")];
        assert_eq!(namespaces, pairs(&expected));
        assert_eq!(hostname, "", "the pod has its name already");
    }

    #[test]
    fn a_pod_is_made_with_its_name_and_leaves_the_caller_alone() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: making namespaces needs root");
            return;
        }
        let before = rustix::system::uname().nodename().to_owned();
        let pod = Pod::create("bulkhead-test").unwrap();
        assert_eq!(rustix::system::uname().nodename(), before.as_c_str());
        let own = std::fs::read_link("/proc/self/ns/uts").unwrap();
        assert_ne!(std::fs::read_link(path_of(&pod.uts)).unwrap(), own);
    }
}
