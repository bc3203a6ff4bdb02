//! Devices: found where the host plugged them, given to containers by their guest numbers.

use std::{fs, path::PathBuf};

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Disk, Hardware, Pmem, context, failed, grant, in_vm, process},
    cases,
};
use bulkhead_protocol::{agent::*, oci, protobuf::MessageField, status::Kind};

pub(super) const CASES: &[Case] = cases![
    a_disk_behind_a_bridge_is_the_containers_and_no_other_is,
    a_container_waits_for_the_disk_that_is_plugged_meanwhile,
    a_device_that_does_not_come_is_named,
    a_scsi_disk_is_found_cold_and_hot,
    persistent_memory_is_found,
    addresses_of_the_host_become_the_guests_for_init_and_exec,
];

/// What a host calls the disk that it plugs.
const ON_THE_HOST: (i64, i64) = (8, 0);

/// A file of a megabyte that begins with a word.
fn disk(scratch: &Scratch, word: &str) -> anyhow::Result<PathBuf> {
    let mut bytes = vec![0; 1 << 20];
    bytes.splice(..word.len(), word.bytes());
    let file = scratch.path().join(format!("{word}.img"));
    fs::write(&file, bytes)?;
    Ok(file)
}

fn hardware(seconds: u32) -> Hardware {
    Hardware { kernel_parameters: vec![format!("agent.hotplug_timeout={seconds}")], ..Hardware::default() }
}

fn device(kind: &str, id: &str, vm_path: &str) -> Device {
    Device {
        type_: kind.into(),
        id: id.into(),
        vm_path: vm_path.into(),
        container_path: "/dev/data".into(),
        ..Default::default()
    }
}

/// Creates and starts a container that sleeps and has a device as `/dev/data`.
async fn run(agent: &Agent, id: &str, device: Device) -> ttrpc::Result<()> {
    let mut spec = agent.spec(&["sleep", "1000"]);
    grant(spec.Process.mut_or_insert_default(), &["CAP_MKNOD"]);
    spec.Linux.mut_or_insert_default().Devices.push(oci::LinuxDevice {
        Path: "/dev/data".into(),
        Type: "b".into(),
        Major: ON_THE_HOST.0,
        Minor: ON_THE_HOST.1,
        FileMode: 0o660,
        ..Default::default()
    });
    let request = CreateContainerRequest {
        container_id: id.into(),
        OCI: MessageField::some(spec),
        devices: vec![device],
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await?;
    agent.start_container(id).await
}

/// The word that a container's device begins with.
async fn word(agent: &Agent, id: &str) -> anyhow::Result<String> {
    agent.line(id, "word", "tr -d '\\0' < /dev/data").await
}

fn a_disk_behind_a_bridge_is_the_containers_and_no_other_is(scratch: &Scratch) -> anyhow::Result<()> {
    let disks = vec![Disk::new(disk(scratch, "other")?), Disk::new(disk(scratch, "bridged")?).bridged()];
    in_vm(scratch, Hardware { disks, ..hardware(3) }, async |agent| {
        agent.pod().await?;
        let path = &agent.addresses()?.disks[1];
        run(agent, "c1", device("blk", path, "")).await?;
        ensure!(word(agent, "c1").await? == "bridged");

        let number = agent.line("c1", "number", "stat -c '%t %T' /dev/data").await?;
        ensure!(number.trim() != format!("{:x} {:x}", ON_THE_HOST.0, ON_THE_HOST.1), "{number}");
        // Every other disk of the guest: it may have a node, but not be read.
        let line = "n=$(printf '%d %d' 0x$(stat -c %t /dev/data) 0x$(stat -c %T /dev/data)); \
            grep ' vd' /proc/partitions | while read a b rest; do \
            test \"$a $b\" = \"$n\" && continue; mknod /dev/other b $a $b && cat /dev/other; done";
        let (output, _) = agent.shell("c1", "other", line).await?;
        ensure!(output.contains("Operation not permitted"), "{output}");

        let details = GuestDetailsRequest::new();
        let details = agent.client.get_guest_details(context(), &details).await?.agent_details;
        let details = details.into_option().context("no details")?;
        let types = ["blk", "mmioblk", "nvdimm", "scsi", "vfio-pci", "vfio-pci-gk"];
        ensure!(details.device_handlers == types, "{details:?}");
        Ok(())
    })
}

fn a_container_waits_for_the_disk_that_is_plugged_meanwhile(scratch: &Scratch) -> anyhow::Result<()> {
    let file = disk(scratch, "plugged")?;
    in_vm(scratch, hardware(60), async |agent| {
        agent.pod().await?;
        let plugging = async {
            // The request before this one on the connection is being worked on.
            agent.check().await?;
            agent.plug_disk(&file)
        };
        // The first free slot of the bridge.
        let (ran, path) = tokio::join!(run(agent, "c1", device("blk", "02/01", "")), plugging);
        ensure!(path? == "02/01");
        ran?;
        ensure!(word(agent, "c1").await? == "plugged");
        Ok(())
    })
}

fn a_device_that_does_not_come_is_named(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, hardware(1), async |agent| {
        agent.pod().await?;
        let text = failed(run(agent, "c1", device("blk", "02/1e", "")).await, Kind::DeadlineExceeded)?;
        ensure!(text.contains("PCI path 02.0/1e.0") && text.contains(":1e.0"), "{text}");
        ensure!(text.contains("within 1 s"), "{text}");
        let text = failed(run(agent, "c1", device("scsi", "3:4", "")).await, Kind::DeadlineExceeded)?;
        ensure!(text.contains("3:4"), "{text}");
        let missing = device("mmioblk", "", "/dev/vdx");
        let text = failed(run(agent, "c1", missing).await, Kind::DeadlineExceeded)?;
        ensure!(text.contains("/dev/vdx"), "{text}");
        // Nothing is left: the id is free.
        agent.run("c1", &["true"]).await?;
        Ok(())
    })
}

fn a_scsi_disk_is_found_cold_and_hot(scratch: &Scratch) -> anyhow::Result<()> {
    let scsi_disks = vec![Disk::new(disk(scratch, "cold")?)];
    let hot = disk(scratch, "hot")?;
    in_vm(scratch, Hardware { scsi_disks, ..hardware(60) }, async |agent| {
        agent.pod().await?;
        run(agent, "c1", device("scsi", &agent.addresses()?.scsi_disks[0], "")).await?;
        ensure!(word(agent, "c1").await? == "cold");
        let plugging = async {
            agent.check().await?;
            agent.plug_scsi_disk(&hot, 5, 7)
        };
        let (ran, address) = tokio::join!(run(agent, "c2", device("scsi", "5:7", "")), plugging);
        ensure!(address? == "5:7");
        ran?;
        ensure!(word(agent, "c2").await? == "hot");
        Ok(())
    })
}

fn persistent_memory_is_found(scratch: &Scratch) -> anyhow::Result<()> {
    let file = disk(scratch, "persistent")?;
    fs::File::options().write(true).open(&file)?.set_len(16 << 20)?;
    in_vm(scratch, Hardware { pmem: vec![Pmem::Nvdimm(file)], ..hardware(30) }, async |agent| {
        agent.pod().await?;
        run(agent, "c1", device("nvdimm", "", "/dev/pmem0")).await?;
        let word = agent.line("c1", "word", "head -c 10 /dev/data").await?;
        ensure!(word == "persistent", "{word}");
        Ok(())
    })
}

fn addresses_of_the_host_become_the_guests_for_init_and_exec(scratch: &Scratch) -> anyhow::Result<()> {
    let disks = vec![Disk::new(disk(scratch, "one")?), Disk::new(disk(scratch, "two")?).bridged()];
    in_vm(scratch, Hardware { disks, ..hardware(3) }, async |agent| {
        agent.pod().await?;
        let addresses = &agent.addresses()?.disks;
        let (root, bridged) = (&addresses[0], &addresses[1]);
        // Any function serves: a guest-kernel device is only looked for.
        let passed = |options: Vec<String>| Device {
            type_: "vfio-pci-gk".into(),
            id: "group".into(),
            options,
            ..Default::default()
        };
        let environment = ["PCIDEVICE_A=0000:81:00.0,0000:82:00.0", "PCIDEVICE_B=0000:99:00.0"];
        let with = |mut process: oci::Process| {
            process.Env.extend(environment.map(str::to_owned));
            process
        };
        let echo = "echo $PCIDEVICE_A $PCIDEVICE_B";
        let init = ["sh", "-c", &format!("{echo}; exec sleep 1000")];
        let mut spec = agent.spec(&init);
        spec.Process = MessageField::some(with(process(&init)));
        let request = CreateContainerRequest {
            container_id: "c1".into(),
            OCI: MessageField::some(spec),
            // The map is of all devices, not of the last.
            devices: vec![
                passed(vec![format!("0000:81:00.0={root}")]),
                passed(vec![format!("0000:82:00.0={bridged}")]),
            ],
            ..Default::default()
        };
        agent.client.create_container(context(), &request).await?;
        agent.start_container("c1").await?;
        let init = String::from_utf8(agent.read("c1", "").await?)?;
        let (exec, _) = agent.output("c1", "e1", with(process(&["sh", "-c", echo]))).await?;
        let expected = format!("0000:00:{root}.0,0000:01:01.0 0000:99:00.0\n");
        ensure!(init == expected, "init: {init} instead of {expected}");
        ensure!(exec == expected, "exec: {exec} instead of {expected}");
        Ok(())
    })
}
