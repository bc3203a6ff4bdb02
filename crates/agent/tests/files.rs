//! Files and volumes on a real agent as a plain process: copies, termination logs, figures, memory, watched volumes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "each family of tests uses a part of it")]
mod support;

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_protocol::{agent::*, csi::volume_usage::Unit, oci, ports::GUEST_SHARE, status::Kind};
use support::{Agent, cannot_run, context, failed};

macro_rules! agent_or_skip {
    () => {{
        if let Some(reason) = cannot_run() {
            eprintln!("skipped: {reason}");
            return;
        }
        Agent::start().await
    }};
}

/// A path of the agent's own mount namespace.
fn inside(agent: &Agent, path: &str) -> PathBuf {
    format!("/proc/{}/root{path}", agent.pid()).into()
}

fn bind(destination: &str, source: &str) -> oci::Mount {
    oci::Mount {
        destination: destination.into(),
        type_: "bind".into(),
        source: source.into(),
        options: vec!["rbind".into(), "rprivate".into()],
        ..Default::default()
    }
}

fn piece(path: &str, size: usize, offset: usize, data: &[u8]) -> CopyFileRequest {
    CopyFileRequest {
        path: format!("{GUEST_SHARE}/{path}"),
        file_size: i64::try_from(size).unwrap(),
        file_mode: 0o100_640,
        dir_mode: 0o755,
        offset: i64::try_from(offset).unwrap(),
        data: data.to_vec(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_file_comes_in_pieces_and_a_container_reads_it() {
    let agent = agent_or_skip!();
    let content: Vec<u8> = (0..(5 << 20) + 17u32).map(|n| ((n * 31) >> 3).to_le_bytes()[0]).collect();
    for (n, data) in content.chunks(1 << 20).enumerate() {
        assert!(!inside(&agent, &format!("{GUEST_SHARE}/volume/big")).exists());
        let request = piece("volume/big", content.len(), n << 20, data);
        agent.client.copy_file(context(), &request).await.unwrap();
    }
    let mut spec = agent.spec(&["sh", "-c", "wc -c < /volume/big && md5sum < /volume/big"]);
    spec.Mounts.push(bind("/volume", &format!("{GUEST_SHARE}/volume")));
    agent.create("c1", spec).await.unwrap();
    agent.start_container("c1").await.unwrap();
    let told = agent.stdout("c1", "").await;
    let file = inside(&agent, &format!("{GUEST_SHARE}/volume/big"));
    assert!(fs::read(&file).unwrap() == content);
    let sum = std::process::Command::new("md5sum").stdin(fs::File::open(&file).unwrap()).output().unwrap();
    assert_eq!(told, format!("{}\n{}", content.len(), String::from_utf8(sum.stdout).unwrap()));
    assert_eq!(agent.wait("c1", "").await.unwrap(), 0);
}

#[tokio::test]
async fn a_hostile_copy_is_refused_and_the_agent_lives() {
    let agent = agent_or_skip!();
    failed(agent.client.copy_file(context(), &piece("..", 1, 0, b"x")).await, Kind::InvalidArgument);
    let descriptors = agent.descriptors();
    let deep = "a/".repeat(3000);
    for path in ["../../../../etc/x", "..", "nul\0", &deep, &"n".repeat(3 << 20)] {
        let refused = agent.client.copy_file(context(), &piece(path, 1, 0, b"x")).await;
        let text = failed(refused, Kind::InvalidArgument);
        assert!(text.len() < 5000, "a long path is not told in full");
    }
    failed(agent.client.copy_file(context(), &piece("f", 2, 1, b"x")).await, Kind::FailedPrecondition);
    let huge = CopyFileRequest { file_size: 1 << 62, ..piece("f", 1, 0, b"x") };
    failed(agent.client.copy_file(context(), &huge).await, Kind::InvalidArgument);
    let device = CopyFileRequest { file_mode: 0o060_666, ..piece("f", 1, 0, b"x") };
    failed(agent.client.copy_file(context(), &device).await, Kind::InvalidArgument);
    assert_eq!(agent.descriptors(), descriptors);
}

#[tokio::test]
async fn copies_of_many_clients_at_once_are_whole() {
    let agent = Arc::new(agent_or_skip!());
    let copies: Vec<_> = (0..50u8)
        .map(|n| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move {
                for offset in [0, 1000, 2000] {
                    let request = piece(&format!("d/f{n}.tmp"), 3000, offset, &[n; 1000]);
                    agent.client.copy_file(context(), &request).await.unwrap();
                }
            })
        })
        .collect();
    for copy in copies {
        copy.await.unwrap();
    }
    let directory = inside(&agent, &format!("{GUEST_SHARE}/d"));
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 50);
    for n in 0..50u8 {
        assert!(fs::read(directory.join(format!("f{n}.tmp"))).unwrap() == [n; 3000]);
    }
}

#[tokio::test]
async fn last_words_are_told() {
    let agent = agent_or_skip!();
    agent.client.copy_file(context(), &piece("log", 0, 0, b"")).await.unwrap();
    let words = |id: &str, kind: &str| {
        let request =
            GetDiagnosticDataRequest { log_type: kind.into(), container_id: id.into(), ..Default::default() };
        let client = &agent.client;
        async move { client.get_diagnostic_data(context(), &request).await.map(|answer| answer.data) }
    };
    let mut spec = agent.spec(&["sh", "-c", "echo goodbye > /last; yes | head -c 10000 >> /last"]);
    spec.Mounts.push(bind("/last", &format!("{GUEST_SHARE}/log")));
    spec.Annotations.insert("io.kubernetes.container.terminationMessagePath".into(), "/last".into());
    agent.create("c1", spec).await.unwrap();
    assert_eq!(words("c1", "termination_log").await.unwrap(), "");
    agent.start_container("c1").await.unwrap();
    assert_eq!(agent.wait("c1", "").await.unwrap(), 0);
    let log = words("c1", "termination_log").await.unwrap();
    assert!(log.starts_with("goodbye\ny\n") && log.len() == 4096, "{} bytes", log.len());
    fs::remove_file(inside(&agent, &format!("{GUEST_SHARE}/log"))).unwrap();
    assert_eq!(words("c1", "termination_log").await.unwrap(), "", "a missing file says nothing");

    failed(words("c1", "core_dump").await, Kind::InvalidArgument);
    failed(words("nobody", "termination_log").await, Kind::InvalidArgument);
    agent.run("c2", &["true"]).await;
    failed(words("c2", "termination_log").await, Kind::FailedPrecondition);
}

#[tokio::test]
async fn figures_of_volumes_are_right_and_the_hosts_file_systems_are_left_alone() {
    let agent = agent_or_skip!();
    agent.client.copy_file(context(), &piece("f", 1, 0, b"x")).await.unwrap();
    let stats = |path: &str| {
        let request = VolumeStatsRequest { volume_guest_path: path.into(), ..Default::default() };
        let client = &agent.client;
        async move { client.get_volume_stats(context(), &request).await }
    };
    let told = stats(GUEST_SHARE).await.unwrap();
    let real = rustix::fs::statvfs(inside(&agent, GUEST_SHARE)).unwrap();
    assert_eq!(told.usage.len(), 2);
    assert_eq!(told.usage[0].unit.unwrap(), Unit::BYTES);
    assert_eq!(told.usage[0].total, real.f_blocks * real.f_frsize);
    assert_eq!(told.usage[1].total, real.f_files);
    failed(stats("/run/kata-containers/no").await, Kind::NotFound);
    failed(stats("/run/../etc").await, Kind::InvalidArgument);

    let resize = |path: &str| {
        let request = ResizeVolumeRequest { volume_guest_path: path.into(), size: 1, ..Default::default() };
        let client = &agent.client;
        async move { client.resize_volume(context(), &request).await }
    };
    let text = failed(resize(GUEST_SHARE).await, Kind::Unimplemented);
    assert!(text.contains("tmpfs"), "{text}");
    failed(resize("/").await, Kind::FailedPrecondition);
    agent
        .client
        .remove_stale_virtiofs_share_mounts(context(), &RemoveStaleVirtiofsShareMountsRequest::new())
        .await
        .unwrap();
}

fn ephemeral(options: &[&str]) -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        mount_point: "/run/kata-containers/sandbox/ephemeral/cache".into(),
        options: options.iter().map(|option| (*option).into()).collect(),
        ..Default::default()
    }
}

async fn create_with(agent: &Agent, id: &str, storage: Storage, destination: &str) {
    let mut spec = agent.spec(&["sleep", "1000"]);
    spec.Mounts.push(bind(destination, &storage.mount_point));
    let request = CreateContainerRequest {
        container_id: id.into(),
        OCI: bulkhead_protocol::protobuf::MessageField::some(spec),
        storages: vec![storage],
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await.unwrap();
    agent.start_container(id).await.unwrap();
}

#[tokio::test]
async fn a_running_container_gets_more_memory_for_its_files() {
    let agent = agent_or_skip!();
    create_with(&agent, "c1", ephemeral(&["size=1m", "fsgid=77"]), "/cache").await;
    let fill = "head -c 3000000 /dev/zero > /cache/f";
    assert_ne!(agent.shell("c1", "e1", fill).await.1, 0);
    let request = UpdateEphemeralMountsRequest {
        storages: vec![ephemeral(&["remount", "size=8m"])],
        ..Default::default()
    };
    agent.client.update_ephemeral_mounts(context(), &request).await.unwrap();
    assert_eq!(agent.shell("c1", "e2", fill).await.1, 0);
    assert_eq!(agent.shell("c1", "e3", "stat -c %a:%g /cache").await.0, "3777:77\n");
    let local = Storage { driver: "local".into(), ..ephemeral(&[]) };
    let request = UpdateEphemeralMountsRequest { storages: vec![local], ..Default::default() };
    failed(agent.client.update_ephemeral_mounts(context(), &request).await, Kind::InvalidArgument);
}

#[tokio::test]
async fn a_container_sees_what_changes_in_a_watched_volume() {
    let agent = agent_or_skip!();
    let copy = async |path: &str, mode: u32, data: &[u8]| {
        let request = CopyFileRequest { file_mode: mode, ..piece(path, data.len(), 0, data) };
        agent.client.copy_file(context(), &request).await.unwrap();
    };
    copy("config/..one/key", 0o100_644, b"one").await;
    copy("config/..data", 0o120_777, b"..one").await;
    copy("config/key", 0o120_777, b"..data/key").await;
    let watched = Storage {
        driver: "watchable-bind".into(),
        source: format!("{GUEST_SHARE}/config"),
        fstype: "bind".into(),
        mount_point: format!("{GUEST_SHARE}/watchable/config"),
        ..Default::default()
    };
    create_with(&agent, "c1", watched, "/config").await;
    assert_eq!(agent.shell("c1", "e1", "cat /config/key").await.0, "one");
    copy("config/..two/key", 0o100_644, b"two").await;
    copy("config/..data", 0o120_777, b"..two").await;
    let start = Instant::now();
    for n in 0.. {
        if agent.shell("c1", &format!("look{n}"), "cat /config/key").await.0 == "two" {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "the container does not see the change");
    }
    agent.remove("c1").await.unwrap();
    assert!(!inside(&agent, &format!("{GUEST_SHARE}/watchable")).exists());
}
