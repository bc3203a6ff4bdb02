//! What this machine offers, as far as a plan depends on it.

use std::{fs, path::Path};

use crate::{
    Error,
    plan::{
        Host,
        labels::{Module, UNCONFINED},
    },
};

/// Looks it up.
pub(crate) fn facts() -> Result<Host, Error> {
    let status = fs::read_to_string("/proc/self/status").map_err(Error::io("reading /proc/self/status"))?;
    Ok(Host {
        // A child is executed as root, which gains all of them.
        capabilities: bounding_set(&status).unwrap_or_default(),
        owns_machine: std::process::id() == 1,
    })
}

/// Whether the kernel enforces a label: the module is active and, for AppArmor, has been given the profile. (Without
/// securityfs, through which they are given, there is none.)
pub(crate) fn enforces(module: Module, label: &str) -> bool {
    match module {
        Module::AppArmor => fs::read_to_string("/sys/kernel/security/apparmor/profiles")
            .is_ok_and(|profiles| label == UNCONFINED || lists(&profiles, label)),
        Module::SeLinux => Path::new("/sys/fs/selinux/enforce").exists(),
    }
}

/// A line a profile: `name (mode)`.
fn lists(profiles: &str, name: &str) -> bool {
    profiles.lines().any(|line| line.rsplit_once(" (").is_some_and(|(listed, _)| listed == name))
}

fn bounding_set(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounding_set_is_read() {
        assert_eq!(bounding_set("CapEff:\t0\nCapBnd:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
        assert_eq!(bounding_set("CapEff:\t0\n"), None);
    }

    #[test]
    fn a_profile_is_known_by_its_whole_name() {
        let profiles = "docker-default (enforce)\n/usr/bin/a b (complain)\n";
        assert!(lists(profiles, "docker-default") && lists(profiles, "/usr/bin/a b"));
        assert!(!lists(profiles, "docker") && !lists(profiles, "enforce)") && !lists("", "x"));
    }
}
