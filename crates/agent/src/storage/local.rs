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
    let group = options.take_group()?;
    let target = Target::directory(&job.storage.mount_point, mounted)?;
    mounted.keep = true;
    // What was there before is somebody's.
    if target.made() {
        mounted.did(Undo::RemoveTree(target.path().to_owned()));
    }
    if let Some(mode) = mode {
        rustix::fs::chmod(target.fixed_path(), rustix::fs::Mode::from_raw_mode(mode))
            .during(|| format!("set the mode of {}", target.path().display()))?;
    }
    group.map_or(Ok(()), |group| give_to_group(target.path(), group))
}

pub(super) fn octal(mode: &str) -> Result<u32> {
    u32::from_str_radix(mode, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| Error::Invalid(format!("mode={mode} is not octal, or not a mode")))
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::Storage;

    use super::*;
    use crate::storage::apart::apart;

    #[test]
    fn a_mode_is_octal() {
        assert_eq!(octal("0777").unwrap(), 0o777);
        for mode in ["", "8", "10000", "-1"] {
            assert!(octal(mode).is_err(), "{mode:?}");
        }
    }

    #[test]
    fn what_was_there_before_stays_whatever_happens() {
        apart(async |storages, path| {
            let at = |name: &str, option: &str| Storage {
                driver: "local".into(),
                mount_point: format!("{path}/{name}"),
                options: vec![option.into()],
                ..Default::default()
            };
            std::fs::create_dir(format!("{path}/there")).unwrap();
            std::fs::write(format!("{path}/there/data"), "x").unwrap();
            let before = std::fs::metadata(format!("{path}/there")).unwrap().permissions();
            for option in ["mode=9", "fsgid=staff"] {
                for name in ["there", "new"] {
                    assert!(storages.add_all(vec![at(name, option)], None).await.is_err(), "{option}");
                }
                assert!(!std::fs::exists(format!("{path}/new")).unwrap());
                assert_eq!(std::fs::metadata(format!("{path}/there")).unwrap().permissions(), before);
                assert!(std::fs::exists(format!("{path}/there/data")).unwrap());
            }
            storages.add_all(vec![at("there", "mode=0700")], None).await.unwrap();
            storages.clear().await;
            assert!(std::fs::exists(format!("{path}/there/data")).unwrap());
        });
    }
}
