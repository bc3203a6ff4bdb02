//! Disks: virtio-blk by PCI path, SCSI by address, and those whose names are known (virtio-mmio, pmem).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::{
    pci::PciPath,
    sysfs::{Look, Node, Places, node, only},
};
use crate::error::{During, Error, Result};

/// The whole disk of the virtio device at a PCI path.
pub(super) fn by_pci(places: &Places, path: &PciPath) -> Result<Look<Node>> {
    let (device, _) = match path.find(&places.sys)? {
        Look::Found(found) => found,
        Look::Missing(what) => return Ok(Look::Missing(what)),
    };
    let Some(virtio) = only(&device, |name| name.starts_with("virtio"))? else {
        return Ok(Look::absent(&device.join("virtio*")));
    };
    disk_of(places, &virtio)
}

/// The disk that a name in `/dev` stands for.
pub(super) fn by_name(places: &Places, name: &str) -> Result<Look<Node>> {
    node(places, &places.sys.join("class/block").join(name))
}

/// The name of a node right below `/dev`.
pub(super) fn name_in_dev(path: &str) -> Result<&str> {
    let name = path.strip_prefix("/dev/").filter(|name| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        !name.starts_with('.') && (1..=64).contains(&name.len()) && name.bytes().all(plain)
    });
    name.ok_or_else(|| Error::Invalid(format!("{path:?} is not the path of a disk: `/dev/NAME` is wanted")))
}

fn disk_of(places: &Places, device: &Path) -> Result<Look<Node>> {
    let block = device.join("block");
    match only(&block, |_| true)? {
        Some(disk) => node(places, &disk),
        None => Ok(Look::absent(&block)),
    }
}

/// Where a SCSI disk is, as the hosts say it: `<id>:<lun>`, on whichever controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScsiAddress {
    id: u32,
    lun: u64,
}

impl std::str::FromStr for ScsiAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<ScsiAddress> {
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let address = text.split_once(':').filter(|(id, lun)| digits(id) && digits(lun));
        let address = address.and_then(|(id, lun)| Some((id.parse().ok()?, lun.parse().ok()?)));
        let (id, lun) = address
            .ok_or_else(|| Error::Invalid(format!("{text:?} is not a SCSI address: `ID:LUN` is wanted")))?;
        Ok(ScsiAddress { id, lun })
    }
}

/// Looks for a SCSI disk, and makes each controller look for it once.
pub(super) struct ScsiSearch {
    pub(super) address: ScsiAddress,
    /// Controllers may be told to scan: they are the agent's own.
    pub(super) scan: bool,
    pub(super) scanned: BTreeSet<PathBuf>,
}

impl ScsiSearch {
    /// Scanning is left out when the disk is there.
    pub(super) fn look(&mut self, places: &Places) -> Result<Look<Node>> {
        let seen = self.find(places)?;
        if matches!(seen, Look::Found(_)) || !self.scan {
            return Ok(seen);
        }
        let ScsiAddress { id, lun } = self.address;
        for host in entries(&places.sys.join("class/scsi_host")) {
            if self.scanned.insert(host.clone()) {
                let file = host.join("scan");
                fs::write(&file, format!("- {id} {lun}"))
                    .during(|| format!("scan for SCSI disk {id}:{lun} with {}", file.display()))?;
            }
        }
        self.find(places)
    }

    /// `<host>:<channel>:<id>:<lun>` of any host and channel; two of them are not guessed at.
    fn find(&self, places: &Places) -> Result<Look<Node>> {
        let devices = places.sys.join("bus/scsi/devices");
        let wanted = |name: &str| {
            let parts: Vec<u64> = name.split(':').map_while(|part| part.parse().ok()).collect();
            matches!(parts[..], [_, _, id, lun] if id == u64::from(self.address.id) && lun == self.address.lun)
        };
        match only(&devices, wanted)? {
            Some(device) => disk_of(places, &device),
            None => {
                let ScsiAddress { id, lun } = self.address;
                Ok(Look::absent(&devices.join(format!("*:*:{id}:{lun}"))))
            }
        }
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries
}

#[cfg(test)]
mod tests {
    use super::{super::test_tree::Tree, *};

    const DISK: &str = "devices/pci0000:00/0000:00:02.0/virtio0/block/vda";

    fn search(address: &str, scan: bool) -> ScsiSearch {
        ScsiSearch { address: address.parse().unwrap(), scan, scanned: BTreeSet::new() }
    }

    #[test]
    fn a_virtio_disk_appears_step_by_step() {
        let tree = Tree::new();
        let path: PciPath = "02".parse().unwrap();
        let missing = |part: &str| {
            let Look::Missing(what) = by_pci(tree.places(), &path).unwrap() else { panic!("{part}") };
            assert!(what.contains(part), "{what}");
        };
        missing("pci0000:00");
        tree.directory("devices/pci0000:00/0000:00:02.0");
        missing("virtio*");
        tree.directory("devices/pci0000:00/0000:00:02.0/virtio0");
        missing("virtio0/block");
        tree.directory(DISK);
        missing("vda/dev");
        tree.sysfs(&format!("{DISK}/dev"), "254:16\n");
        missing("dev/vda");
        tree.node("vda");
        // A partition is no disk.
        tree.sysfs(&format!("{DISK}/vda1/dev"), "254:17\n");
        let Look::Found(node) = by_pci(tree.places(), &path).unwrap() else { panic!("a disk") };
        assert_eq!((node.major, node.minor), (254, 16));
        assert!(node.path.ends_with("dev/vda"));
    }

    #[test]
    fn a_named_disk_is_looked_up_and_a_name_is_only_a_name() {
        let tree = Tree::new();
        tree.sysfs("class/block/pmem0/dev", "259:0\n");
        tree.node("pmem0");
        assert!(matches!(by_name(tree.places(), "pmem0"), Ok(Look::Found(_))));
        assert!(matches!(by_name(tree.places(), "vdb"), Ok(Look::Missing(_))));
        assert_eq!(name_in_dev("/dev/vda").unwrap(), "vda");
        let long = format!("/dev/{}", "x".repeat(65));
        for path in ["", "vda", "/dev/", "/dev/..", "/dev/../etc/shadow", "/dev/a/b", "/dev/a\0", &long] {
            assert!(matches!(name_in_dev(path), Err(Error::Invalid(_))), "{path:?}");
        }
    }

    #[test]
    fn a_scsi_disk_is_found_on_any_controller() {
        let tree = Tree::new();
        tree.disk("bus/scsi/devices/3:0:1:2/block/sda", "8:0", "sda");
        tree.disk("bus/scsi/devices/3:0:1:3/block/sdb", "8:16", "sdb");
        let Look::Found(node) = search("1:3", true).look(tree.places()).unwrap() else { panic!("a disk") };
        assert_eq!(node.minor, 16);
        // The same address on another controller.
        tree.disk("bus/scsi/devices/4:0:1:3/block/sdc", "8:32", "sdc");
        let error = search("1:3", true).look(tree.places()).unwrap_err();
        assert!(matches!(error, Error::State(_)), "{error}");
    }

    #[test]
    fn each_controller_is_scanned_once_and_only_by_its_owner() {
        let tree = Tree::new();
        let scan = |host: &str| format!("class/scsi_host/{host}/scan");
        tree.sysfs(&scan("host0"), "");
        let mut foreign = search("0:7", false);
        assert!(matches!(foreign.look(tree.places()), Ok(Look::Missing(_))));
        assert_eq!(tree.read(&scan("host0")), "");

        let mut own = search("0:7", true);
        assert!(matches!(own.look(tree.places()), Ok(Look::Missing(what)) if what.contains("*:*:0:7")));
        assert_eq!(tree.read(&scan("host0")), "- 0 7");
        tree.sysfs(&scan("host0"), "");
        tree.sysfs(&scan("host1"), "");
        assert!(own.look(tree.places()).is_ok());
        assert_eq!((tree.read(&scan("host0")), tree.read(&scan("host1"))), (String::new(), "- 0 7".into()));
    }

    #[test]
    fn what_is_no_scsi_address_is_refused() {
        assert_eq!("0:16383".parse::<ScsiAddress>().unwrap(), ScsiAddress { id: 0, lun: 16383 });
        for text in
            ["", ":", "1", "1:", ":1", "1:2:3", "-1:0", "+1:0", "a:0", "1:0 ", "4294967296:0", "- - -"]
        {
            assert!(matches!(text.parse::<ScsiAddress>(), Err(Error::Invalid(_))), "{text:?}");
        }
    }
}
