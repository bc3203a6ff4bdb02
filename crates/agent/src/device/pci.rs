//! PCI addresses, and the paths by which a host names a device behind bridges.
//!
//! A host does not know the bus numbers that its guest gives out. It names each bridge on the way, and the device, by slot
//! and function: `02/1f.0` is slot 0x1f, function 0, behind the bridge in slot 2 of the root bus. A path of three elements
//! or more may begin with the number of a further root bus (0x20 and above, where no slot can be). The bus behind a bridge
//! is read from the guest's sysfs.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::sysfs::Look;
use crate::error::{Error, Result};

/// Where a function of a device is, `DDDD:BB:SS.F` in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Address {
    domain: u16,
    bus: u8,
    slot: Slot,
}

/// The way from a root bus to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PciPath {
    root: u8,
    /// The bridges and, last, the device.
    slots: Vec<Slot>,
}

/// A place on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Slot {
    slot: u8,
    function: u8,
}

/// The highest slot of a bus.
const LAST_SLOT: u8 = 0x1f;

/// The highest function in a slot.
const LAST_FUNCTION: u8 = 7;

/// A path longer than this is longer than PCI can number buses.
const LONGEST: usize = 256;

impl PciPath {
    /// A path of slots below the first root bus, each with function 0.
    pub(crate) fn of_slots(slots: &[u32]) -> Result<PciPath> {
        let invalid = || Error::Invalid(format!("{slots:?} is not a PCI path: slots are 0 to {LAST_SLOT}"));
        let slot = |number: &u32| {
            let slot = u8::try_from(*number).ok().filter(|slot| *slot <= LAST_SLOT);
            slot.map(|slot| Slot { slot, function: 0 }).ok_or_else(invalid)
        };
        let path = PciPath { root: 0, slots: slots.iter().map(slot).collect::<Result<_>>()? };
        if path.slots.is_empty() || path.slots.len() > LONGEST { Err(invalid()) } else { Ok(path) }
    }

    /// Finds the device's directory below `sys`, and its address.
    pub(crate) fn find(&self, sys: &Path) -> Result<Look<(PathBuf, Address)>> {
        let mut directory = root_bus(sys, self.root);
        let (mut bus, mut address) = (self.root, None);
        for slot in &self.slots {
            if address.is_some() {
                bus = match bus_behind(&directory)? {
                    Some(bus) => bus,
                    None => return Ok(Look::absent(&directory.join("pci_bus"))),
                };
            }
            let next = Address { domain: 0, bus, slot: *slot };
            directory.push(next.to_string());
            if !directory.is_dir() {
                return Ok(Look::absent(&directory));
            }
            address = Some(next);
        }
        Ok(match address {
            Some(address) => Look::Found((directory, address)),
            None => Look::absent(&directory),
        })
    }
}

/// The directory of a root bus: on arm64 the host bridge is a platform device.
fn root_bus(sys: &Path, root: u8) -> PathBuf {
    let (devices, name) = (sys.join("devices"), format!("pci0000:{root:02x}"));
    let usual = devices.join(&name);
    if usual.is_dir() {
        return usual;
    }
    let platform = fs::read_dir(devices.join("platform")).into_iter().flatten().flatten();
    let mut bridges = platform.map(|entry| entry.path()).filter(|path| {
        path.extension().is_some_and(|extension| extension == "pcie") && path.join(&name).is_dir()
    });
    bridges.next().map_or(usual, |bridge| bridge.join(&name))
}

/// The number of the bus behind a bridge, once the kernel has scanned it.
fn bus_behind(bridge: &Path) -> Result<Option<u8>> {
    let names = |directory: &Path| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
    };
    // `0000:01` in pci_bus; without that directory the devices themselves, `0000:01:00.0`.
    let listed = names(&bridge.join("pci_bus"));
    let mut buses: Vec<u8> = if listed.is_empty() {
        names(bridge).iter().filter_map(|name| name.parse().ok()).map(|a: Address| a.bus).collect()
    } else {
        listed.iter().filter_map(|name| u8::from_str_radix(name.rsplit(':').next()?, 16).ok()).collect()
    };
    buses.sort_unstable();
    buses.dedup();
    match buses[..] {
        [] => Ok(None),
        [bus] => Ok(Some(bus)),
        _ => Err(Error::State(format!("{} is a bridge to more than one bus", bridge.display()))),
    }
}

impl FromStr for PciPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<PciPath> {
        let invalid = || {
            Error::Invalid(format!(
                "{text:?} is not a PCI path: elements `SLOT[.FUNCTION]` in hexadecimal, joined by `/`"
            ))
        };
        let elements: Vec<&str> = text.split('/').take(LONGEST + 1).collect();
        let root = match elements[..] {
            [first, _, _, ..] => hex(first, 2, u8::MAX).filter(|bus| *bus > LAST_SLOT),
            _ => None,
        };
        let slots = elements.get(usize::from(root.is_some())..).unwrap_or_default();
        let slots = slots.iter().map(|slot| slot.parse().ok()).collect::<Option<Vec<Slot>>>();
        let slots = slots.filter(|slots| slots.len() <= LONGEST).ok_or_else(invalid)?;
        Ok(PciPath { root: root.unwrap_or(0), slots })
    }
}

impl fmt::Display for PciPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots: Vec<String> = self.slots.iter().map(Slot::to_string).collect();
        if self.root != 0 {
            write!(f, "{:02x}/", self.root)?;
        }
        f.write_str(&slots.join("/"))
    }
}

/// What is no address or slot.
#[derive(Debug)]
pub(crate) struct NotOne;

impl FromStr for Slot {
    type Err = NotOne;

    fn from_str(text: &str) -> std::result::Result<Slot, NotOne> {
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        Ok(Slot {
            slot: hex(slot, 2, LAST_SLOT).ok_or(NotOne)?,
            function: hex(function, 1, LAST_FUNCTION).ok_or(NotOne)?,
        })
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{:x}", self.slot, self.function)
    }
}

impl FromStr for Address {
    type Err = NotOne;

    fn from_str(text: &str) -> std::result::Result<Address, NotOne> {
        let mut parts = text.split(':');
        let (Some(domain), Some(bus), Some(slot), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(NotOne);
        };
        // A function is always there, unlike in a path.
        if text.len() != Address::LENGTH || domain.len() != 4 || !slot.contains('.') {
            return Err(NotOne);
        }
        let domain = [domain.get(..2), domain.get(2..)].map(|half| hex(half?, 2, u8::MAX));
        let [Some(high), Some(low)] = domain else { return Err(NotOne) };
        Ok(Address {
            domain: u16::from_be_bytes([high, low]),
            bus: hex(bus, 2, u8::MAX).ok_or(NotOne)?,
            slot: slot.parse()?,
        })
    }
}

impl Address {
    /// The length of its text.
    pub(crate) const LENGTH: usize = 12;
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{}", self.domain, self.bus, self.slot)
    }
}

/// A hexadecimal number of at most so many digits, and no sign.
fn hex(text: &str, digits: usize, last: u8) -> Option<u8> {
    let plain = (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = plain.then(|| u8::from_str_radix(text, 16).ok()).flatten()?;
    (number <= last).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> PciPath {
        text.parse().unwrap()
    }

    #[test]
    fn paths_are_read_and_written_as_the_hosts_do() {
        for (text, written) in [
            ("02", "02.0"),
            ("2", "02.0"),
            ("1f.7", "1f.7"),
            ("02/1F.0", "02.0/1f.0"),
            ("01/02/03.1", "01.0/02.0/03.1"),
            ("20/02/03", "20/02.0/03.0"),
            ("ff/00/00.0", "ff/00.0/00.0"),
        ] {
            assert_eq!(path(text).to_string(), written, "{text}");
        }
        assert_eq!(PciPath::of_slots(&[2, 31]).unwrap(), path("02/1f"));
    }

    #[test]
    fn what_is_no_path_is_refused() {
        let long = ["01"; LONGEST + 1].join("/");
        for text in [
            "",
            "/",
            "02/",
            "/02",
            "20",
            "20/01",
            "02.8",
            "02.",
            ".1",
            "g",
            "+2",
            "-1",
            "002",
            "02//03",
            "02/20/03",
            "100/01/02",
            "../02",
            "02\0",
            "ü",
            "02.00",
            &long,
        ] {
            let error = text.parse::<PciPath>().unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{text:?}");
        }
        for slots in [&[][..], &[32], &[0, u32::MAX], &[0; LONGEST + 1]] {
            assert!(matches!(PciPath::of_slots(slots), Err(Error::Invalid(_))), "{slots:?}");
        }
    }

    #[test]
    fn an_address_is_read_whole_or_not_at_all() {
        let address: Address = "0001:0A:1f.7".parse().unwrap();
        assert_eq!(address.to_string(), "0001:0a:1f.7");
        for text in [
            "",
            "0000:00:00",
            "00:00.0",
            "0000:00:20.0",
            "0000:00:00.8",
            "0000:000:0.0",
            "00000:0:00.0",
            "0000:00:00.0:",
            "+000:00:00.0",
            "0000:00:0.00",
            "ü00:00:00.0",
            "0000-00:00.0",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }

    /// A tree below a root, of directories.
    fn tree(directories: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for directory in directories {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        root
    }

    fn found(root: &tempfile::TempDir, text: &str) -> std::result::Result<String, String> {
        match path(text).find(root.path()).unwrap() {
            Look::Found((directory, address)) => {
                assert!(directory.is_dir());
                Ok(address.to_string())
            }
            Look::Missing(what) => Err(what),
        }
    }

    #[test]
    fn a_device_is_found_through_its_bridges() {
        let sys = tree(&[
            "devices/pci0000:00/0000:00:02.0/pci_bus/0000:05",
            "devices/pci0000:00/0000:00:02.0/0000:05:1f.0/pci_bus/0000:06",
            "devices/pci0000:00/0000:00:02.0/0000:05:1f.0/0000:06:03.1",
            // No pci_bus: the device tells its bus.
            "devices/pci0000:00/0000:00:04.0/0000:09:01.0",
            "devices/pci0000:00/0000:00:05.0/pci_bus",
            "devices/pci0000:40/0000:40:01.0/pci_bus/0000:41",
            "devices/pci0000:40/0000:40:01.0/0000:41:00.0",
        ]);
        assert_eq!(found(&sys, "02").unwrap(), "0000:00:02.0");
        assert_eq!(found(&sys, "02/1f").unwrap(), "0000:05:1f.0");
        assert_eq!(found(&sys, "02/1f/03.1").unwrap(), "0000:06:03.1");
        assert_eq!(found(&sys, "04/01").unwrap(), "0000:09:01.0");
        assert_eq!(found(&sys, "40/01/00").unwrap(), "0000:41:00.0");
        for (missing, told) in [
            ("03", "0000:00:03.0"),
            ("02/1e", "0000:05:1e.0"),
            ("02/1f/03", "0000:06:03.0"),
            ("05/01", "0000:00:05.0/pci_bus"),
            ("41/01/00", "pci0000:41"),
        ] {
            let what = found(&sys, missing).unwrap_err();
            assert!(what.contains(told), "{missing}: {what}");
        }
    }

    #[test]
    fn a_bridge_to_two_buses_is_not_guessed_at() {
        let bridge = "devices/pci0000:00/0000:00:02.0/pci_bus";
        let sys = tree(&[&format!("{bridge}/0000:01"), &format!("{bridge}/0000:02")]);
        assert!(matches!(path("02/01").find(sys.path()), Err(Error::State(_))));
    }

    #[test]
    fn on_arm64_the_root_bus_is_below_a_platform_device() {
        let sys = tree(&["devices/platform/4010000000.pcie/pci0000:00/0000:00:02.0", "devices/platform/x"]);
        assert_eq!(found(&sys, "02").unwrap(), "0000:00:02.0");
    }
}
