//! Kernel parameters: only those that belong to a namespace of the container.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{NamespaceKind, NamespacePlan, no_nul};
use crate::Error;

/// A kernel parameter to set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sysctl {
    /// Below `/proc/sys`: `net/ipv4/ip_forward`.
    pub(crate) path: String,
    /// What is written.
    pub(crate) value: String,
}

const IPC: [&str; 8] = ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];

/// Checks each parameter against the namespaces; sorted, so that the order is the same each time.
pub(super) fn plan(
    wanted: &HashMap<String, String>,
    namespaces: &NamespacePlan,
    owns_machine: bool,
) -> Result<Vec<Sysctl>, Error> {
    let mut sysctls = Vec::new();
    for (name, value) in wanted {
        no_nul("sysctl", value)?;
        let path = path(name)?;
        let allowed = match kind(&path) {
            // A sandbox has one network, and its parameters are the pod's; on somebody's machine they are not ours.
            Some(NamespaceKind::Network) => namespaces.has(NamespaceKind::Network) || owns_machine,
            Some(kind) => namespaces.has(kind),
            None => {
                return Err(Error::Invalid(format!("sysctl {name:?} does not belong to any namespace")));
            }
        };
        if !allowed {
            return Err(Error::Invalid(format!("sysctl {name:?} needs a namespace of the container's own")));
        }
        sysctls.push(Sysctl { path, value: value.clone() });
    }
    sysctls.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sysctls)
}

/// As sysctl(8): if dots separate, slashes inside the name stand for dots, and the other way round.
fn path(name: &str) -> Result<String, Error> {
    no_nul("sysctl", name)?;
    let dots = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'.');
    let path: String = if dots {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect()
    } else {
        name.to_owned()
    };
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::Invalid(format!("malformed sysctl name {name:?}")));
    }
    Ok(path)
}

fn kind(path: &str) -> Option<NamespaceKind> {
    if path.starts_with("net/") {
        Some(NamespaceKind::Network)
    } else if path.starts_with("fs/mqueue/")
        || path.strip_prefix("kernel/").is_some_and(|name| IPC.contains(&name))
    {
        Some(NamespaceKind::Ipc)
    } else if path == "kernel/domainname" {
        Some(NamespaceKind::Uts)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str, namespaces: &[NamespaceKind], owns_machine: bool) -> Result<String, String> {
        let plan_of = NamespacePlan { new: namespaces.to_vec(), join: Vec::new() };
        let wanted = HashMap::from([(name.to_owned(), "1".to_owned())]);
        plan(&wanted, &plan_of, owns_machine).map(|s| s[0].path.clone()).map_err(|e| e.to_string())
    }

    #[test]
    fn parameters_of_a_namespace_are_accepted() {
        for (name, kind, path) in [
            ("net.ipv4.ip_forward", NamespaceKind::Network, "net/ipv4/ip_forward"),
            ("net/ipv4/conf/eth0.5/rp_filter", NamespaceKind::Network, "net/ipv4/conf/eth0.5/rp_filter"),
            ("net.ipv4.conf.eth0/5.rp_filter", NamespaceKind::Network, "net/ipv4/conf/eth0.5/rp_filter"),
            ("kernel.shmmax", NamespaceKind::Ipc, "kernel/shmmax"),
            ("fs.mqueue.msg_max", NamespaceKind::Ipc, "fs/mqueue/msg_max"),
            ("kernel.domainname", NamespaceKind::Uts, "kernel/domainname"),
        ] {
            assert_eq!(one(name, &[kind], false).as_deref(), Ok(path));
            assert!(one(name, &[], false).unwrap_err().contains("container's own"));
        }
        assert!(one("net.core.somaxconn", &[], true).is_ok(), "the machine is the sandbox");
        assert!(one("kernel.shmmax", &[], true).is_err());
    }

    #[test]
    fn the_rest_is_refused() {
        let all = [NamespaceKind::Network, NamespaceKind::Ipc, NamespaceKind::Uts];
        for name in ["kernel.core_pattern", "vm.swappiness", "kernel.hostname", "fs.file-max"] {
            assert!(one(name, &all, true).unwrap_err().contains("any namespace"), "{name}");
        }
        for name in ["net/../kernel/core_pattern", "net..ipv4", "", "net/./x", "net/\0"] {
            assert!(one(name, &all, true).is_err(), "{name}");
        }
    }
}
