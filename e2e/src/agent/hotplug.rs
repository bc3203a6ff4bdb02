//! Plugging devices into a running VM, and out again. What comes back is where the guest finds the device.

use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{
    Agent, Nic,
    hardware::{Addresses, behind_bridge},
};

impl Agent {
    /// Runs a command of QEMU's control protocol; `arguments` may be [`Value::Null`].
    ///
    /// # Errors
    /// QEMU's words, or that this agent has no VM.
    pub fn qmp(&self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.vm()?.qmp.lock().map_err(|_| anyhow::anyhow!("QMP is broken"))?.execute(command, arguments)
    }

    /// Plugs a writable virtio-blk disk behind the bridge; its PCI path.
    pub fn plug_disk(&self, file: &Path) -> anyhow::Result<String> {
        let (slot, path) = self.slot()?;
        self.add_file(&format!("plugged{slot}"), file)?;
        let drive = format!("plugged{slot}");
        self.add(json!({"driver": "virtio-blk-pci", "drive": drive, "bus": "bridge0"}), slot)?;
        Ok(path)
    }

    /// Plugs a disk into the SCSI controller (which is there if [`super::Hardware::scsi_disks`] has one); its address, `T:L`.
    pub fn plug_scsi_disk(&self, file: &Path, target: u8, lun: u8) -> anyhow::Result<String> {
        let id = format!("plugged-scsi{target}-{lun}");
        self.add_file(&id, file)?;
        let device = json!({
            "driver": "scsi-hd", "drive": id, "bus": "scsi0.0", "scsi-id": target, "lun": lun,
            "id": format!("scsi-{target}-{lun}"),
        });
        self.qmp("device_add", device)?;
        Ok(format!("{target}:{lun}"))
    }

    /// Plugs a virtio-net interface behind the bridge; its PCI path.
    pub fn plug_nic(&self, nic: &Nic) -> anyhow::Result<String> {
        let (slot, path) = self.slot()?;
        let id = format!("plugged-net{slot}");
        let backend = match nic.hub {
            Some(hub) => json!({"type": "hubport", "hubid": hub, "id": id}),
            None => json!({"type": "user", "id": id}),
        };
        self.qmp("netdev_add", backend)?;
        self.add(json!({"driver": "virtio-net-pci", "netdev": id, "mac": nic.mac, "bus": "bridge0"}), slot)?;
        Ok(path)
    }

    /// Takes out what is at a PCI path behind the bridge, and waits until the guest has let go of it.
    pub fn unplug(&self, path: &str) -> anyhow::Result<()> {
        let slot = path
            .rsplit('/')
            .next()
            .and_then(|slot| u8::from_str_radix(slot, 16).ok())
            .context("a PCI path")?;
        let id = device_id(slot);
        self.qmp("device_del", json!({"id": id}))?;
        let mut qmp = self.vm()?.qmp.lock().map_err(|_| anyhow::anyhow!("QMP is broken"))?;
        qmp.event("DEVICE_DELETED", |data| data["device"] == id.as_str()).map(drop)
    }

    /// Plugs a CPU.
    pub fn plug_cpu(&self) -> anyhow::Result<()> {
        let all = self.qmp("query-hotpluggable-cpus", Value::Null)?;
        let free = all.as_array().and_then(|cpus| cpus.iter().rfind(|cpu| cpu.get("qom-path").is_none()));
        let free = free.context("the machine has no room for another CPU")?;
        let mut device = free["props"].clone();
        device["driver"] = free["type"].clone();
        device["id"] = json!(format!(
            "cpu{}",
            device["core-id"].as_u64().unwrap_or(0) + 100 * device["socket-id"].as_u64().unwrap_or(0)
        ));
        self.qmp("device_add", device).map(drop)
    }

    /// Plugs a memory module; a multiple of 128 MiB, which is what the guest's kernel takes at once.
    pub fn plug_memory(&self, mib: u64) -> anyhow::Result<()> {
        ensure!(mib.is_multiple_of(128), "{mib} MiB are not a multiple of 128");
        let present = self.qmp("query-memory-devices", Value::Null)?;
        let id = format!("module{}", present.as_array().map_or(0, Vec::len));
        let backend = format!("{id}-backend");
        let object =
            json!({"qom-type": "memory-backend-memfd", "id": backend, "size": mib << 20, "share": true});
        self.qmp("object-add", object)?;
        self.qmp("device_add", json!({"driver": "pc-dimm", "id": id, "memdev": backend})).map(drop)
    }

    /// Where the guest finds what it had from the start.
    pub fn addresses(&self) -> anyhow::Result<&Addresses> {
        Ok(&self.vm()?.addresses)
    }

    fn add(&self, mut device: Value, slot: u8) -> anyhow::Result<()> {
        device["addr"] = json!(format!("{slot:#x}"));
        device["id"] = json!(device_id(slot));
        self.qmp("device_add", device).map(drop)
    }

    fn add_file(&self, id: &str, file: &Path) -> anyhow::Result<()> {
        let node = json!({
            "driver": "raw", "node-name": id,
            "file": {"driver": "file", "filename": file.display().to_string()},
        });
        self.qmp("blockdev-add", node).map(drop)
    }

    /// The next free slot of the bridge, and the guest's path of it.
    fn slot(&self) -> anyhow::Result<(u8, String)> {
        let slot = self.next_slot.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        ensure!(slot < 0x20, "the bridge is full");
        Ok((slot, behind_bridge(slot)))
    }
}

fn device_id(slot: u8) -> String {
    format!("plugged-device{slot}")
}
