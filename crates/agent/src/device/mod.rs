//! Devices that the host plugs: found where they appear, and told to containers by their guest numbers.
//!
//! ```text
//! CreateContainer.devices ─► request (what is wanted) ─► block, vfio (found, waited for) ─► spec, env (rewritten)
//! ```
//! What is there already is found at once. Otherwise a wait begins to listen, looks again (so that nothing slips through
//! between the two), and then looks whenever the kernel tells of a device of that kind, until its time is up.

mod block;
mod env;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod net;
mod pci;
mod request;
mod spec;
mod sysfs;
#[cfg(test)]
pub(crate) mod test_tree;
mod uevent;
mod vfio;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bulkhead_protocol::{agent, oci};
use tokio::time::timeout;

pub(crate) use pci::PciPath;
pub(crate) use request::types;
pub(crate) use spec::allow_disk;
pub(crate) use sysfs::{Look, Node, Places};

use crate::{
    error::{During, Error, Result},
    sync::{blocking, lock},
};
use block::ScsiSearch;
use env::PciMap;
use request::{Kind, Wanted};
use spec::{Plugged, Replacement};
use uevent::Listener;

/// Finds devices, and waits for those that are still coming.
pub(crate) struct Devices {
    timeout: Duration,
    /// The machine is the agent's own: it may make controllers scan and give devices other drivers.
    own: bool,
    places: Arc<Places>,
    /// Which guest addresses a container's host addresses stand for.
    addresses: Mutex<HashMap<String, PciMap>>,
}

/// Looks for something, as often as it takes.
type Search<T> = Box<dyn FnMut(&Places) -> Result<Look<T>> + Send>;

/// Nobody waits longer, whatever was configured.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

impl Devices {
    /// Waits up to `timeout` (`agent.hotplug_timeout`) for each device. Only an agent's own machine is changed.
    pub(crate) fn new(timeout: Duration, own: bool) -> Devices {
        Devices { timeout, own, places: Arc::default(), addresses: Mutex::default() }
    }

    /// Where it looks.
    pub(crate) fn places(&self) -> Arc<Places> {
        Arc::clone(&self.places)
    }

    /// The virtio disk at a PCI path (`02/1f.0`: slots and functions from the root bus down).
    pub(crate) async fn block_by_pci(&self, path: &str) -> Result<Node> {
        self.block_at(path.parse()?).await
    }

    /// The virtio disk at a PCI path.
    pub(crate) async fn block_at(&self, path: PciPath) -> Result<Node> {
        let what = format!("the virtio disk at PCI path {path} did not appear");
        self.appears(&what, &["pci", "virtio", "block"], self.timeout, move |places| {
            block::by_pci(places, &path)
        })
        .await
    }

    /// The SCSI disk at `<id>:<lun>`.
    pub(crate) async fn block_by_scsi(&self, address: &str) -> Result<Node> {
        let what = format!("the SCSI disk at {address} did not appear");
        let mut search = ScsiSearch { address: address.parse()?, scan: self.own, scanned: BTreeSet::new() };
        self.appears(&what, &["scsi", "scsi_host", "block"], self.timeout, move |places| search.look(places))
            .await
    }

    /// A disk whose name is known (`/dev/vda`, of virtio-mmio), or a pmem device (`/dev/pmem0`).
    pub(crate) async fn block_by_node(&self, node: &str) -> Result<Node> {
        let name = block::name_in_dev(node)?.to_owned();
        let what = format!("the disk {node} did not appear");
        self.appears(&what, &["block"], self.timeout, move |places| block::by_name(places, &name)).await
    }

    /// The name of the network interface at a PCI path.
    pub(crate) async fn interface_by_pci(&self, path: &str) -> Result<String> {
        let path: PciPath = path.parse()?;
        let what = format!("the network interface at PCI path {path} did not appear");
        self.appears(&what, &["pci", "virtio", "net"], self.timeout, move |places| net::by_pci(places, &path))
            .await
    }

    /// Waits until `look` finds something. It is called once, and again after each event about one of the subsystems; when
    /// the time is up, `what` is the beginning of the error, and what `look` missed its end.
    pub(crate) async fn appears<T, F>(
        &self,
        what: &str,
        subsystems: &[&str],
        patience: Duration,
        look: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&Places) -> Result<Look<T>> + Send + 'static,
    {
        self.wait(what, subsystems, patience, Box::new(look)).await
    }

    async fn wait<T: Send + 'static>(
        &self,
        what: &str,
        subsystems: &[&str],
        patience: Duration,
        look: Search<T>,
    ) -> Result<T> {
        let start = Instant::now();
        let mut look = match self.look(look).await? {
            (_, Look::Found(found)) => return Ok(found),
            (look, Look::Missing(_)) => look,
        };
        let hear = || "listen for events of the kernel".to_owned();
        let listener = Listener::new().during(hear)?;
        loop {
            let left = patience.min(LONGEST).saturating_sub(start.elapsed());
            let missing = match self.look(look).await? {
                (_, Look::Found(found)) => return Ok(found),
                (again, Look::Missing(missing)) => {
                    look = again;
                    missing
                }
            };
            if left.is_zero() {
                return Err(Error::Timeout(format!("{what} within {} s: {missing}", patience.as_secs())));
            }
            // Out of time there is one more look, above.
            if let Ok(heard) = timeout(left, listener.next(subsystems)).await {
                heard.during(hear)?;
            }
        }
    }

    /// Lends `look` to a thread that may block.
    async fn look<T: Send + 'static>(&self, mut look: Search<T>) -> Result<(Search<T>, Look<T>)> {
        let places = Arc::clone(&self.places);
        blocking(move || {
            let seen = look(&places)?;
            Ok((look, seen))
        })
        .await
    }

    /// Finds the devices of a new container and writes their guest numbers and addresses into its spec.
    pub(crate) async fn plug(
        &self,
        container: &str,
        devices: &[agent::Device],
        spec: &mut oci::Spec,
    ) -> Result<()> {
        spec::refuse_cdi(spec)?;
        let wanted = request::plan(devices)?;
        let mut plugged = Plugged::default();
        for wanted in wanted {
            self.plug_one(wanted, &mut plugged).await?;
        }
        spec::rewrite(spec, &plugged)?;
        if let Some(process) = spec.Process.as_mut() {
            plugged.addresses.rewrite(&mut process.Env);
        }
        if !plugged.addresses.is_empty() {
            lock(&self.addresses).insert(container.to_owned(), plugged.addresses);
        }
        Ok(())
    }

    async fn plug_one(&self, wanted: Wanted, plugged: &mut Plugged) -> Result<()> {
        let node = match wanted.kind {
            Kind::Pci(path) => self.block_at(path).await?,
            Kind::Scsi(address) => self.block_by_scsi(&address).await?,
            Kind::Named(path) => self.block_by_node(&path).await?,
            Kind::Vfio { functions, bind } => {
                let group = self.vfio(&functions, bind, &mut plugged.addresses).await?;
                let places = Arc::clone(&self.places);
                plugged.extra = blocking(move || Ok(vfio::infiniband(&places))).await?;
                if let Some(node) = group {
                    let path = node.path.to_string_lossy().into_owned();
                    plugged.push(Replacement {
                        container_path: wanted.container_path,
                        kind: 'c',
                        path,
                        node,
                    });
                }
                return Ok(());
            }
        };
        let path = wanted.container_path.clone();
        plugged.push(Replacement { container_path: wanted.container_path, kind: 'b', path, node });
        Ok(())
    }

    /// Waits for the functions of a device that was passed through and notes their addresses; its group's node, when it
    /// goes to the container for a driver in user space.
    async fn vfio(
        &self,
        functions: &[vfio::Function],
        bind: bool,
        addresses: &mut PciMap,
    ) -> Result<Option<Node>> {
        if bind && !self.own {
            return Err(Error::State(
                "a device's driver is not the agent's to change: it is not the init of a guest".into(),
            ));
        }
        let mut groups = BTreeSet::new();
        for vfio::Function { host, guest } in functions {
            let (what, path) = (format!("the device at PCI path {guest} did not appear"), guest.clone());
            let find = move |places: &Places| path.find(&places.sys);
            let (directory, address) = self.appears(&what, &["pci"], self.timeout, find).await?;
            addresses.insert(*host, address);
            if bind {
                let places = Arc::clone(&self.places);
                groups.insert(blocking(move || vfio::bind(&places, &directory, address)).await?);
            }
        }
        let mut groups = groups.into_iter();
        match (groups.next(), groups.next()) {
            (None, _) => Ok(None),
            (Some(group), None) => {
                let what = format!("the IOMMU group {group} did not appear in /dev/vfio");
                let find = move |places: &Places| vfio::group(places, &group);
                Ok(Some(self.appears(&what, &["vfio", "pci"], self.timeout, find).await?))
            }
            (Some(one), Some(other)) => Err(Error::State(format!(
                "the functions of one device are in the IOMMU groups {one} and {other}"
            ))),
        }
    }

    /// Writes the guest addresses of a container's devices into the environment of a further process.
    pub(crate) fn rewrite(&self, container: &str, env: &mut [String]) {
        if let Some(addresses) = lock(&self.addresses).get(container) {
            addresses.rewrite(env);
        }
    }

    /// A container is gone, or was not made.
    pub(crate) fn forget(&self, container: &str) {
        lock(&self.addresses).remove(container);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::{test_tree::Tree, *};

    const SOON: Duration = Duration::ZERO;

    #[tokio::test]
    async fn what_is_there_is_found_at_once() {
        let tree = Tree::new();
        tree.disk("devices/pci0000:00/0000:00:02.0/virtio0/block/vda", "254:0", "vda");
        tree.disk("class/block/pmem0", "259:0", "pmem0");
        tree.disk("bus/scsi/devices/0:0:0:1/block/sda", "8:0", "sda");
        tree.directory("devices/pci0000:00/0000:00:03.0/virtio1/net/eth0");
        let devices = tree.devices(SOON);
        assert_eq!(devices.block_by_pci("02").await.unwrap().major, 254);
        assert_eq!(devices.block_by_node("/dev/pmem0").await.unwrap().major, 259);
        assert_eq!(devices.block_by_scsi("0:1").await.unwrap().major, 8);
        assert_eq!(devices.interface_by_pci("03").await.unwrap(), "eth0");
    }

    #[tokio::test]
    async fn a_timeout_names_the_device_what_was_missing_and_the_seconds() {
        let tree = Tree::new();
        tree.directory("devices/pci0000:00/0000:00:02.0");
        let devices = tree.devices(SOON);
        for (error, device, missing) in [
            (devices.block_by_pci("02/1f").await.unwrap_err(), "PCI path 02.0/1f.0", "0000:00:02.0/pci_bus"),
            (devices.block_by_node("/dev/vdx").await.unwrap_err(), "/dev/vdx", "class/block/vdx/dev"),
            (devices.block_by_scsi("4:5").await.unwrap_err(), "SCSI disk at 4:5", "*:*:4:5"),
            (devices.interface_by_pci("07").await.unwrap_err(), "PCI path 07.0", "0000:00:07.0"),
        ] {
            let text = error.to_string();
            assert!(matches!(error, Error::Timeout(_)), "{text}");
            assert!(text.contains(device) && text.contains(missing) && text.contains("within 0 s"), "{text}");
        }
    }

    /// The device is made up, and so nothing tells of it; any event of its kind is the occasion to look, and the kernel
    /// repeats one on request.
    #[tokio::test]
    async fn a_wait_ends_with_the_event() {
        let devices = Tree::new().devices(LONGEST);
        let (looks, plugged) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, seen) = (Arc::clone(&looks), Arc::clone(&plugged));
        let wait = tokio::spawn(async move {
            let look = move |_: &Places| {
                let there = seen.load(Ordering::SeqCst);
                counted.fetch_add(1, Ordering::SeqCst);
                Ok(if there { Look::Found(()) } else { Look::Missing(String::new()) })
            };
            devices.appears("it did not appear", &["block"], LONGEST, look).await
        });
        // The second look follows the beginning of the listening.
        while looks.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        plugged.store(true, Ordering::SeqCst);
        // An event of another kind is not looked after.
        fs::write("/sys/class/mem/null/uevent", "change").ok();
        if fs::write("/sys/class/block/loop0/uevent", "change").is_err() {
            eprintln!("skipped: no device here repeats its event");
            return;
        }
        timeout(Duration::from_secs(60), wait).await.expect("the event was missed").unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_container_gets_its_devices_and_an_exec_their_addresses() {
        let tree = Tree::new();
        tree.directory("devices/pci0000:00/0000:00:05.0");
        tree.directory("devices/pci0000:00/0000:00:06.0");
        tree.disk("devices/pci0000:00/0000:00:02.0/virtio0/block/vda", "254:0", "vda");
        let devices = tree.devices(SOON);
        let wanted = [
            agent::Device {
                type_: "vfio-pci-gk".into(),
                id: "group".into(),
                options: vec!["0000:81:00.0=05".into(), "0000:82:00.0=06".into()],
                ..Default::default()
            },
            // A device of another type does not make the map forget.
            agent::Device {
                type_: "blk".into(),
                id: "02".into(),
                container_path: "/dev/data".into(),
                ..Default::default()
            },
        ];
        let mut spec = oci::Spec::new();
        spec.Process.mut_or_insert_default().Env = vec!["PCIDEVICE_NIC=0000:82:00.0,0000:81:00.0".into()];
        spec.Linux.mut_or_insert_default().Devices.push(oci::LinuxDevice {
            Path: "/dev/data".into(),
            Type: "b".into(),
            Major: 8,
            ..Default::default()
        });
        devices.plug("c", &wanted, &mut spec).await.unwrap();
        assert_eq!(spec.Process.Env, ["PCIDEVICE_NIC=0000:00:06.0,0000:00:05.0"]);
        assert_eq!(spec.Linux.Devices[0].Major, 254);

        let mut env = vec!["PCIDEVICE_NIC=0000:81:00.0".to_owned()];
        devices.rewrite("other", &mut env);
        assert_eq!(env, ["PCIDEVICE_NIC=0000:81:00.0"]);
        devices.rewrite("c", &mut env);
        assert_eq!(env, ["PCIDEVICE_NIC=0000:00:05.0"]);
        devices.forget("c");
        assert!(lock(&devices.addresses).is_empty());
    }

    #[tokio::test]
    async fn a_passed_through_device_is_bound_on_a_machine_of_ones_own_only() {
        let tree = Tree::new();
        let directory = tree.directory("devices/pci0000:00/0000:00:05.0");
        let group = tree.directory("kernel/iommu_groups/7");
        std::os::unix::fs::symlink(group, directory.join("iommu_group")).unwrap();
        tree.sysfs("bus/pci/drivers_probe", "");
        tree.disk("class/vfio/7", "244:3", "vfio/7");
        tree.sysfs("class/vfio/7/uevent", "MAJOR=244\nDEVNAME=vfio/7\n");
        let wanted = agent::Device {
            type_: "vfio-pci".into(),
            id: "group".into(),
            container_path: "/dev/vfio/12".into(),
            options: vec!["0000:81:00.0=05".into()],
            ..Default::default()
        };
        let mut spec = oci::Spec::new();
        spec.Linux.mut_or_insert_default().Devices.push(oci::LinuxDevice {
            Path: "/dev/vfio/12".into(),
            Type: "c".into(),
            ..Default::default()
        });
        let mut foreign = tree.devices(SOON);
        foreign.own = false;
        let refused = foreign.plug("c", std::slice::from_ref(&wanted), &mut spec).await;
        assert!(matches!(refused, Err(Error::State(_))));
        assert_eq!(tree.read("bus/pci/drivers_probe"), "");

        tree.devices(SOON).plug("c", &[wanted], &mut spec).await.unwrap();
        assert_eq!(tree.read("bus/pci/drivers_probe"), "0000:00:05.0");
        let device = &spec.Linux.Devices[0];
        let path = tree.path().join("dev/vfio/7");
        assert_eq!((device.Path.as_str(), device.Major, device.Minor), (path.to_str().unwrap(), 244, 3));
    }
}
