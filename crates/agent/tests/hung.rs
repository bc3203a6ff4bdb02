//! What hangs for ever, a file system whose server does not answer, or cannot be had, a thread, stops nothing else.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "each file of tests uses a part")]
mod support;

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::{agent::*, protobuf::MessageField, status::Kind};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, getrlimit, prlimit},
};
use support::{Agent, cannot_run, context, failed};

/// Nothing that does not hang takes this long.
const QUICK: Duration = Duration::from_secs(30);

macro_rules! agent_or_skip {
    () => {{
        if let Some(reason) = cannot_run() {
            eprintln!("skipped: {reason}");
            return;
        }
        Agent::start().await
    }};
}

/// Mounts a file system in the mount namespace of a process that answers nothing until the returned file is closed; `None`
/// where there is no FUSE.
fn mount_that_hangs(pid: u32, path: &Path) -> Option<File> {
    let fuse = File::options().read(true).write(true).open("/dev/fuse").ok()?;
    let namespace = File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
    let options = std::ffi::CString::new(options).unwrap();
    let path = path.to_owned();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
        std::fs::create_dir_all(&path).unwrap();
        mount("hung", &path, "fuse", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str()).unwrap();
    })
    .join()
    .unwrap();
    Some(fuse)
}

/// The processes whose parent is this one, whichever of its threads that is.
fn children(parent: u32) -> Vec<u32> {
    let parent = format!("PPid:\t{parent}\n");
    let pid = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        std::fs::read_to_string(entry.path().join("status")).ok()?.contains(&parent).then_some(pid)
    };
    std::fs::read_dir("/proc").unwrap().filter_map(pid).collect()
}

#[tokio::test]
async fn requests_for_a_volume_that_hangs_do_not_stop_the_agent_and_are_bounded() {
    let agent = Arc::new(agent_or_skip!());
    let path: PathBuf = agent.rootfs().parent().unwrap().join("hung");
    let Some(fuse) = mount_that_hangs(agent.pid(), &path) else {
        eprintln!("skipped: there is no /dev/fuse");
        return;
    };
    let request =
        VolumeStatsRequest { volume_guest_path: path.to_str().unwrap().into(), ..Default::default() };
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let (agent, request) = (Arc::clone(&agent), request.clone());
        asked.spawn(async move { agent.client.get_volume_stats(context(), &request).await });
    }
    for _ in 0..8 {
        let refused = asked.join_next().await.unwrap().unwrap();
        let text = failed(refused, Kind::DeadlineExceeded);
        assert!(text.starts_with("cannot look at a volume: earlier requests of that kind hang"), "{text}");
    }
    // Whatever is not about volumes is as always.
    let others = async {
        agent.run("c1", &["sleep", "1000"]).await;
        assert_eq!(agent.shell("c1", "e", "echo hello").await, ("hello\n".to_owned(), 0));
        agent.client.get_metrics(context(), &GetMetricsRequest::new()).await.unwrap();
        agent.remove("c1").await.unwrap();
    };
    tokio::time::timeout(QUICK, others).await.expect("it is delayed");
    // Once the server is gone, the sixteen come back, and volumes are looked at again.
    drop(fuse);
    while let Some(answer) = asked.join_next().await {
        failed(answer.unwrap(), Kind::Internal);
    }
    let request = VolumeStatsRequest { volume_guest_path: "/run".into(), ..Default::default() };
    agent.client.get_volume_stats(context(), &request).await.unwrap();
}

#[tokio::test]
async fn a_container_whose_file_system_hangs_keeps_no_other_from_being_made_for_ever() {
    let agent = agent_or_skip!();
    agent.run("source", &["sh", "-c", "mkdir -p /tmp/hung; echo ready; sleep 1000"]).await;
    assert_eq!(agent.read("source", "").await.unwrap(), b"ready\n");
    let init = children(agent.pid());
    let Some(fuse) = mount_that_hangs(init[0], Path::new("/tmp/hung")) else {
        eprintln!("skipped: there is no /dev/fuse");
        return;
    };
    let request = CreateContainerRequest {
        container_id: "target".into(),
        OCI: MessageField::some(agent.spec(&["true"])),
        shared_mounts: vec![SharedMount {
            name: "shared".into(),
            src_ctr: "source".into(),
            src_path: "/tmp/hung/mount".into(),
            dst_ctr: "target".into(),
            dst_path: "/tmp/taken".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let text = failed(agent.client.create_container(context(), &request).await, Kind::DeadlineExceeded);
    assert!(text.contains("\"/tmp/hung/mount\" of container \"source\": its file system hangs"), "{text}");
    // Nothing of the target is left, and its id is free; the source can be removed.
    let others = async {
        assert_eq!(children(agent.pid()), init);
        agent.run("target", &["true"]).await;
        assert_eq!(agent.wait("target", "").await.unwrap(), 0);
        agent.remove("target").await.unwrap();
        agent.remove("source").await.unwrap();
    };
    tokio::time::timeout(QUICK, others).await.expect("it is delayed");
    drop(fuse);
}

#[tokio::test]
async fn without_a_thread_to_be_made_requests_are_answered_one_after_the_other() {
    let agent = Arc::new(agent_or_skip!());
    let status = |field: &str| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let limit = |bytes| {
        let pid = rustix::process::Pid::from_raw(agent.pid().cast_signed());
        let maximum = getrlimit(Resource::As).maximum;
        prlimit(pid, Resource::As, Rlimit { current: bytes, maximum }).unwrap();
    };
    assert_eq!(status("Threads"), 2, "the agent's own and the one in reserve");
    // Room for everything but a stack.
    limit(Some((status("VmSize") << 10) + (1 << 20)));
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let agent = Arc::clone(&agent);
        let metrics = async move { agent.client.get_metrics(context(), &GetMetricsRequest::new()).await };
        asked.spawn(tokio::time::timeout(QUICK, metrics));
    }
    while let Some(answer) = asked.join_next().await {
        assert!(!answer.unwrap().expect("it is lost").unwrap().metrics.is_empty());
    }
    assert_eq!(status("Threads"), 2);
    limit(None);
    agent.run("c1", &["true"]).await;
    assert_eq!(agent.wait("c1", "").await.unwrap(), 0);
    agent.remove("c1").await.unwrap();
}
