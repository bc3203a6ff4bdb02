//! Storages on disks, their layers, who counts them, and the kernel modules they take.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch, Skip,
    agent::{Agent, Disk, Hardware, Pmem, context, failed, grant, in_vm, mount, process},
    cases,
};
use bulkhead_protocol::{
    agent::{CreateContainerRequest, KernelModule, Storage},
    protobuf::MessageField,
    status::Kind,
};

pub(super) const CASES: &[Case] = cases![
    disks_are_mounted_cold_and_hot,
    a_disk_is_bound_into_a_container_as_it_is,
    persistent_memory_is_mounted_with_dax,
    a_storage_of_two_containers_goes_with_the_last,
    layers_of_erofs_are_one_root,
    a_tree_of_nydus_is_one_level_up,
    storages_that_fail_leave_nothing,
    kernel_modules_are_loaded_with_parameters,
];

const VOLUMES: &str = "/run/kata-containers/sandbox/storage";

/// A file with an ext4 in which there is a file `name` that holds its name.
fn ext4(scratch: &Scratch, name: &str) -> anyhow::Result<PathBuf> {
    let file = scratch.path().join(format!("{name}.ext4"));
    std::fs::File::create(&file)?.set_len(16 << 20)?;
    make(Command::new("mkfs.ext4").args(["-q", "-b", "4096", "-d"]).arg(tree(scratch, name)?).arg(&file))?;
    Ok(file)
}

/// The same with an EROFS.
fn erofs(scratch: &Scratch, name: &str) -> anyhow::Result<PathBuf> {
    let file = scratch.path().join(format!("{name}.erofs"));
    make(Command::new("mkfs.erofs").arg("--quiet").arg(&file).arg(tree(scratch, name)?))?;
    Ok(file)
}

fn tree(scratch: &Scratch, name: &str) -> anyhow::Result<PathBuf> {
    let tree = scratch.path().join(format!("{name}.tree"));
    std::fs::create_dir_all(&tree)?;
    std::fs::write(tree.join(name), name)?;
    Ok(tree)
}

fn make(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| Skip(format!("needs {program}: {error}")))?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn storage(driver: &str, source: &str, fstype: &str, mount_point: &str, options: &[&str]) -> Storage {
    Storage {
        driver: driver.into(),
        source: source.into(),
        fstype: fstype.into(),
        mount_point: mount_point.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    }
}

/// Creates and starts a container with storages; those below [`VOLUMES`] are in it at `/mnt/<name>`.
async fn run(agent: &Agent, id: &str, storages: Vec<Storage>) -> ttrpc::Result<()> {
    let mut spec = agent.spec(&["sleep", "1000"]);
    for storage in &storages {
        if let Some(name) = storage.mount_point.strip_prefix(VOLUMES) {
            spec.Mounts.push(mount(&format!("/mnt{name}"), "bind", &storage.mount_point, &["rbind"]));
        }
    }
    run_spec(agent, id, storages, spec).await
}

async fn run_spec(
    agent: &Agent,
    id: &str,
    storages: Vec<Storage>,
    spec: bulkhead_protocol::oci::Spec,
) -> ttrpc::Result<()> {
    let request = CreateContainerRequest {
        container_id: id.into(),
        storages,
        OCI: MessageField::some(spec),
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await?;
    agent.start_container(id).await
}

/// Starts the container `watch`, which sees the guest's own processes.
async fn watch(agent: &Agent) -> ttrpc::Result<()> {
    let mut spec = agent.spec(&["sleep", "1000"]);
    spec.Mounts.push(mount("/mnt/proc", "bind", "/proc", &["rbind"]));
    agent.run_spec("watch", spec).await
}

/// The guest's own mount points below a directory, as `watch` sees them.
async fn mounts(agent: &Agent, exec: &str, below: &str) -> anyhow::Result<Vec<String>> {
    let mut look = process(&["cat", "/mnt/proc/1/mountinfo"]);
    grant(&mut look, &["CAP_SYS_PTRACE"]);
    let (table, code) = agent.output("watch", exec, look).await?;
    ensure!(code == 0 && table.contains(" /run "), "the guest's mounts: {table}");
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.filter(|point| point.starts_with(below)).map(str::to_owned).collect())
}

fn disks_are_mounted_cold_and_hot(scratch: &Scratch) -> anyhow::Result<()> {
    let file = |name| ext4(scratch, name);
    let hardware = Hardware {
        disks: vec![Disk::new(file("root")?), Disk::new(file("bridged")?).bridged()],
        scsi_disks: vec![Disk::new(file("scsi")?)],
        ..Hardware::default()
    };
    let (hot, hot_scsi) = (file("hot")?, file("hotscsi")?);
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        watch(agent).await?;
        let volume = |driver, source: &str, name: &str, options: &[&str]| {
            storage(driver, source, "ext4", &format!("{VOLUMES}/{name}"), options)
        };
        let at = agent.addresses()?;
        let cold = [
            volume("blk", &at.disks[0], "root", &["rw", "noatime"]),
            volume("blk", &at.disks[1], "bridged", &["ro"]),
            volume("scsi", &at.scsi_disks[0], "scsi", &[]),
        ];
        run(agent, "cold", cold.to_vec()).await?;
        let read = "cat /mnt/root/root /mnt/bridged/bridged /mnt/scsi/scsi";
        ensure!(agent.line("cold", "read", read).await? == "rootbridgedscsi");
        agent.line("cold", "write", "echo kept > /mnt/root/new && echo x > /mnt/scsi/new").await?;
        let (output, code) = agent.shell("cold", "refused", "echo x > /mnt/bridged/new").await?;
        ensure!(code != 0 && output.contains("Read-only"), "{output}");
        let options = agent.line("cold", "options", "grep /mnt/root /proc/self/mountinfo").await?;
        ensure!(options.contains("noatime"), "{options}");
        ensure!(mounts(agent, "m1", VOLUMES).await?.len() == 3);
        agent.remove("cold").await?;
        let left = mounts(agent, "m2", VOLUMES).await?;
        ensure!(left.is_empty(), "{left:?}");

        let hot = [
            volume("blk", &agent.plug_disk(&hot)?, "hot", &[]),
            volume("scsi", &agent.plug_scsi_disk(&hot_scsi, 3, 1)?, "hotscsi", &["ro"]),
            volume("blk", &at.disks[0], "root", &["ro"]),
        ];
        run(agent, "hot", hot.to_vec()).await?;
        let read = "cat /mnt/hot/hot /mnt/hotscsi/hotscsi /mnt/root/new";
        ensure!(agent.line("hot", "read", read).await? == "hothotscsikept\n");
        Ok(())
    })
}

fn a_disk_is_bound_into_a_container_as_it_is(scratch: &Scratch) -> anyhow::Result<()> {
    let file = ext4(scratch, "raw")?;
    let hardware = Hardware { disks: vec![Disk::new(&file)], ..Hardware::default() };
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        watch(agent).await?;
        let at = &agent.addresses()?.disks[0];
        // The type and the options of the container's own mount, as hosts send them.
        for (round, (options, can_write)) in
            [(&["bind"][..], true), (&["rbind", "rprivate", "rw"], true), (&["rbind", "ro"], false)]
                .into_iter()
                .enumerate()
        {
            let point = format!("{VOLUMES}/raw");
            let disk = storage("blk", at, "bind", &point, options);
            let mut spec = agent.spec(&["sleep", "1000"]);
            spec.Mounts.push(mount("/dev/xda", "bind", &point, &["rbind"]));
            run_spec(agent, "c1", vec![disk], spec).await?;
            let look = "[ -b /dev/xda ] && dd if=/dev/xda bs=2 skip=540 count=1 | od -An -tx1 && grep /dev/xda /proc/self/mountinfo";
            let seen = agent.line("c1", "look", look).await?;
            ensure!(seen.contains("53 ef"), "{options:?}: {seen}");
            ensure!(seen.contains("/dev/xda rw,") == can_write, "{options:?}: {seen}");
            let write = "dd if=/dev/zero of=/dev/xda bs=512 count=1 conv=notrunc";
            let (output, code) = agent.shell("c1", "write", write).await?;
            ensure!((code == 0) == can_write, "{options:?}: {output}");
            agent.remove("c1").await?;
            let left = mounts(agent, &format!("m{round}"), VOLUMES).await?;
            ensure!(left.is_empty(), "{left:?}");
        }
        // As a volume it is still what it was.
        run(agent, "c1", vec![storage("blk", at, "ext4", &format!("{VOLUMES}/raw"), &[])]).await?;
        ensure!(agent.line("c1", "read", "cat /mnt/raw/raw").await? == "raw");
        Ok(())
    })
}

fn persistent_memory_is_mounted_with_dax(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = Hardware {
        pmem: vec![Pmem::Nvdimm(ext4(scratch, "nvdimm")?), Pmem::Virtio(ext4(scratch, "virtio")?)],
        max_memory: 1024,
        ..Hardware::default()
    };
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        // The NVDIMM is the first: its driver is loaded first.
        let volume = |node: u32, options: &[&str]| {
            let (source, point) = (format!("/dev/pmem{node}"), format!("{VOLUMES}/pmem{node}"));
            storage("nvdimm", &source, "ext4", &point, options)
        };
        run(agent, "c1", vec![volume(0, &["ro"]), volume(1, &["dax"])]).await?;
        let read = "cat /mnt/pmem0/nvdimm /mnt/pmem1/virtio";
        ensure!(agent.line("c1", "read", read).await? == "nvdimmvirtio");
        let options = agent.line("c1", "options", "grep /mnt/pmem1 /proc/self/mountinfo").await?;
        ensure!(options.contains("dax"), "{options}");
        agent.line("c1", "write", "echo x > /mnt/pmem1/new && sync").await?;
        agent.remove("c1").await?;

        // An NVDIMM whose content does not say where its pages are described has no direct access.
        let text = failed(run(agent, "c2", vec![volume(0, &["ro", "dax"])]).await, Kind::FailedPrecondition)?;
        ensure!(text.contains("/dev/pmem0") && text.contains("direct access"), "{text}");
        Ok(())
    })
}

fn a_storage_of_two_containers_goes_with_the_last(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = Hardware { disks: vec![Disk::new(ext4(scratch, "volume")?)], ..Hardware::default() };
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        watch(agent).await?;
        let point = format!("{VOLUMES}/volume");
        let at = &agent.addresses()?.disks[0];
        let disk = |options: &[&str]| storage("blk", at, "ext4", &point, options);
        run(agent, "c1", vec![disk(&["rw"])]).await?;
        run(agent, "c2", vec![disk(&["rw"])]).await?;
        let lower = format!("lowerdir={point}");
        let overlay = storage(
            "overlayfs",
            "overlay",
            "overlay",
            &format!("{VOLUMES}/overlay"),
            &[&lower, "io.katacontainers.fs-opt.overlay-rw"],
        );
        run(agent, "c3", vec![disk(&["rw"]), overlay]).await?;
        agent.line("c3", "write", "cat /mnt/overlay/volume && echo x > /mnt/overlay/new").await?;
        ensure!(mounts(agent, "m1", &point).await?.len() == 1, "mounted once");

        let text = failed(
            run(agent, "c4", vec![Storage { fstype: "xfs".into(), ..disk(&["rw"]) }]).await,
            Kind::FailedPrecondition,
        )?;
        ensure!(text.contains(&point), "{text}");
        // Options are those of the first, as long as there is a user.
        run(agent, "c4", vec![disk(&["ro"])]).await?;
        agent.line("c4", "write", "echo x > /mnt/volume/more").await?;
        agent.remove("c4").await?;

        agent.remove("c1").await?;
        agent.remove("c3").await?;
        ensure!(
            agent.line("c2", "read", "cat /mnt/volume/volume; ls /mnt/volume").await?.starts_with("volume")
        );
        ensure!(
            mounts(agent, "m2", VOLUMES).await? == [point.clone()],
            "the overlay is gone, the disk is not"
        );
        agent.remove("c2").await?;
        let left = mounts(agent, "m3", VOLUMES).await?;
        ensure!(left.is_empty(), "{left:?}");
        // Read-only now: it was really let go of.
        run(agent, "c4", vec![disk(&["ro"])]).await?;
        let (output, code) = agent.shell("c4", "refused", "echo x > /mnt/volume/new").await?;
        ensure!(code != 0 && output.contains("Read-only"), "{output}");
        Ok(())
    })
}

fn layers_of_erofs_are_one_root(scratch: &Scratch) -> anyhow::Result<()> {
    let busybox = scratch.path().join("base.tree");
    bulkhead_e2e::busybox_rootfs(&busybox)?;
    let (base, top, upper) = (erofs(scratch, "base")?, erofs(scratch, "top")?, ext4(scratch, "disk")?);
    let gpt = scratch.path().join("gpt");
    partitioned(&gpt, &[&top, &base])?;
    let hardware =
        Hardware { disks: [&upper, &top, &base, &gpt].map(Disk::new).to_vec(), ..Hardware::default() };
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        watch(agent).await?;
        let at = agent.addresses()?.disks.clone();
        let root = |id: &str| format!("/run/kata-containers/layered/{id}/rootfs");
        let layer = |disk: usize, fstype, root: &str, options: &[&str]| {
            let options = [options, &["X-kata.multi-layer=true"]].concat();
            storage("blk", &at[disk], fstype, root, &options)
        };
        let lower = |disk, root: &str| layer(disk, "erofs", root, &["ro", "X-kata.overlay-lower"]);
        let upper = |root: &str| {
            let mkdir = "X-kata.mkdir.path={{ mount 0 }}/upper/made:0700";
            layer(0, "ext4", root, &["rw", "X-kata.overlay-upper", mkdir])
        };
        let part = |number, root: &str| {
            let number = format!("X-kata.partition-number={number}");
            layer(3, "erofs", root, &["ro", "X-kata.overlay-lower", "X-kata.gpt-partitioned=true", &number])
        };
        let spec = |root: &str| bulkhead_e2e::agent::spec(root, &["sleep", "1000"]);

        let one = root("c1");
        run_spec(agent, "c1", vec![upper(&one), lower(1, &one), lower(2, &one)], spec(&one)).await?;
        ensure!(
            agent.line("c1", "read", "cat /top /base; echo kept > /new; ls -d /made").await?
                == "topbase/made\n"
        );
        agent.remove("c1").await?;
        let left = mounts(agent, "m1", "/run/kata-containers/c1").await?;
        ensure!(left.is_empty(), "{left:?}");

        let two = root("c2");
        run_spec(agent, "c2", vec![upper(&two), part(2, &two), part(1, &two)], spec(&two)).await?;
        ensure!(agent.line("c2", "read", "cat /top /base /new").await? == "topbasekept\n");
        let three = root("c3");
        run_spec(agent, "c3", vec![part(1, &three), part(2, &three)], spec(&three)).await?;
        agent.line("c3", "write", "cat /top && echo x > /own").await?;

        let verified = Storage {
            options: [lower(1, "/").options, vec!["X-kata.dmverity-enabled=true".into()]].concat(),
            ..lower(1, &root("c4"))
        };
        let text = failed(run(agent, "c4", vec![verified]).await, Kind::Unimplemented)?;
        ensure!(text.contains("dmverity"), "{text}");
        Ok(())
    })
}

/// A disk with a partition for each file, in their order.
fn partitioned(disk: &Path, files: &[&PathBuf]) -> anyhow::Result<()> {
    const SECTOR: usize = 512;
    const ENTRIES: usize = 128 * 128;
    let mut content = vec![0; 2048 * SECTOR];
    let mut entries = vec![0; ENTRIES];
    for (index, file) in files.iter().enumerate() {
        let mut data = std::fs::read(file)?;
        data.resize(data.len().next_multiple_of(2048 * SECTOR), 0);
        let (first, last) = (content.len() / SECTOR, (content.len() + data.len()) / SECTOR - 1);
        let entry = &mut entries[index * 128..][..128];
        // "Linux filesystem data", and an identity.
        entry[..16].copy_from_slice(&[
            0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
        ]);
        entry[16] = u8::try_from(index + 1)?;
        entry[32..40].copy_from_slice(&(first as u64).to_le_bytes());
        entry[40..48].copy_from_slice(&(last as u64).to_le_bytes());
        content.extend(data);
    }
    let sectors = content.len() / SECTOR + 33;
    let header = |own: usize, other: usize, table: usize| {
        let mut header = vec![0; SECTOR];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
        for (at, value) in [(24, own), (32, other), (40, 34), (48, sectors - 34), (72, table)] {
            header[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
        }
        header[56] = 1;
        header[80] = 128;
        header[84] = 128;
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let sum = crc32(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    };
    // The protective record: one partition of type 0xee.
    content[446 + 4] = 0xee;
    content[446 + 8] = 1;
    content[446 + 12..446 + 16].copy_from_slice(&u32::try_from(sectors - 1)?.to_le_bytes());
    content[510..512].copy_from_slice(&[0x55, 0xaa]);
    content[SECTOR..2 * SECTOR].copy_from_slice(&header(1, sectors - 1, 2));
    content[2 * SECTOR..2 * SECTOR + ENTRIES].copy_from_slice(&entries);
    content.extend(&entries);
    content.extend(header(sectors - 1, 1, sectors - 33));
    Ok(std::fs::write(disk, content)?)
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

fn a_tree_of_nydus_is_one_level_up(scratch: &Scratch) -> anyhow::Result<()> {
    let tree = scratch.path().join("nydus");
    bulkhead_e2e::busybox_rootfs(&tree.join("rafs/c1/lowerdir"))?;
    let hardware = Hardware { share: Some(("nydus".into(), tree)), ..Hardware::default() };
    in_vm(scratch, hardware, async |agent| {
        let mut pod = agent.pod_request();
        let shared = "/run/kata-containers/shared";
        pod.storages[0] = storage("virtio-fs", "nydus", "virtiofs", &format!("{shared}/"), &["nodev"]);
        agent.client.create_sandbox(context(), &pod).await?;
        let root = "/run/kata-containers/c1/rootfs";
        // Hosts name a directory of the tree as the upper one, too; that takes a file server with extended attributes.
        let lower = format!("lowerdir={shared}/rafs/c1/lowerdir");
        let options = [&lower, "index=off", "io.katacontainers.fs-opt.overlay-rw"];
        let overlay = storage("overlayfs", "overlay", "overlay", root, &options);
        let spec = bulkhead_e2e::agent::spec(root, &["sleep", "1000"]);
        run_spec(agent, "c1", vec![overlay], spec).await?;
        agent.line("c1", "write", "echo x > /new && cat /new").await?;
        Ok(())
    })
}

fn storages_that_fail_leave_nothing(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = Hardware {
        disks: vec![Disk::new(ext4(scratch, "good")?)],
        kernel_parameters: vec!["agent.hotplug_timeout=1".into()],
        ..Hardware::default()
    };
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        watch(agent).await?;
        let volume = |driver, source: &str, fstype, options: &[&str]| {
            storage(driver, source, fstype, &format!("{VOLUMES}/bad"), options)
        };
        let at = &agent.addresses()?.disks[0];
        let good = storage("blk", at, "ext4", &format!("{VOLUMES}/good"), &[]);
        let formatted =
            |option: &str| Storage { driver_options: vec![option.into()], ..volume("blk", at, "ext4", &[]) };
        let elsewhere = Storage { mount_point: "/proc/x".into(), ..volume("blk", at, "ext4", &[]) };
        let above = Storage { mount_point: format!("{VOLUMES}/../x"), ..volume("blk", at, "ext4", &[]) };
        let cases = [
            (volume("floppy", "", "", &[]), Kind::Unimplemented, "floppy"),
            (volume("image_guest_pull", "x", "", &[]), Kind::Unimplemented, "image_guest_pull"),
            (volume("blk", "1d", "ext4", &[]), Kind::DeadlineExceeded, "1d"),
            (volume("blk", at, "squashfs", &[]), Kind::Internal, "squashfs"),
            (volume("blk", at, "surelynotafs", &[]), Kind::FailedPrecondition, "surelynotafs"),
            (volume("blk", at, "ext4", &["surely-no-option"]), Kind::Internal, "ext4"),
            (volume("9p", "tag", "9p", &["msize=8192"]), Kind::FailedPrecondition, "9p"),
            (formatted("create_filesystem"), Kind::FailedPrecondition, "mkfs.ext4"),
            (formatted("encryption_key=ephemeral"), Kind::Unimplemented, "encrypted"),
            (elsewhere, Kind::InvalidArgument, "/proc/x"),
            (above, Kind::InvalidArgument, ".."),
        ];
        for (round, (bad, kind, expected)) in cases.into_iter().enumerate() {
            // Twice: what a failure leaves behind must not pass for a mount.
            for attempt in 0..2 {
                let result = run(agent, "c1", vec![good.clone(), bad.clone()]).await;
                let text = failed(result, kind).with_context(|| format!("{expected}, attempt {attempt}"))?;
                ensure!(text.contains(expected), "{expected}: {text}");
            }
            let left = mounts(agent, &format!("m{round}"), VOLUMES).await?;
            ensure!(left.is_empty(), "after {expected}: {left:?}");
        }
        run(agent, "c1", vec![good]).await?;
        Ok(())
    })
}

fn kernel_modules_are_loaded_with_parameters(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        let module = |name: &str, parameters: &[&str]| KernelModule {
            name: name.into(),
            parameters: parameters.iter().map(|parameter| (*parameter).to_owned()).collect(),
            ..Default::default()
        };
        let with = |modules: &[KernelModule]| {
            let mut request = agent.pod_request();
            request.kernel_modules = modules.to_vec();
            request
        };
        for (modules, kind, expected) in [
            (module("surely-not-a-module", &[]), Kind::InvalidArgument, "surely_not_a_module"),
            (module("../../init", &[]), Kind::InvalidArgument, "../../init"),
            (module("", &[]), Kind::InvalidArgument, "name of a kernel module"),
            (module("virtio_blk", &["num_request_queues=1"]), Kind::FailedPrecondition, "virtio_blk"),
        ] {
            let request = with(&[modules]);
            let text = failed(agent.client.create_sandbox(context(), &request).await, kind)?;
            ensure!(text.contains(expected), "{text}");
        }
        // With dependencies, by either spelling, twice, built in, with parameters.
        let modules = [
            module("dm-verity", &[]),
            module("dm_verity", &[]),
            module("ext4", &[]),
            module("loop", &["max_loop=3", "max_part=7"]),
        ];
        agent.client.create_sandbox(context(), &with(&modules)).await?;
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Mounts.push(mount("/sys", "sysfs", "sysfs", &["ro"]));
        agent.run_spec("c1", spec).await?;
        let parameters = "cat /sys/module/loop/parameters/max_loop /sys/module/loop/parameters/max_part";
        ensure!(agent.line("c1", "parameters", parameters).await? == "3\n7\n");
        agent.line("c1", "dependencies", "ls -d /sys/module/dm_verity /sys/module/dm_mod").await?;
        Ok(())
    })
}
