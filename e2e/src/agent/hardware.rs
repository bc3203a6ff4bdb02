//! The machine a case asks for, and QEMU's command line for it: a pure function.
//!
//! Everything has a fixed slot on the root bus (`pcie.0`), so that the guest's paths are known beforehand. A conventional
//! bridge in slot [`BRIDGE`] holds the disks and interfaces that ask for it, and everything that is plugged later.

use std::path::{Path, PathBuf};

use bulkhead_image::initramfs::Extra;

/// The slot of the bridge.
pub(super) const BRIDGE: u8 = 0x02;
const VSOCK: u8 = 0x03;
const FS: u8 = 0x04;
const RNG: u8 = 0x05;
const SCSI: u8 = 0x06;
/// The first slot of the root bus for disks, interfaces and pmem.
const FIRST_ROOT: u8 = 0x08;
/// The first slot of the bridge. Slot 0 does not work on every machine type.
const FIRST_BRIDGED: u8 = 0x01;

/// What the VM is made of. The default is one CPU, 512 MiB and nothing else.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// CPUs from the start.
    pub cpus: u32,
    /// CPUs that there can be; 0: no more than from the start.
    pub max_cpus: u32,
    /// Memory in MiB from the start.
    pub memory: u64,
    /// Memory in MiB that there can be; 0: no more than from the start.
    pub max_memory: u64,
    /// virtio-blk disks.
    pub disks: Vec<Disk>,
    /// Disks on one virtio-scsi controller; their SCSI addresses are `0:0`, `1:0`, and so on.
    pub scsi_disks: Vec<Disk>,
    /// Persistent memory: a file each, of a multiple of 2 MiB.
    pub pmem: Vec<Pmem>,
    /// virtio-net interfaces.
    pub nics: Vec<Nic>,
    /// Words for the kernel's command line, such as `agent.log=debug`.
    pub kernel_parameters: Vec<String>,
    /// A further directory of the host, shared by virtio-fs under a tag of its own (beside the one of [`super::Agent::put`]).
    pub share: Option<(String, PathBuf)>,
    /// What the initramfs holds beside the agent and its modules: the guest's own programs, hooks and configuration.
    pub files: Vec<Extra>,
    /// Further arguments for QEMU.
    pub more: Vec<String>,
}

impl Default for Hardware {
    fn default() -> Self {
        Hardware {
            cpus: 1,
            max_cpus: 0,
            memory: 512,
            max_memory: 0,
            disks: Vec::new(),
            scsi_disks: Vec::new(),
            pmem: Vec::new(),
            nics: Vec::new(),
            kernel_parameters: Vec::new(),
            share: None,
            files: Vec::new(),
            more: Vec::new(),
        }
    }
}

/// A disk over a raw file.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The file.
    pub file: PathBuf,
    /// Its serial number, if it shall have one.
    pub serial: String,
    /// Behind the bridge.
    pub bridge: bool,
    /// The VMM refuses writes.
    pub read_only: bool,
}

impl Disk {
    /// A writable disk on the root bus.
    pub fn new(file: impl Into<PathBuf>) -> Disk {
        Disk { file: file.into(), serial: String::new(), bridge: false, read_only: false }
    }

    /// The same behind the bridge.
    #[must_use]
    pub fn bridged(self) -> Disk {
        Disk { bridge: true, ..self }
    }
}

/// Persistent memory over a file.
#[derive(Clone, Debug)]
pub enum Pmem {
    /// An NVDIMM, as Kata's hosts give the guest's image.
    Nvdimm(PathBuf),
    /// A virtio-pmem device.
    Virtio(PathBuf),
}

/// A network interface.
#[derive(Clone, Debug)]
pub struct Nic {
    /// `02:00:00:00:00:01`
    pub mac: String,
    /// Interfaces of the same hub are one network; without a hub it is QEMU's user network.
    pub hub: Option<u32>,
    /// Behind the bridge.
    pub bridge: bool,
}

impl Nic {
    /// An interface on the root bus, in QEMU's user network.
    pub fn new(mac: &str) -> Nic {
        Nic { mac: mac.to_owned(), hub: None, bridge: false }
    }

    /// QEMU's network back-end, without its id.
    pub(super) fn backend(&self) -> String {
        self.hub.map_or_else(|| "user".to_owned(), |hub| format!("hubport,hubid={hub}"))
    }
}

/// Where the guest finds what was there from the start, in the agent's grammar: `SS` on the root bus, `SS/SS` behind the
/// bridge, `T:L` on the SCSI bus. In the order of the [`Hardware`]'s fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Of the disks.
    pub disks: Vec<String>,
    /// Of the SCSI disks.
    pub scsi_disks: Vec<String>,
    /// Of the interfaces.
    pub nics: Vec<String>,
    /// The next free slot of the bridge.
    pub(super) next_bridged: u8,
}

/// Sockets and files of one VM.
pub(super) struct Files<'a> {
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    pub qmp: &'a Path,
    pub vsock: &'a Path,
    pub fs: &'a Path,
    /// The socket of [`Hardware::share`].
    pub share: &'a Path,
}

/// The guest's path of a slot of the bridge.
pub(super) fn behind_bridge(slot: u8) -> String {
    format!("{BRIDGE:02x}/{slot:02x}")
}

/// Hands out slots.
struct Slots {
    root: u8,
    bridged: u8,
}

impl Slots {
    /// The next slot: QEMU's words for it and the guest's.
    fn next(&mut self, bridge: bool) -> (String, String) {
        let slot = if bridge { &mut self.bridged } else { &mut self.root };
        let number = *slot;
        *slot += 1;
        match bridge {
            true => (format!("bus=bridge0,addr={number:#x}"), behind_bridge(number)),
            false => (format!("bus=pcie.0,addr={number:#x}"), format!("{number:02x}")),
        }
    }
}

impl Hardware {
    /// All arguments after the program's name, and where the guest finds the devices.
    pub(super) fn arguments(&self, files: &Files) -> (Vec<String>, Addresses) {
        let mut args = self.board(files);
        let mut slots = Slots { root: FIRST_ROOT, bridged: FIRST_BRIDGED };
        let mut addresses = Addresses::default();
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        for (index, disk) in self.disks.iter().enumerate() {
            let (at, guest) = slots.next(disk.bridge);
            option("-drive", drive(&format!("disk{index}"), disk));
            option("-device", format!("virtio-blk-pci,drive=disk{index}{},{at}", serial(disk)));
            addresses.disks.push(guest);
        }
        if !self.scsi_disks.is_empty() {
            option("-device", format!("virtio-scsi-pci,id=scsi0,bus=pcie.0,addr={SCSI:#x}"));
        }
        for (index, disk) in self.scsi_disks.iter().enumerate() {
            option("-drive", drive(&format!("scsi-disk{index}"), disk));
            let at = format!("bus=scsi0.0,scsi-id={index},lun=0");
            option("-device", format!("scsi-hd,drive=scsi-disk{index}{},{at}", serial(disk)));
            addresses.scsi_disks.push(format!("{index}:0"));
        }
        for (index, nic) in self.nics.iter().enumerate() {
            let (at, guest) = slots.next(nic.bridge);
            option("-netdev", format!("{},id=net{index}", nic.backend()));
            option("-device", format!("virtio-net-pci,netdev=net{index},mac={},{at}", nic.mac));
            addresses.nics.push(guest);
        }
        for (index, pmem) in self.pmem.iter().enumerate() {
            let (Pmem::Nvdimm(file) | Pmem::Virtio(file)) = pmem;
            let bytes = std::fs::metadata(file).map_or(0, |metadata| metadata.len());
            let backend = "memory-backend-file,share=on";
            option("-object", format!("{backend},id=pmem{index},mem-path={},size={bytes}", file.display()));
            option(
                "-device",
                match pmem {
                    Pmem::Nvdimm(_) => format!("nvdimm,memdev=pmem{index}"),
                    Pmem::Virtio(_) => format!("virtio-pmem-pci,memdev=pmem{index},{}", slots.next(false).0),
                },
            );
        }
        addresses.next_bridged = slots.bridged;
        args.extend(self.more.iter().cloned());
        (args, addresses)
    }

    /// What every machine has.
    fn board(&self, files: &Files) -> Vec<String> {
        let mut args: Vec<String> =
            ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"].map(str::to_owned).into();
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        let nvdimm =
            if self.pmem.iter().any(|pmem| matches!(pmem, Pmem::Nvdimm(_))) { ",nvdimm=on" } else { "" };
        let without = "smm=off,vmport=off,usb=off,sata=off,smbus=off";
        option("-machine", format!("q35,accel=tcg,memory-backend=mem,{without}{nvdimm}"));
        option("-object", format!("memory-backend-memfd,id=mem,size={}M,share=on", self.memory));
        option("-m", self.memory_option());
        option("-cpu", "max".to_owned());
        option("-smp", format!("{},maxcpus={}", self.cpus, self.max_cpus.max(self.cpus)));
        option("-chardev", "stdio,id=console,signal=off".to_owned());
        option("-serial", "chardev:console".to_owned());
        option("-kernel", files.kernel.display().to_string());
        option("-initrd", files.initramfs.display().to_string());
        option("-append", self.append());
        option("-qmp", format!("unix:{},server=on,wait=off", files.qmp.display()));
        // The guest's kernel reserves room for what is plugged later only where it is told to.
        let reserve = "io-reserve=4k,mem-reserve=1m,pref64-reserve=1m";
        option(
            "-device",
            format!("pci-bridge,id=bridge0,bus=pcie.0,addr={BRIDGE:#x},chassis_nr=1,shpc=off,{reserve}"),
        );
        option("-chardev", format!("socket,id=vsock,path={}", files.vsock.display()));
        option("-device", format!("vhost-user-vsock-pci,chardev=vsock,bus=pcie.0,addr={VSOCK:#x}"));
        option("-chardev", format!("socket,id=fs,path={}", files.fs.display()));
        option("-device", format!("vhost-user-fs-pci,chardev=fs,tag=kataShared,bus=pcie.0,addr={FS:#x}"));
        if let Some((tag, _)) = &self.share {
            option("-chardev", format!("socket,id=share,path={}", files.share.display()));
            option("-device", format!("vhost-user-fs-pci,chardev=share,tag={tag},bus=pcie.0,addr=0x7"));
        }
        option("-device", format!("virtio-rng-pci,bus=pcie.0,addr={RNG:#x}"));
        args
    }

    /// Room for modules is only asked for where it is used: it costs the guest page tables.
    fn memory_option(&self) -> String {
        let pmem = 4096 * u64::from(!self.pmem.is_empty());
        match self.max_memory.max(self.memory) + pmem {
            max if max > self.memory => format!("{}M,slots=8,maxmem={max}M", self.memory),
            memory => format!("{memory}M"),
        }
    }

    fn append(&self) -> String {
        let mut append = vec![
            "console=ttyS0 quiet panic=-1 reboot=k mitigations=off",
            "tsc=reliable no_timer_check noreplace-smp i8042.noaux i8042.nopnp 8250.nr_uarts=1",
            "rcupdate.rcu_expedited=1 random.trust_cpu=on cryptomgr.notests net.ifnames=0",
        ];
        append.extend(self.kernel_parameters.iter().map(String::as_str));
        append.join(" ")
    }
}

fn drive(id: &str, disk: &Disk) -> String {
    let read_only = if disk.read_only { "on" } else { "off" };
    format!("file={},if=none,id={id},format=raw,read-only={read_only}", disk.file.display())
}

fn serial(disk: &Disk) -> String {
    if disk.serial.is_empty() { String::new() } else { format!(",serial={}", disk.serial) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_the_addresses_that_the_guest_is_told() {
        let path = Path::new("/x");
        let files = Files { kernel: path, initramfs: path, qmp: path, vsock: path, fs: path, share: path };
        let hardware = Hardware {
            disks: vec![Disk::new("/a"), Disk::new("/b").bridged()],
            scsi_disks: vec![Disk::new("/c"), Disk::new("/d")],
            nics: vec![Nic::new("02:00:00:00:00:01")],
            ..Hardware::default()
        };
        let (args, addresses) = hardware.arguments(&files);
        assert_eq!(addresses.disks, ["08", "02/01"]);
        assert_eq!(addresses.scsi_disks, ["0:0", "1:0"]);
        assert_eq!((addresses.nics, addresses.next_bridged), (vec!["09".to_owned()], 2));
        for device in [
            "virtio-blk-pci,drive=disk0,bus=pcie.0,addr=0x8",
            "virtio-blk-pci,drive=disk1,bus=bridge0,addr=0x1",
        ] {
            assert!(args.iter().any(|arg| arg == device), "{device} in {args:?}");
        }
    }

    #[test]
    fn memory_has_room_only_when_asked_for() {
        let memory = |max_memory| Hardware { max_memory, ..Hardware::default() }.memory_option();
        assert_eq!(memory(0), "512M");
        assert_eq!(memory(2048), "512M,slots=8,maxmem=2048M");
    }
}
