//! Files and volumes of a guest: copies, last words, memory of the guest, watched volumes, disks that grow.

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Hardware, context, failed, in_vm, mount},
    cases,
};
use bulkhead_protocol::{
    agent::*,
    ports::{GUEST_SHARE, GUEST_SHM},
    protobuf::MessageField,
    status::Kind,
};
use serde_json::json;

pub(super) const CASES: &[Case] = cases![
    copied_files_are_whole_and_last_words_are_told,
    memory_volumes_keep_their_options_grow_and_huge_pages_add_up,
    watched_volumes_follow_the_host,
    disks_belong_to_a_group_and_grow,
];

/// Nothing that is waited for takes this long.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

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

/// Runs a container that sleeps, with storages each bound to a place in it.
async fn sleeper(agent: &Agent, id: &str, storages: Vec<(Storage, &str)>) -> anyhow::Result<()> {
    let mut spec = agent.spec(&["sleep", "1000"]);
    for (storage, place) in &storages {
        spec.Mounts.push(mount(place, "bind", &storage.mount_point, &["rbind"]));
    }
    let request = CreateContainerRequest {
        container_id: id.into(),
        OCI: MessageField::some(spec),
        storages: storages.into_iter().map(|(storage, _)| storage).collect(),
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await?;
    agent.start_container(id).await?;
    Ok(())
}

fn copied_files_are_whole_and_last_words_are_told(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let content: Vec<u8> =
            (0..(5u32 << 20) + 17).map(|n| (n.wrapping_mul(31) >> 3).to_le_bytes()[0]).collect();
        let copy = |path: &str, offset: usize, data: &[u8], size: usize| CopyFileRequest {
            path: format!("{GUEST_SHARE}/{path}"),
            file_size: i64::try_from(size).unwrap_or(0),
            file_mode: 0o100_666,
            dir_mode: 0o755,
            offset: i64::try_from(offset).unwrap_or(0),
            data: data.to_vec(),
            ..Default::default()
        };
        for (n, data) in content.chunks(1 << 20).enumerate() {
            ensure!(!agent.host_share().join("volume/big").exists(), "half a file has its name");
            let request = copy("volume/big", n << 20, data, content.len());
            agent.client.copy_file(context(), &request).await?;
        }
        ensure!(std::fs::read(agent.host_share().join("volume/big"))? == content, "the file is another");
        ensure!(std::fs::read_dir(agent.host_share().join("volume"))?.count() == 1, "something is left over");
        agent.client.copy_file(context(), &copy("last", 0, b"", 0)).await?;

        let mut spec = agent.spec(&["sh", "-c", "md5sum < /volume/big; echo goodbye > /last"]);
        spec.Mounts.push(mount("/volume", "bind", &format!("{GUEST_SHARE}/volume"), &["rbind"]));
        spec.Mounts.push(mount("/last", "bind", &format!("{GUEST_SHARE}/last"), &["rbind"]));
        spec.Annotations.insert("io.kubernetes.container.terminationMessagePath".into(), "/last".into());
        agent.run_spec("c1", spec).await?;
        let sum = agent.stdout("c1", "").await?;
        let real = Command::new("md5sum")
            .stdin(std::fs::File::open(agent.host_share().join("volume/big"))?)
            .output()?;
        ensure!(sum.as_bytes() == real.stdout, "the container reads something else: {sum}");
        ensure!(agent.wait("c1", "").await? == 0);
        let request = GetDiagnosticDataRequest {
            log_type: "termination_log".into(),
            container_id: "c1".into(),
            ..Default::default()
        };
        let words = agent.client.get_diagnostic_data(context(), &request).await?.data;
        ensure!(words == "goodbye\n", "{words:?}");

        // A link that the host's side of the share planted leads nowhere.
        std::os::unix::fs::symlink("/run", agent.host_share().join("out"))?;
        failed(agent.client.copy_file(context(), &copy("out/x", 0, b"x", 1)).await, Kind::InvalidArgument)?;
        let request = RemoveStaleVirtiofsShareMountsRequest::new();
        agent.client.remove_stale_virtiofs_share_mounts(context(), &request).await?;
        agent.check().await?;
        Ok(())
    })
}

fn memory_volumes_keep_their_options_grow_and_huge_pages_add_up(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let place = |name: &str| format!("/run/kata-containers/sandbox/ephemeral/{name}");
        let cache = storage("ephemeral", "tmpfs", "tmpfs", &place("cache"), &["size=1m,noexec", "fsgid=77"]);
        let huge = |name: &str, pages: u64| {
            let option = format!("pagesize=2097152,size={}", pages << 21);
            storage("ephemeral", "nodev", "hugetlbfs", &place(name), &[&option])
        };
        let shm = storage("ephemeral", "shm", "tmpfs", GUEST_SHM, &[]);
        let mut spec = agent.spec(&["sleep", "1000"]);
        for (source, place) in [(cache.mount_point.as_str(), "/cache"), (GUEST_SHM, "/dev/shm")] {
            spec.Mounts.push(mount(place, "bind", source, &["rbind"]));
        }
        let request = CreateContainerRequest {
            container_id: "c1".into(),
            OCI: MessageField::some(spec),
            storages: vec![cache.clone(), huge("first", 3)],
            ..Default::default()
        };
        agent.client.create_container(context(), &request).await?;
        agent.start_container("c1").await?;
        sleeper(agent, "c2", vec![(huge("second", 4), "/huge")]).await?;
        let total = agent.line("c1", "total", "grep HugePages_Total /proc/meminfo").await?;
        ensure!(total.split_whitespace().last() == Some("7"), "{total}");
        let mounted = agent.line("c2", "mounted", "grep ' /huge ' /proc/mounts").await?;
        ensure!(mounted.contains("hugetlbfs") && mounted.contains("size=8388608"), "{mounted}");
        let too_much = CreateContainerRequest {
            container_id: "c3".into(),
            OCI: MessageField::some(agent.spec(&["true"])),
            storages: vec![huge("third", 1 << 20)],
            ..Default::default()
        };
        failed(agent.client.create_container(context(), &too_much).await, Kind::FailedPrecondition)?;
        let total = agent.line("c1", "after", "grep HugePages_Total /proc/meminfo").await?;
        ensure!(total.split_whitespace().last() == Some("7"), "a failure keeps pages: {total}");
        // What fails after its pages were reserved: the next storage, or the container itself.
        let mut spec = agent.spec(&["true"]);
        spec.Mounts.push(mount("/missing", "bind", "/no/such/source", &["rbind"]));
        let broken = CreateContainerRequest {
            OCI: MessageField::some(spec),
            storages: vec![huge("third", 2)],
            ..too_much.clone()
        };
        let bad = storage("ephemeral", "tmpfs", "tmpfs", &place("bad"), &["no-such-option"]);
        let half = CreateContainerRequest {
            storages: vec![huge("third", 2), huge("second", 9), bad],
            ..too_much.clone()
        };
        for (exec, request) in [("after1", broken), ("after2", half)] {
            ensure!(agent.client.create_container(context(), &request).await.is_err(), "{exec}");
            let total = agent.line("c1", exec, "grep HugePages_Total /proc/meminfo").await?;
            ensure!(total.split_whitespace().last() == Some("7"), "{exec}: a failure keeps pages: {total}");
        }
        // Each container says its own limit.
        sleeper(agent, "c4", vec![(huge("second", 2), "/huge")]).await?;
        let mounted = agent.line("c4", "mounted", "grep ' /huge ' /proc/mounts").await?;
        ensure!(mounted.contains("size=8388608"), "{mounted}");
        agent.remove("c4").await?;

        let size = async |name: &str, path: &str| -> anyhow::Result<u64> {
            let line = agent.line("c1", name, &format!("df -k {path} | tail -n 1")).await?;
            Ok(line.split_whitespace().nth(1).context("a size")?.parse()?)
        };
        ensure!(size("size1", "/cache").await? == 1024, "the size is not honoured");
        ensure!(size("size2", "/dev/shm").await? == 64 << 10, "the size of /dev/shm is not honoured");
        ensure!(agent.line("c1", "stat", "stat -c %a:%g /cache").await? == "3777:77\n");
        let grown = |storage: &Storage, size: &str| Storage {
            options: vec!["remount".into(), format!("size={size}")],
            ..storage.clone()
        };
        let request = UpdateEphemeralMountsRequest {
            storages: vec![grown(&cache, "8m"), grown(&shm, "128m")],
            ..Default::default()
        };
        agent.client.update_ephemeral_mounts(context(), &request).await?;
        ensure!(size("size3", "/cache").await? == 8 << 10, "the update has no effect");
        ensure!(size("size4", "/dev/shm").await? == 128 << 10, "the update has no effect on /dev/shm");
        let line = agent.line("c1", "flags", "grep ' /dev/shm ' /proc/mounts").await?;
        ensure!(line.contains("noexec") && line.contains("nosuid"), "an update takes flags away: {line}");
        let unknown = storage("ephemeral", "tmpfs", "tmpfs", &place("unknown"), &["size=1m"]);
        let request = UpdateEphemeralMountsRequest { storages: vec![unknown], ..Default::default() };
        failed(agent.client.update_ephemeral_mounts(context(), &request).await, Kind::FailedPrecondition)?;
        Ok(())
    })
}

/// Publishes a version of a volume the way kubelet does, with so many keys.
fn publish(volume: &Path, version: &str, keys: usize) -> anyhow::Result<()> {
    let directory = volume.join(format!("..{version}"));
    std::fs::create_dir_all(&directory)?;
    for key in 0..keys {
        std::fs::write(directory.join(format!("key{key}")), version.repeat(20_000))?;
        // They stay as they are from the second version on.
        let _ = std::os::unix::fs::symlink(format!("..data/key{key}"), volume.join(format!("key{key}")));
    }
    let old = std::fs::read_link(volume.join("..data")).ok();
    std::os::unix::fs::symlink(format!("..{version}"), volume.join("..data_tmp"))?;
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    old.map_or(Ok(()), |old| std::fs::remove_dir_all(volume.join(old)))?;
    Ok(())
}

fn watched_volumes_follow_the_host(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let volume = agent.host_share().join("config");
        // More files and more bytes than a watched volume could have elsewhere.
        publish(&volume, "one", 40)?;
        let watched = storage(
            "watchable-bind",
            &format!("{GUEST_SHARE}/config"),
            "bind",
            &format!("{GUEST_SHARE}/watchable/config"),
            &[],
        );
        sleeper(agent, "c1", vec![(watched, "/config")]).await?;
        let first = agent.line("c1", "first", "head -c 3 /config/key39").await?;
        ensure!(first == "one", "{first:?}");
        ensure!(agent.line("c1", "kind", "stat -f -c %T /config").await?.contains("tmpfs"));
        // Whatever moment it looks at, all keys are of one version.
        // It may meet the end of one, as on the host, and then finds nothing of it any more.
        let look = "cd -P /config/..data && for k in key*; do head -c 3 $k; tail -c 3 $k; done 2>/dev/null | fold -w 3 | sort -u";
        publish(&volume, "two", 40)?;
        let start = Instant::now();
        for n in 0.. {
            let seen = agent.line("c1", &format!("look{n}"), look).await?;
            if seen.trim() == "two" {
                break;
            }
            ensure!(matches!(seen.trim(), "" | "one"), "two versions at once: {seen:?}");
            ensure!(start.elapsed() < PATIENCE, "the change is not seen");
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        agent.remove("c1").await?;
        Ok(())
    })
}

fn disks_belong_to_a_group_and_grow(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        // What a user of the volume left there: a link out of it, and a directory of his own.
        let tree = scratch.path().join("tree");
        std::fs::create_dir_all(tree.join("data/deep"))?;
        std::fs::write(tree.join("data/deep/file"), "x")?;
        std::os::unix::fs::symlink("/run", tree.join("data/out"))?;
        let disk = scratch.path().join("disk");
        std::fs::File::create(&disk)?.set_len(32 << 20)?;
        let made = Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&disk).status()?;
        ensure!(made.success(), "mkfs.ext4: {made}");
        let path = agent.plug_disk(&disk)?;
        let mount_point = "/run/kata-containers/sandbox/storage/disk";
        let mut volume = storage("blk", &path, "ext4", mount_point, &[]);
        volume.fs_group = MessageField::some(FSGroup { group_id: 4242, ..Default::default() });
        sleeper(agent, "c1", vec![(volume, "/volume")]).await?;
        let told = "cd /volume && stat -c %a:%g . data data/deep data/deep/file && stat -c %g data/out";
        let told = agent.line("c1", "group", told).await?;
        ensure!(told == "2775:4242\n2775:4242\n2775:4242\n664:4242\n4242\n", "{told}");
        // The link's target is the agent's own /run, which a container sees as nothing; the agent's figures are asked.
        let mut spec = agent.spec(&["stat", "-c", "%g", "/agents"]);
        spec.Mounts.push(mount("/agents", "bind", "/run", &["bind"]));
        agent.run_spec("eye", spec).await?;
        ensure!(agent.stdout("eye", "").await? == "0\n", "the group was given through a link");

        let stats = async || -> anyhow::Result<u64> {
            let request = VolumeStatsRequest { volume_guest_path: mount_point.into(), ..Default::default() };
            let usage = agent.client.get_volume_stats(context(), &request).await?.usage;
            let bytes = usage.first().context("figures")?;
            ensure!(
                bytes.available < bytes.total - bytes.used,
                "the reserve of root is available: {bytes:?}"
            );
            Ok(bytes.total)
        };
        let before = stats().await?;
        let resize = |size: u64| ResizeVolumeRequest {
            volume_guest_path: mount_point.into(),
            size,
            ..Default::default()
        };
        let larger = agent.client.resize_volume(context(), &resize(64 << 20)).await;
        let text = failed(larger, Kind::FailedPrecondition)?;
        ensure!(text.contains("larger first"), "{text}");
        failed(agent.client.resize_volume(context(), &resize(1 << 20)).await, Kind::InvalidArgument)?;
        let node = format!("plugged{}", u8::from_str_radix(path.rsplit('/').next().context("a slot")?, 16)?);
        agent.qmp("block_resize", json!({"node-name": node, "size": 64 << 20}))?;
        let start = Instant::now();
        // The kernel hears of it by an interrupt of the disk.
        while let Err(error) = agent.client.resize_volume(context(), &resize(64 << 20)).await {
            ensure!(start.elapsed() < PATIENCE, "{error}");
        }
        let after = stats().await?;
        ensure!(after > before + (24 << 20), "{before} bytes became {after}");
        // Again is no error, and smaller is one.
        agent.client.resize_volume(context(), &resize(64 << 20)).await?;
        agent.client.resize_volume(context(), &resize(0)).await?;
        failed(agent.client.resize_volume(context(), &resize(32 << 20)).await, Kind::InvalidArgument)?;
        agent.line("c1", "write", "head -c 40000000 /dev/zero > /volume/data/big").await?;
        Ok(())
    })
}
