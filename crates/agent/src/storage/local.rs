//! `local`: a plain directory of the guest that lives as long as the pod.

use super::{
    Job, Mounted, Undo,
    mount::{Options, Target, give_to_group},
};
use crate::error::{During, Error, Result};

/// Makes the directory; `mode=<octal>` and `fsgid=<gid>` say whose it is.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let mut options = Options::parse(&job.storage.options)?;
    let mode = options.take("mode").map(|mode| octal(&mode)).transpose()?;
    let group = options.take("fsgid");
    let target = Target::directory(&job.storage.mount_point, mounted)?;
    mounted.keep = true;
    mounted.did(Undo::RemoveTree(target.path().to_owned()));
    if let Some(mode) = mode {
        rustix::fs::chmod(target.fixed_path(), rustix::fs::Mode::from_raw_mode(mode))
            .during(|| format!("set the mode of {}", target.path().display()))?;
    }
    group.map_or(Ok(()), |group| give_to_group(target.path(), &group))
}

pub(super) fn octal(mode: &str) -> Result<u32> {
    u32::from_str_radix(mode, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| Error::Invalid(format!("mode={mode} is not octal, or not a mode")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal() {
        assert_eq!(octal("0777").unwrap(), 0o777);
        for mode in ["", "8", "10000", "-1"] {
            assert!(octal(mode).is_err(), "{mode:?}");
        }
    }
}
