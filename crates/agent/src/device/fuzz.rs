//! What is said of devices, as anybody might say it.

use bulkhead_protocol::agent::Device;

use super::{
    block::{ScsiAddress, name_in_dev},
    env::PciMap,
    pci::{Address, PciPath},
    request::plan,
    uevent::Uevent,
    vfio,
};
use crate::fuzz::{lines, words};

/// Lines of type, id, path in the guest, path in the container, options. Addresses are the same when written again.
pub(crate) fn request(text: &str) {
    let device = |line| {
        let [type_, id, vm_path, container_path, options] = words(line).map(str::to_owned);
        let options = options.split('\t').map(str::to_owned).collect();
        Device { type_, id, vm_path, container_path, options, ..Default::default() }
    };
    let devices: Vec<Device> = lines(text).map(device).collect();
    let _ = plan(&devices);
    for Device { id, vm_path, options, .. } in &devices {
        if let Ok(path) = id.parse::<PciPath>() {
            assert_eq!(path.to_string().parse::<PciPath>().ok(), Some(path));
        }
        if let Ok(address) = id.parse::<Address>() {
            assert_eq!(address.to_string().parse::<Address>().ok(), Some(address));
        }
        let _ = (id.parse::<ScsiAddress>(), vfio::functions(options));
        if let Ok(name) = name_in_dev(vm_path) {
            assert!(!name.contains('/') && name != "..");
        }
    }
}

/// Names and the count of variables stay; what is not `PCIDEVICE_*` stays altogether.
pub(crate) fn env(text: &str) {
    let (addresses, env) = text.split_once('\n').unwrap_or((text, ""));
    let mut map = PciMap::default();
    for (host, guest) in addresses.split(',').filter_map(|pair| pair.split_once('=')) {
        if let (Ok(host), Ok(guest)) = (host.parse(), guest.parse()) {
            map.insert(host, guest);
        }
    }
    let before: Vec<String> = env.split('\n').map(str::to_owned).collect();
    let mut after = before.clone();
    map.rewrite(&mut after);
    for (before, after) in before.iter().zip(&after) {
        let name = |entry: &str| entry.split('=').next().map(str::to_owned);
        assert_eq!(name(before), name(after));
        assert!(before == after || before.starts_with("PCIDEVICE_"));
    }
}

/// A message of the kernel.
pub(crate) fn uevent(data: &[u8]) {
    if let Some(event) = Uevent::parse(data) {
        assert!(event.path.starts_with('/') && !event.action.is_empty());
    }
}
