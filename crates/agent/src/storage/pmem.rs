//! `nvdimm`: a file system on persistent memory, of an NVDIMM or of virtio.
//!
//! With the option `dax` files are used where they lie, and the guest's page cache holds no copy.

use std::path::Path;

use super::{Job, Mounted, block, mount::Options};
use crate::error::{Error, Result};

/// Mounts it as a disk, once it is clear that the device can do what `dax` asks for: the kernel would only call the
/// argument invalid.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let options = Options::parse(&job.storage.options)?;
    let dax = options.data.iter().any(|option| matches!(option.as_str(), "dax" | "dax=always"));
    if dax
        && let Some(node) = &job.node
        && !has_direct_access(node)
    {
        return Err(Error::State(format!(
            "{} cannot be mounted with dax: the device has no direct access; leave the option out",
            node.display()
        )));
    }
    block::mount(job, mounted)
}

fn has_direct_access(node: &Path) -> bool {
    let name = node.file_name().unwrap_or_default();
    let path = Path::new("/sys/class/block").join(name).join("queue/dax");
    // A kernel that does not say lets the mount find out.
    std::fs::read_to_string(path).map_or(true, |dax| dax.trim_end() != "0")
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::Storage;

    use super::super::disks::{Disk, alone, job, nothing_in, run};
    use super::*;

    #[test]
    fn dax_on_a_device_without_it_is_refused_in_words() {
        let Some(disk) = Disk::ext4("hello") else { return };
        alone(|| {
            let mut storage = Storage {
                driver: "nvdimm".into(),
                fstype: "ext4".into(),
                mount_point: "/run/x".into(),
                options: vec!["ro,dax".into()],
                ..Default::default()
            };
            let error = run(mount, &job(storage.clone(), Some(&disk.node))).err().unwrap();
            assert!(matches!(&error, Error::State(text) if text.contains("direct access")), "{error}");
            assert!(nothing_in("/run"));
            storage.options = vec!["ro".into()];
            run(mount, &job(storage, Some(&disk.node))).unwrap().undo("/run/x");
            assert!(nothing_in("/run"));
        });
    }
}
