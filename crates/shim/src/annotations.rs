//! What the annotations of a container say: whether it is a pod's sandbox, a member of one, or alone; and how big the pod is.

use std::collections::HashMap;

use oci_spec::runtime::LinuxResources;

/// A container's place in its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Docker, nerdctl, ctr: a VM of its own, which ends with it.
    Single,
    /// The pod's first container; the pod ends with it.
    Sandbox,
    /// A further container of the named pod.
    Member {
        /// Id of the pod's sandbox container.
        sandbox: String,
    },
}

/// How one client writes it down.
struct Convention {
    kind: &'static str,
    sandbox: &'static str,
    container: &'static str,
    sandbox_id: &'static str,
}

/// In order: the first whose `kind` is present decides.
const CONVENTIONS: [Convention; 3] = [
    Convention {
        kind: "io.kubernetes.cri.container-type",
        sandbox: "sandbox",
        container: "container",
        sandbox_id: "io.kubernetes.cri.sandbox-id",
    },
    Convention {
        kind: "io.kubernetes.cri-o.ContainerType",
        sandbox: "sandbox",
        container: "container",
        sandbox_id: "io.kubernetes.cri-o.SandboxID",
    },
    Convention {
        kind: "io.kubernetes.docker.type",
        sandbox: "podsandbox",
        container: "container",
        sandbox_id: "io.kubernetes.sandbox.id",
    },
];

/// Annotations that contradict themselves.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RoleError {
    /// A value nobody defined.
    #[error("annotation {key} is {value:?}; {sandbox} or {container} would be right")]
    UnknownKind {
        /// The annotation.
        key: &'static str,
        /// Its value.
        value: String,
        /// A value that would be right.
        sandbox: &'static str,
        /// The other one.
        container: &'static str,
    },
    /// A member of no pod.
    #[error("annotation {kind} says container, but {id} does not name its sandbox")]
    NoSandbox {
        /// The annotation that is there.
        kind: &'static str,
        /// The annotation that is missing, empty or not an identifier.
        id: &'static str,
    },
}

/// The container's place in its pod.
pub(crate) fn role(annotations: &HashMap<String, String>) -> Result<Role, RoleError> {
    for convention in &CONVENTIONS {
        let Some(kind) = annotations.get(convention.kind) else { continue };
        if kind == convention.sandbox {
            return Ok(Role::Sandbox);
        }
        if kind != convention.container {
            return Err(RoleError::UnknownKind {
                key: convention.kind,
                value: kind.clone(),
                sandbox: convention.sandbox,
                container: convention.container,
            });
        }
        return match annotations.get(convention.sandbox_id).filter(|id| crate::args::is_identifier(id)) {
            Some(id) => Ok(Role::Member { sandbox: id.clone() }),
            None => Err(RoleError::NoSandbox { kind: convention.kind, id: convention.sandbox_id }),
        };
    }
    Ok(Role::Single)
}

/// What the pod's workload may use, when somebody said so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    /// Whole CPUs, rounded up.
    pub(crate) vcpus: Option<u32>,
    /// MiB, rounded down.
    pub(crate) memory_mib: Option<u64>,
}

/// The size of the pod: from the sandbox' annotations, or for a single container from its limits.
pub(crate) fn size(
    role: &Role,
    annotations: &HashMap<String, String>,
    limits: Option<&LinuxResources>,
) -> Size {
    let (quota, period, shares, memory) = if *role == Role::Sandbox {
        let number = |key: &str| annotations.get(key).and_then(|value| value.trim().parse::<i64>().ok());
        (
            number("io.kubernetes.cri.sandbox-cpu-quota"),
            number("io.kubernetes.cri.sandbox-cpu-period"),
            number("io.kubernetes.cri.sandbox-cpu-shares"),
            number("io.kubernetes.cri.sandbox-memory"),
        )
    } else {
        let cpu = limits.and_then(|limits| limits.cpu().as_ref());
        (
            cpu.and_then(|cpu| cpu.quota()),
            cpu.and_then(|cpu| cpu.period()).and_then(|period| i64::try_from(period).ok()),
            None,
            limits.and_then(|limits| limits.memory().as_ref()).and_then(|memory| memory.limit()),
        )
    };
    let vcpus = match (quota, period, shares) {
        (Some(quota), Some(period), _) if quota > 0 && period > 0 => Some(quota.div_ceil_positive(period)),
        // Unlimited, but weighed: the weight is what the pod asked for, 1024 a CPU.
        (Some(quota), _, Some(shares)) if quota < 0 && shares > 0 => Some(shares.div_ceil_positive(1024)),
        _ => None,
    };
    Size {
        vcpus: vcpus.and_then(|vcpus| u32::try_from(vcpus).ok()),
        memory_mib: memory
            .and_then(|bytes| u64::try_from(bytes).ok())
            .map(|bytes| bytes >> 20)
            .filter(|mib| *mib > 0),
    }
}

trait DivCeil {
    /// Division of positive numbers, rounded up.
    fn div_ceil_positive(self, divisor: Self) -> Self;
}

impl DivCeil for i64 {
    fn div_ceil_positive(self, divisor: i64) -> i64 {
        self / divisor + i64::from(self % divisor != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_convention_is_understood() {
        let member = |id: &str| Ok(Role::Member { sandbox: id.into() });
        for (pairs, want) in [
            (vec![], Ok(Role::Single)),
            (vec![("unrelated", "sandbox")], Ok(Role::Single)),
            (vec![("io.kubernetes.cri.container-type", "sandbox")], Ok(Role::Sandbox)),
            (
                vec![
                    ("io.kubernetes.cri.container-type", "container"),
                    ("io.kubernetes.cri.sandbox-id", "p"),
                ],
                member("p"),
            ),
            (vec![("io.kubernetes.cri-o.ContainerType", "sandbox")], Ok(Role::Sandbox)),
            (
                vec![
                    ("io.kubernetes.cri-o.ContainerType", "container"),
                    ("io.kubernetes.cri-o.SandboxID", "q"),
                ],
                member("q"),
            ),
            (vec![("io.kubernetes.docker.type", "podsandbox")], Ok(Role::Sandbox)),
            (
                vec![("io.kubernetes.docker.type", "container"), ("io.kubernetes.sandbox.id", "r")],
                member("r"),
            ),
            // containerd's own annotation wins over the others.
            (
                vec![
                    ("io.kubernetes.cri.container-type", "sandbox"),
                    ("io.kubernetes.docker.type", "container"),
                ],
                Ok(Role::Sandbox),
            ),
        ] {
            assert_eq!(role(&map(&pairs)), want, "{pairs:?}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(matches!(
            role(&map(&[("io.kubernetes.cri.container-type", "podsandbox")])),
            Err(RoleError::UnknownKind { .. })
        ));
        assert!(matches!(
            role(&map(&[("io.kubernetes.cri.container-type", "container")])),
            Err(RoleError::NoSandbox { .. })
        ));
        let escape = map(&[
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.sandbox-id", "../x"),
        ]);
        assert!(matches!(role(&escape), Err(RoleError::NoSandbox { .. })));
    }

    #[test]
    fn a_pod_is_sized_by_its_annotations() {
        let sized = |quota: &str, period: &str, shares: &str, memory: &str| {
            let annotations = map(&[
                ("io.kubernetes.cri.sandbox-cpu-quota", quota),
                ("io.kubernetes.cri.sandbox-cpu-period", period),
                ("io.kubernetes.cri.sandbox-cpu-shares", shares),
                ("io.kubernetes.cri.sandbox-memory", memory),
            ]);
            let size = size(&Role::Sandbox, &annotations, None);
            (size.vcpus, size.memory_mib)
        };
        assert_eq!(sized("250000", "100000", "2", "268435456"), (Some(3), Some(256)));
        assert_eq!(sized("100000", "100000", "2", "0"), (Some(1), None));
        assert_eq!(sized("0", "100000", "2048", "0"), (None, None));
        assert_eq!(sized("-1", "100000", "1536", "-1"), (Some(2), None));
        assert_eq!(sized("x", "", "", ""), (None, None));
    }

    #[test]
    fn a_single_container_is_sized_by_its_limits() {
        let limits: LinuxResources =
            serde_json::from_str(r#"{"cpu":{"quota":150000,"period":100000},"memory":{"limit":104857600}}"#)
                .unwrap();
        let want = Size { vcpus: Some(2), memory_mib: Some(100) };
        assert_eq!(size(&Role::Single, &HashMap::new(), Some(&limits)), want);
        assert_eq!(size(&Role::Single, &HashMap::new(), None), Size::default());
    }
}
