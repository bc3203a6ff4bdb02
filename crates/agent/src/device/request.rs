//! What a request asks of the guest's devices: checked before anything is waited for.

use std::collections::HashSet;

use bulkhead_protocol::agent::Device;

use super::{
    pci::PciPath,
    vfio::{self, Function},
};
use crate::error::{Error, Result};

/// The types by the name that a request uses, sorted.
const TYPES: [&str; 6] = ["blk", "mmioblk", "nvdimm", "scsi", "vfio-pci", "vfio-pci-gk"];

/// Types of s390x guests.
const OF_S390X: [&str; 3] = ["blk-ccw", "vfio-ap", "vfio-ap-cold"];

/// No machine has more for one container.
const MOST: usize = 512;

/// A device that a container is to have.
#[derive(Debug, PartialEq)]
pub(super) struct Wanted {
    /// Which entry of the spec's devices it is.
    pub(super) container_path: String,
    pub(super) kind: Kind,
}

#[derive(Debug, PartialEq)]
pub(super) enum Kind {
    /// The virtio disk at a PCI path.
    Pci(PciPath),
    /// The SCSI disk at an address.
    Scsi(String),
    /// The disk of that name.
    Named(String),
    /// Functions of a device that was passed through.
    Vfio {
        functions: Vec<Function>,
        /// A driver in user space gets it, not the guest's own.
        bind: bool,
    },
}

/// The names of the types, sorted.
pub(crate) fn types() -> Vec<String> {
    TYPES.map(str::to_owned).to_vec()
}

/// Checks what is asked for.
pub(super) fn plan(devices: &[Device]) -> Result<Vec<Wanted>> {
    if devices.len() > MOST {
        return Err(Error::Invalid(format!("{} devices; a container can have {MOST}", devices.len())));
    }
    let all = devices.iter().map(one).collect::<Result<Vec<_>>>()?;
    let mut paths = HashSet::new();
    for path in all.iter().map(|wanted| &wanted.container_path).filter(|path| !path.is_empty()) {
        if !paths.insert(path) {
            return Err(Error::Invalid(format!("two devices have the container path {path:?}")));
        }
    }
    Ok(all)
}

fn one(device: &Device) -> Result<Wanted> {
    let Device { type_, id, vm_path, container_path, options, .. } = device;
    let invalid = |what: &str| Err(Error::Invalid(format!("a device of type {type_:?} has no {what}")));
    if type_.is_empty() {
        return Err(Error::Invalid(format!("a device has no type: {id:?}, {vm_path:?}")));
    }
    if !TYPES.contains(&type_.as_str()) {
        let why = if OF_S390X.contains(&type_.as_str()) { ", which is one of s390x guests" } else { "" };
        let known = TYPES.join(", ");
        return Err(Error::Unsupported(format!("the device type {type_:?}{why} (it has {known})")));
    }
    if id.is_empty() && vm_path.is_empty() {
        return invalid("id and no path in the guest");
    }
    let kind = match type_.as_str() {
        "blk" => Kind::Pci(id.parse()?),
        "scsi" => Kind::Scsi(id.clone()),
        "mmioblk" | "nvdimm" if vm_path.is_empty() => return invalid("path in the guest"),
        "mmioblk" | "nvdimm" => Kind::Named(vm_path.clone()),
        _ => Kind::Vfio { functions: vfio::functions(options)?, bind: type_ == "vfio-pci" },
    };
    if let Kind::Vfio { bind: false, .. } = kind {
        // The guest's driver has it; the spec has no node for it.
        return Ok(Wanted { container_path: String::new(), kind });
    }
    if container_path.is_empty() {
        return invalid("path in the container");
    }
    if matches!(&kind, Kind::Vfio { functions, .. } if functions.is_empty()) {
        return invalid("function (option `DDDD:BB:SS.F=PATH`)");
    }
    Ok(Wanted { container_path: container_path.clone(), kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: &str, id: &str, vm_path: &str, container_path: &str) -> Device {
        Device {
            type_: kind.into(),
            id: id.into(),
            vm_path: vm_path.into(),
            container_path: container_path.into(),
            ..Default::default()
        }
    }

    fn passed(kind: &str, container_path: &str, options: &[&str]) -> Device {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Device { options, ..device(kind, "group", "", container_path) }
    }

    #[test]
    fn each_type_is_read_from_its_fields() {
        let wanted = plan(&[
            device("blk", "02/03", "/dev/vda", "/dev/a"),
            device("scsi", "0:1", "", "/dev/b"),
            device("mmioblk", "", "/dev/vdb", "/dev/c"),
            device("nvdimm", "", "/dev/pmem0", "/dev/d"),
            passed("vfio-pci", "/dev/vfio/1", &["0000:81:00.0=02/03"]),
            passed("vfio-pci-gk", "", &["0000:81:00.0=02/03", "0000:81:00.1="]),
            passed("vfio-pci-gk", "", &[]),
        ])
        .unwrap();
        assert_eq!(wanted[0].kind, Kind::Pci("02/03".parse().unwrap()));
        assert_eq!(wanted[2].kind, Kind::Named("/dev/vdb".into()));
        assert!(matches!(&wanted[4].kind, Kind::Vfio { functions, bind: true } if functions.len() == 1));
        assert!(matches!(&wanted[5].kind, Kind::Vfio { functions, bind: false } if functions.len() == 1));
        assert!(types().is_sorted());
    }

    #[test]
    fn what_is_incomplete_is_refused() {
        for bad in [
            device("", "02", "", "/dev/a"),
            device("blk", "", "", "/dev/a"),
            device("blk", "", "/dev/vda", "/dev/a"),
            device("blk", "x", "", "/dev/a"),
            device("blk", "02", "", ""),
            device("mmioblk", "02", "", "/dev/a"),
            device("nvdimm", "02", "", "/dev/a"),
            passed("vfio-pci", "", &["0000:81:00.0=02"]),
            passed("vfio-pci", "/dev/vfio/1", &[]),
            passed("vfio-pci", "/dev/vfio/1", &["0000:81:00.0="]),
            passed("vfio-pci-gk", "", &["nonsense"]),
        ] {
            let text = format!("{bad:?}");
            assert!(matches!(plan(&[bad]), Err(Error::Invalid(_))), "{text}");
        }
        let twice = [device("blk", "02", "", "/dev/a"), device("scsi", "0:1", "", "/dev/a")];
        assert!(plan(&twice).unwrap_err().to_string().contains("/dev/a"));
    }

    #[test]
    fn there_can_be_many_but_not_any_number() {
        let devices: Vec<_> = (0..=MOST).map(|n| device("blk", "02", "", &format!("/dev/disk{n}"))).collect();
        assert_eq!(plan(&devices[1..]).unwrap().len(), MOST);
        assert!(matches!(plan(&devices), Err(Error::Invalid(_))));
    }

    #[test]
    fn an_unknown_type_is_refused_by_name() {
        for kind in ["floppy", "blk-ccw", "vfio-ap", "vfio-ap-cold"] {
            let error = plan(&[device(kind, "x", "", "/dev/a")]).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Unsupported(_)), "{text}");
            assert!(text.contains(kind) && text.contains("vfio-pci-gk"), "{text}");
            assert_eq!(text.contains("s390x"), kind != "floppy", "{text}");
        }
    }
}
