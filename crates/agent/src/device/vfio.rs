//! Devices that the host passes through: handed on to a driver in the container (VFIO once more), or kept by the guest's.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use super::{
    pci::{Address, PciPath},
    sysfs::{Look, Node, Places, node},
};
use crate::error::{During, Error, Result};

/// A function of a device: where the host had it, and where the guest has it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Function {
    pub(super) host: Address,
    pub(super) guest: PciPath,
}

const DRIVER: &str = "vfio-pci";

/// Reads `DDDD:BB:SS.F=<guest path>`. A function without a path is not in the guest.
pub(super) fn functions(options: &[String]) -> Result<Vec<Function>> {
    let mut functions = Vec::new();
    for option in options {
        let invalid = || {
            Error::Invalid(format!(
                "{option:?} is not an option of a VFIO device: `DDDD:BB:SS.F=PATH` is wanted"
            ))
        };
        let (host, guest) = option.split_once('=').ok_or_else(invalid)?;
        let host = host.parse().map_err(|_| invalid())?;
        if !guest.is_empty() {
            functions.push(Function { host, guest: guest.parse()? });
        }
    }
    Ok(functions)
}

/// Gives a function to the VFIO driver, whoever drove it before; its IOMMU group.
pub(super) fn bind(places: &Places, device: &Path, address: Address) -> Result<String> {
    let write = |file: &Path, text: &str| {
        fs::write(file, text).during(|| format!("bind {address} to {DRIVER}: write {}", file.display()))
    };
    let driver = fs::read_link(device.join("driver")).ok();
    let driven_by_it = || {
        let driver = fs::read_link(device.join("driver")).ok();
        driver.is_some_and(|driver| driver.file_name().is_some_and(|name| name == DRIVER))
    };
    if !driven_by_it() {
        write(&device.join("driver_override"), DRIVER)?;
        if driver.is_some() {
            write(&device.join("driver/unbind"), &address.to_string())?;
        }
        write(&places.sys.join("bus/pci/drivers_probe"), &address.to_string())?;
    }
    let group = fs::read_link(device.join("iommu_group")).ok();
    let group = group.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    group.map(str::to_owned).ok_or_else(|| {
        Error::State(format!("the device {address} is in no IOMMU group: the guest has no IOMMU that is on"))
    })
}

/// The node of an IOMMU group.
pub(super) fn group(places: &Places, group: &str) -> Result<Look<Node>> {
    node(places, &places.sys.join("class/vfio").join(group))
}

/// A node that comes along with a device.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Companion {
    pub(super) node: Node,
    pub(super) mode: u32,
}

/// The character devices of InfiniBand, which a container needs beside the network card that has it.
pub(super) fn infiniband(places: &Places) -> Vec<Companion> {
    let entries = fs::read_dir(places.dev.join("infiniband")).into_iter().flatten().flatten();
    let mut companions: Vec<Companion> = entries
        .filter_map(|entry| {
            let metadata = entry.metadata().ok().filter(|metadata| metadata.file_type().is_char_device())?;
            let number = metadata.rdev();
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            let node = Node { path: entry.path(), major, minor };
            Some(Companion { node, mode: metadata.mode() & 0o777 })
        })
        .collect();
    companions.sort_by(|a, b| a.node.path.cmp(&b.node.path));
    companions
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::{super::test_tree::Tree, *};

    const DEVICE: &str = "devices/pci0000:00/0000:00:05.0";

    fn bound(tree: &Tree) -> Result<String> {
        bind(tree.places(), &tree.directory(DEVICE), "0000:00:05.0".parse().unwrap())
    }

    #[test]
    fn a_function_changes_its_driver() {
        let tree = Tree::new();
        let device = tree.directory(DEVICE);
        let driver = tree.directory("bus/pci/drivers/e1000");
        tree.sysfs("bus/pci/drivers/e1000/unbind", "");
        tree.sysfs("bus/pci/drivers_probe", "");
        symlink(&driver, device.join("driver")).unwrap();
        symlink(tree.directory("kernel/iommu_groups/3"), device.join("iommu_group")).unwrap();
        assert_eq!(bound(&tree).unwrap(), "3");
        assert_eq!(tree.read(&format!("{DEVICE}/driver_override")), "vfio-pci");
        assert_eq!(tree.read("bus/pci/drivers/e1000/unbind"), "0000:00:05.0");
        assert_eq!(tree.read("bus/pci/drivers_probe"), "0000:00:05.0");

        // Again: the driver is the right one already.
        fs::remove_file(device.join("driver")).unwrap();
        symlink(tree.directory("bus/pci/drivers/vfio-pci"), device.join("driver")).unwrap();
        tree.sysfs("bus/pci/drivers_probe", "");
        assert_eq!(bound(&tree).unwrap(), "3");
        assert_eq!(tree.read("bus/pci/drivers_probe"), "");
    }

    #[test]
    fn without_an_iommu_there_is_no_group() {
        let tree = Tree::new();
        tree.sysfs("bus/pci/drivers_probe", "");
        let error = bound(&tree).unwrap_err();
        assert!(error.to_string().contains("IOMMU"), "{error}");
    }

    #[test]
    fn options_name_both_ends() {
        let read = |option: &str| functions(&[option.to_owned()]);
        assert_eq!(read("0000:81:00.1=02/03").unwrap()[0].host.to_string(), "0000:81:00.1");
        assert_eq!(read("0000:81:00.1=").unwrap(), []);
        for bad in ["", "=", "02", "0000:81:00.1", "81:00.1=02", "0000:81:00.1=x", "0000:81:00.1=02=03"] {
            assert!(matches!(read(bad), Err(Error::Invalid(_))), "{bad:?}");
        }
    }

    #[test]
    fn only_character_devices_come_along() {
        let tree = Tree::new();
        assert_eq!(infiniband(tree.places()), []);
        tree.node("infiniband/README");
        assert_eq!(infiniband(tree.places()), []);
        let node = tree.places().dev.join("infiniband/uverbs0");
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let number = rustix::fs::makedev(1, 3);
        if rustix::fs::mknodat(rustix::fs::CWD, &node, rustix::fs::FileType::CharacterDevice, mode, number)
            .is_err()
        {
            eprintln!("skipped: no node can be made here");
            return;
        }
        let companions = infiniband(tree.places());
        assert_eq!((companions.len(), companions[0].node.major, companions[0].node.minor), (1, 1, 3));
    }
}
