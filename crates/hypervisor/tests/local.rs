//! The VM that is none: a plain process in a mount namespace of its own.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use bulkhead_hypervisor::{AccelPolicy, Device, Endpoint, Error, Kind, Share, Vm, VmConfig, boot};

const BOUND: Duration = Duration::from_secs(20);

/// Whether this test can mount; says so if not.
fn can_mount() -> bool {
    let can = Command::new("unshare").args(["-m", "true"]).output().is_ok_and(|done| done.status.success());
    if !can {
        eprintln!("skipped: mount namespaces need root");
    }
    can
}

fn config(dir: &Path, script: &str, share_at: &str) -> VmConfig {
    let program = dir.join("program");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let share = dir.join("share");
    fs::create_dir_all(&share).unwrap();
    VmConfig {
        kind: Kind::Local { program, args: vec!["one".into(), "two".into()], share_at: share_at.into() },
        id: "test".into(),
        dir: dir.join("vm"),
        vmm: PathBuf::new(),
        backend: PathBuf::new(),
        kernel: PathBuf::new(),
        initramfs: PathBuf::new(),
        kernel_params: Vec::new(),
        vcpus: 1,
        memory_mib: 1,
        accel: AccelPolicy::Auto,
        machine: String::new(),
        share: Some(Share { tag: "share".into(), path: share }),
        cache_dir: dir.join("cache"),
        paused: false,
        netns: None,
    }
}

async fn says(vm: &dyn Vm, line: &str) {
    let start = Instant::now();
    while !vm.last_words().contains(line) {
        assert!(start.elapsed() < BOUND, "no {line:?} in:\n{}", vm.last_words());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn mounts_below(dir: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().filter(|line| line.contains(dir.to_str().unwrap())).count()
}

#[tokio::test]
async fn it_sees_the_share_and_what_is_mounted_there_later() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = "/run/kata-containers/shared/containers";
    let script = format!(
        "echo args $*; ls /run/kata-containers; cat {at}/early\n\
         until cat {at}/later/file 2>/dev/null; do sleep 0.02; done; exec sleep 1000"
    );
    let config = config(dir.path(), &script, at);
    let share = dir.path().join("share");
    fs::write(share.join("early"), "early bird\n").unwrap();
    fs::create_dir(share.join("later")).unwrap();
    let vm = boot(config).await.unwrap();
    says(&*vm, "args one two\nshared\nearly bird").await;

    let mount =
        Command::new("mount").args(["-t", "tmpfs", "later"]).arg(share.join("later")).status().unwrap();
    assert!(mount.success());
    fs::write(share.join("later/file"), "late bird\n").unwrap();
    says(&*vm, "late bird").await;

    assert_eq!(vm.endpoint(), &Endpoint::Unix { path: dir.path().join("vm/agent.sock") });
    let disk = Device::Block { path: "/dev/null".into(), read_only: true };
    assert!(matches!(vm.attach(disk).await, Err(Error::Unsupported { .. })));
    let pid = vm.pid();
    assert_eq!(vm.stop(Duration::ZERO).await.unwrap().code, 143);
    assert_eq!(mounts_below(dir.path()), 0);
    assert!(!dir.path().join("vm").exists() && !Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn a_share_that_its_owner_made_a_shared_mount_is_left_to_its_owner() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("at");
    let config = config(dir.path(), "exit 3", at.to_str().unwrap());
    let share = dir.path().join("share");
    let mount =
        |args: &[&str]| assert!(Command::new("mount").args(args).arg(&share).status().unwrap().success());
    mount(&["--bind", share.to_str().unwrap()]);
    mount(&["--make-shared"]);
    let vm = boot(config).await.unwrap();
    assert_eq!(vm.wait().await.code, 3);
    drop(vm);
    assert_eq!(mounts_below(dir.path()), 1, "the owner's own mount");
    assert!(Command::new("umount").arg(&share).status().unwrap().success());
}

/// Not a test: the process that [`a_process_that_is_killed_takes_its_vm_along`] kills.
#[tokio::test]
async fn the_process_that_is_killed() {
    let Some(dir) = std::env::var_os("BULKHEAD_TEST_KILLED").map(PathBuf::from) else { return };
    let vm = boot(config(&dir, "exec sleep 1000", dir.join("at").to_str().unwrap())).await.unwrap();
    fs::write(dir.join("pid.new"), vm.pid().to_string()).unwrap();
    fs::rename(dir.join("pid.new"), dir.join("pid")).unwrap();
    vm.wait().await;
}

#[tokio::test]
async fn a_process_that_is_killed_takes_its_vm_along() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut victim = Command::new("unshare")
        .args([
            "-m",
            std::env::current_exe().unwrap().to_str().unwrap(),
            "--exact",
            "the_process_that_is_killed",
        ])
        .env("BULKHEAD_TEST_KILLED", dir.path())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let within_bound = async |done: &dyn Fn() -> bool, what: &str| {
        while !done() {
            assert!(start.elapsed() < BOUND, "{what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within_bound(&|| dir.path().join("pid").exists(), "it does not boot").await;
    let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
    victim.kill().unwrap();
    victim.wait().unwrap();
    // Killed, though perhaps not yet reaped by whoever adopted it.
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat"));
    within_bound(&|| stat().map_or(true, |stat| stat.contains(") Z ")), "it is still there").await;
}

#[tokio::test]
async fn a_missing_program_is_an_error_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), "", "/run/kata-containers/x");
    config.kind = Kind::Local { program: "/nowhere".into(), args: Vec::new(), share_at: "/x".into() };
    let error = boot(config).await.err().unwrap().to_string();
    assert!(error.contains("not found at /nowhere: build or install it"), "{error}");
    assert!(!dir.path().join("vm").exists());
}
