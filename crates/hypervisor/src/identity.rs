//! Whom a VMM runs as: nobody in particular, and nobody else's VMM either.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::MetadataExt,
    path::Path,
};

use rustix::thread::{Gid, Uid};

use crate::Accel;

/// First of the 2^28 user ids below the signed limit, which nobody hands out.
const FIRST_ID: u32 = 0x7000_0000;
const ID_BITS: u64 = 0x0fff_ffff;

/// A user without rights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User and group.
    id: u32,
    /// Supplementary groups.
    groups: Vec<u32>,
}

impl Identity {
    /// The user for the VMM of the VM that lives in `dir`; a different one for each, so that one VMM that was broken into
    /// cannot touch another. `None` when the VMM has to run as the caller: the caller is not root, or its user namespace
    /// lacks the id, or only root may open /dev/kvm.
    pub(crate) fn unprivileged(dir: &Path, accel: Accel) -> Option<Identity> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let mut hasher = DefaultHasher::new();
        dir.hash(&mut hasher);
        let id = FIRST_ID + u32::try_from(hasher.finish() & ID_BITS).ok()?;
        if !fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps(&map, id)) {
            return None;
        }
        let groups = match accel {
            Accel::Tcg => Vec::new(),
            Accel::Kvm => {
                let kvm = fs::metadata("/dev/kvm").ok()?;
                kvm_groups(kvm.mode(), kvm.gid())?
            }
        };
        Some(Identity { id, groups })
    }

    /// As the system calls want it.
    pub(crate) fn into_ids(self) -> (Uid, Gid, Vec<Gid>) {
        let groups = self.groups.into_iter().map(Gid::from_raw).collect();
        (Uid::from_raw(self.id), Gid::from_raw(self.id), groups)
    }
}

/// Whether a user namespace with this map has the id.
fn maps(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().flat_map(str::parse).collect();
        matches!(numbers[..], [inside, _, count] if (inside..inside + count).contains(&u64::from(id)))
    })
}

/// The groups that a stranger needs to open a device of this mode, or `None` if none suffice.
fn kvm_groups(mode: u32, group: u32) -> Option<Vec<u32>> {
    match mode {
        mode if mode & 0o006 == 0o006 => Some(Vec::new()),
        mode if mode & 0o060 == 0o060 => Some(vec![group]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_must_be_mapped() {
        let init = "         0          0 4294967295\n";
        let rootless = "0 1000 1\n1 100000 65536\n";
        assert!(maps(init, FIRST_ID));
        assert!(!maps(rootless, FIRST_ID));
        assert!(maps(rootless, 65536));
        assert!(!maps(rootless, 65537));
        assert!(!maps("", 0));
    }

    #[test]
    fn kvm_is_opened_by_anybody_by_a_group_or_by_root_alone() {
        for (mode, expected) in
            [(0o20666, Some(vec![])), (0o20660, Some(vec![104])), (0o20600, None), (0o20640, None)]
        {
            assert_eq!(kvm_groups(mode, 104), expected, "{mode:o}");
        }
    }
}
