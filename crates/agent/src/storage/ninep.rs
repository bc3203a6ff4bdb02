//! `9p`: a directory tree of the host, by its tag, over virtio.

use super::{
    Job, Mounted,
    mount::{Options, Target, mount as mount_on},
};
use crate::error::Result;

/// Mounts the tree. What the host leaves open is the transport and the dialect, and there is one sensible answer to each.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let options = complete(Options::parse(&job.storage.options)?);
    job.guest.load_filesystem("9p")?;
    let target = Target::directory(&job.storage.mount_point, mounted)?;
    if target.is_mount_point()? {
        return Ok(());
    }
    mount_on(&job.storage.source, &target, "9p", &options, mounted)
}

fn complete(mut options: Options) -> Options {
    for default in ["trans=virtio", "version=9p2000.L"] {
        let key = &default[..=default.find('=').unwrap_or(0)];
        if !options.data.iter().any(|option| option.starts_with(key)) {
            options.data.push(default.to_owned());
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_host_leaves_open_is_filled_in() {
        let cases: &[(&[&str], &[&str])] = &[
            (&[], &["trans=virtio", "version=9p2000.L"]),
            (
                &["trans=virtio,version=9p2000.u", "nodev", "msize=8192"],
                &["trans=virtio", "version=9p2000.u", "msize=8192"],
            ),
            (&["cache=mmap", "trans=fd"], &["cache=mmap", "trans=fd", "version=9p2000.L"]),
        ];
        for (given, expected) in cases {
            let given: Vec<String> = given.iter().map(|option| (*option).to_owned()).collect();
            assert_eq!(complete(Options::parse(&given).unwrap()).data, *expected);
        }
    }
}
