//! Which namespaces a process gets: new ones, joined ones, or (not listed) the caller's.

use bulkhead_protocol::oci;
use serde::{Deserialize, Serialize};

use crate::Error;

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum NamespaceKind {
    /// Control groups.
    Cgroup,
    /// System V IPC and message queues.
    Ipc,
    /// Mounts.
    Mount,
    /// Network.
    Network,
    /// Process ids.
    Pid,
    /// Host name.
    Uts,
}

impl NamespaceKind {
    /// The kernel's `CLONE_NEW*`.
    pub(crate) fn flag(self) -> i32 {
        match self {
            NamespaceKind::Cgroup => libc::CLONE_NEWCGROUP,
            NamespaceKind::Ipc => libc::CLONE_NEWIPC,
            NamespaceKind::Mount => libc::CLONE_NEWNS,
            NamespaceKind::Network => libc::CLONE_NEWNET,
            NamespaceKind::Pid => libc::CLONE_NEWPID,
            NamespaceKind::Uts => libc::CLONE_NEWUTS,
        }
    }

    /// Its name below `/proc/<pid>/ns`.
    pub(crate) fn proc_name(self) -> &'static str {
        match self {
            NamespaceKind::Cgroup => "cgroup",
            NamespaceKind::Ipc => "ipc",
            NamespaceKind::Mount => "mnt",
            NamespaceKind::Network => "net",
            NamespaceKind::Pid => "pid",
            NamespaceKind::Uts => "uts",
        }
    }

    fn parse(text: &str) -> Result<NamespaceKind, Error> {
        Ok(match text {
            "cgroup" => NamespaceKind::Cgroup,
            "ipc" => NamespaceKind::Ipc,
            "mount" | "mnt" => NamespaceKind::Mount,
            "network" | "net" => NamespaceKind::Network,
            "pid" => NamespaceKind::Pid,
            "uts" => NamespaceKind::Uts,
            "user" | "time" => return Err(Error::Unsupported(format!("{text} namespaces"))),
            _ => return Err(Error::Invalid(format!("unknown namespace type {text:?}"))),
        })
    }
}

/// Namespaces to make and to join. The descriptors of the latter travel beside the plan, in the same order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamespacePlan {
    /// To make.
    pub(crate) new: Vec<NamespaceKind>,
    /// To join.
    pub(crate) join: Vec<NamespaceKind>,
}

impl NamespacePlan {
    /// Sorts the spec's list.
    pub(super) fn new(list: &[oci::LinuxNamespace]) -> Result<NamespacePlan, Error> {
        let mut plan = NamespacePlan::default();
        for namespace in list {
            let kind = NamespaceKind::parse(&namespace.Type)?;
            if plan.has(kind) {
                return Err(Error::Invalid(format!("two namespaces of type {:?}", namespace.Type)));
            }
            if namespace.Path.is_empty() { plan.new.push(kind) } else { plan.join.push(kind) }
        }
        if !plan.new.contains(&NamespaceKind::Mount) {
            return Err(Error::Unsupported("a container without a new mount namespace".to_owned()));
        }
        Ok(plan)
    }

    /// Whether the process leaves the caller's namespace of this kind.
    pub(crate) fn has(&self, kind: NamespaceKind) -> bool {
        self.listed().any(|k| k == kind)
    }

    /// Every namespace that is not the caller's.
    pub(crate) fn listed(&self) -> impl Iterator<Item = NamespaceKind> + '_ {
        self.new.iter().chain(&self.join).copied()
    }

    /// The paths of the namespaces to join, in the order of `join`.
    pub(crate) fn paths(list: &[oci::LinuxNamespace]) -> impl Iterator<Item = &str> {
        list.iter().map(|n| n.Path.as_str()).filter(|path| !path.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_spec::namespace, *};

    #[test]
    fn the_list_is_sorted_into_new_and_joined() {
        let mut list = ["mnt", "network", "uts"].map(namespace).to_vec();
        list[1].Path = "/proc/7/ns/net".into();
        let plan = NamespacePlan::new(&list).unwrap();
        assert_eq!(plan.new, [NamespaceKind::Mount, NamespaceKind::Uts]);
        assert_eq!(plan.join, [NamespaceKind::Network]);
        assert_eq!(NamespacePlan::paths(&list).collect::<Vec<_>>(), ["/proc/7/ns/net"]);
        assert!(plan.has(NamespaceKind::Network) && !plan.has(NamespaceKind::Pid));
    }

    #[test]
    fn bad_lists_are_refused() {
        for (kinds, text) in [
            (vec!["mount", "user"], "not supported: user namespaces"),
            (vec!["mount", "time"], "not supported: time namespaces"),
            (vec!["mount", "fancy"], "unknown namespace type \"fancy\""),
            (vec!["mount", "net", "network"], "two namespaces of type"),
            (vec!["pid"], "without a new mount namespace"),
        ] {
            let list: Vec<_> = kinds.into_iter().map(namespace).collect();
            let error = NamespacePlan::new(&list).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
