//! Network interfaces by PCI path.

use super::{
    pci::PciPath,
    sysfs::{Look, Places, only},
};
use crate::error::Result;

/// The interface of the device at a PCI path: virtio's, or that of a card that was passed through.
pub(super) fn by_pci(places: &Places, path: &PciPath) -> Result<Look<String>> {
    let (device, _) = match path.find(&places.sys)? {
        Look::Found(found) => found,
        Look::Missing(what) => return Ok(Look::Missing(what)),
    };
    let device = only(&device, |name| name.starts_with("virtio"))?.unwrap_or(device);
    let directory = device.join("net");
    let interface = only(&directory, |_| true)?;
    let name = interface.and_then(|interface| interface.file_name()?.to_str().map(str::to_owned));
    Ok(name.map_or_else(|| Look::absent(&directory), Look::Found))
}

#[cfg(test)]
mod tests {
    use super::{super::test_tree::Tree, *};

    #[test]
    fn an_interface_is_found_with_virtio_and_without() {
        let tree = Tree::new();
        let find = |path: &str| by_pci(tree.places(), &path.parse().unwrap()).unwrap();
        assert!(matches!(find("03"), Look::Missing(_)));
        tree.directory("devices/pci0000:00/0000:00:03.0/virtio1");
        assert!(matches!(find("03"), Look::Missing(what) if what.contains("virtio1/net")));
        tree.directory("devices/pci0000:00/0000:00:03.0/virtio1/net/eth1");
        assert!(matches!(find("03"), Look::Found(name) if name == "eth1"));
        tree.directory("devices/pci0000:00/0000:00:04.0/net/enp0s4");
        assert!(matches!(find("04"), Look::Found(name) if name == "enp0s4"));
    }
}
