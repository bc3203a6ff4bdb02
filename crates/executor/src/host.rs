//! What this machine offers, as far as a plan depends on it.

use std::{fs, path::Path};

use crate::{Error, plan::Host};

/// Looks it up.
pub(crate) fn facts() -> Result<Host, Error> {
    let status = fs::read_to_string("/proc/self/status").map_err(Error::io("reading /proc/self/status"))?;
    Ok(Host {
        // A child is executed as root, which gains all of them.
        capabilities: bounding_set(&status).unwrap_or_default(),
        apparmor: fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|text| text.starts_with('Y')),
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        owns_machine: std::process::id() == 1,
    })
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
}
