//! Capability names, sets, and what of them can be granted.

use bulkhead_protocol::oci;
use serde::{Deserialize, Serialize};

use crate::Error;

/// In the order of their numbers.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The five sets, a bit a capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Capabilities {
    /// The most that an execve can bring.
    pub(crate) bounding: u64,
    /// What is used for permission checks.
    pub(crate) effective: u64,
    /// What survives an execve of a file with the same inheritable ones.
    pub(crate) inheritable: u64,
    /// The most that can be made effective.
    pub(crate) permitted: u64,
    /// What survives any execve without privileges of its own.
    pub(crate) ambient: u64,
}

impl Capabilities {
    /// The sets of the spec, reduced to those of `grantable`: the OCI specification wants a capability that cannot be
    /// granted to be logged, not to fail.
    pub(super) fn new(spec: &oci::LinuxCapabilities, grantable: u64) -> Result<Capabilities, Error> {
        let wanted = Capabilities {
            bounding: set(&spec.Bounding)?,
            effective: set(&spec.Effective)?,
            inheritable: set(&spec.Inheritable)?,
            permitted: set(&spec.Permitted)?,
            ambient: set(&spec.Ambient)?,
        };
        let permitted = wanted.permitted & grantable;
        let inheritable = wanted.inheritable & grantable & (wanted.bounding | permitted);
        let granted = Capabilities {
            bounding: wanted.bounding & grantable,
            effective: wanted.effective & permitted,
            inheritable,
            permitted,
            ambient: wanted.ambient & permitted & inheritable,
        };
        for (name, wanted, granted) in [
            ("bounding", wanted.bounding, granted.bounding),
            ("effective", wanted.effective, granted.effective),
            ("inheritable", wanted.inheritable, granted.inheritable),
            ("permitted", wanted.permitted, granted.permitted),
            ("ambient", wanted.ambient, granted.ambient),
        ] {
            let missing = wanted & !granted;
            if missing != 0 {
                tracing::warn!(set = name, capabilities = %names(missing), "cannot be granted");
            }
        }
        Ok(granted)
    }
}

/// Bits as names, for people.
fn names(bits: u64) -> String {
    let name = |bit: usize| NAMES.get(bit).map_or_else(|| bit.to_string(), |name| format!("CAP_{name}"));
    let list: Vec<_> = (0..64).filter(|bit| bits & (1 << bit) != 0).map(name).collect();
    list.join(",")
}

fn set(list: &[String]) -> Result<u64, Error> {
    list.iter().try_fold(0, |bits, text| {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let bit = NAMES
            .iter()
            .position(|n| *n == name)
            .ok_or_else(|| Error::Invalid(format!("unknown capability {text:?}")))?;
        Ok(bits | 1 << bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(all: &[&str]) -> oci::LinuxCapabilities {
        let list: Vec<String> = all.iter().map(|s| (*s).to_owned()).collect();
        oci::LinuxCapabilities {
            Bounding: list.clone(),
            Effective: list.clone(),
            Inheritable: list.clone(),
            Permitted: list.clone(),
            Ambient: list,
            ..Default::default()
        }
    }

    #[test]
    fn names_become_bits() {
        let caps = Capabilities::new(&spec(&["CAP_CHOWN", "kill", "CAP_CHECKPOINT_RESTORE"]), !0).unwrap();
        let bits = 1 | 1 << 5 | 1 << 40;
        assert_eq!((caps.bounding, caps.ambient), (bits, bits));
        assert_eq!(names(bits), "CAP_CHOWN,CAP_KILL,CAP_CHECKPOINT_RESTORE");
        let error = Capabilities::new(&spec(&["CAP_FLY"]), !0).unwrap_err();
        assert!(matches!(error, Error::Invalid(text) if text.contains("CAP_FLY")));
    }

    #[test]
    fn what_cannot_be_granted_is_left_out() {
        let caps = Capabilities::new(&spec(&["CAP_CHOWN", "CAP_SYS_RESOURCE"]), 1).unwrap();
        assert_eq!(
            caps,
            Capabilities { bounding: 1, effective: 1, inheritable: 1, permitted: 1, ambient: 1 }
        );
    }

    #[test]
    fn ambient_needs_permitted_and_inheritable() {
        let mut spec = spec(&["CAP_CHOWN", "CAP_KILL"]);
        spec.Inheritable.clear();
        assert_eq!(Capabilities::new(&spec, !0).unwrap().ambient, 0);
    }
}
