//! Real virtual machines, under TCG, which works everywhere.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod guest;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use bulkhead_hypervisor::{Accel, AccelPolicy, AccelQuery, Endpoint, Error, Share, Vm, boot, resolve_accel};
use guest::{Parts, skip};

const BOOT: Duration = Duration::from_secs(60);

/// Waits until the console shows `line`.
async fn console_shows(vm: &dyn Vm, line: &str) {
    let start = Instant::now();
    while !vm.last_words().contains(line) {
        assert!(start.elapsed() < BOOT, "no {line:?} in:\n{}", vm.last_words());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn pids(vm: &dyn Vm) -> Vec<u32> {
    vm.helper_pids().into_iter().chain([vm.pid()]).collect()
}

/// Neither a process nor a zombie, and no file of the VM.
fn assert_nothing_left(dir: &Path, pids: &[u32]) {
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid}");
    }
    assert!(!dir.join("vm").exists(), "directory");
}

#[tokio::test]
async fn a_guest_that_powers_itself_off() {
    let Some(parts) = Parts::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = parts.config(
        dir.path(),
        "echo guest says $(/busybox cat /proc/cmdline)\necho cpus $(/busybox nproc)\n/busybox poweroff -f",
    );
    config.vcpus = 2;
    config.kernel_params = vec!["test.word=hello".into()];
    let start = Instant::now();
    let vm = boot(config).await.unwrap();
    eprintln!("QEMU runs after {:?}", start.elapsed());
    assert_eq!(vm.accel(), Accel::Tcg);
    let pids = pids(&*vm);
    let exit = vm.wait().await;
    eprintln!("powered off after {:?}", start.elapsed());
    assert_eq!(exit.code, 0, "{}", exit.last_words);
    for words in ["guest says console=ttyS0 ", "test.word=hello", "cpus 2", "QEMU: SHUTDOWN {"] {
        assert!(exit.last_words.contains(words), "no {words:?} in:\n{}", exit.last_words);
    }
    assert_eq!(vm.stop(Duration::ZERO).await.unwrap(), exit);
    assert_nothing_left(dir.path(), &pids);
}

#[tokio::test]
async fn the_vmm_has_no_rights() {
    let Some(parts) = Parts::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let vm = boot(parts.config(dir.path(), "/busybox sleep 1000")).await.unwrap();
    let proc = Path::new("/proc").join(vm.pid().to_string());
    for task in fs::read_dir(proc.join("task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>().join(" ")
        };
        let uid = field("Uid:");
        assert!(uid.split(' ').all(|id| id.parse::<u32>().unwrap() >= 0x7000_0000), "{uid}");
        for (name, value) in [
            ("Groups:", ""),
            ("CapInh:", "0000000000000000"),
            ("CapPrm:", "0000000000000000"),
            ("CapEff:", "0000000000000000"),
            ("CapAmb:", "0000000000000000"),
            ("NoNewPrivs:", "1"),
            ("Seccomp:", "2"),
        ] {
            assert_eq!(field(name), value, "{name}");
        }
    }
    assert_eq!(fs::read(proc.join("environ")).unwrap(), b"", "environment");
}

#[tokio::test]
async fn killing_asking_and_dropping_leave_nothing() {
    let Some(parts) = Parts::find() else { return };
    for how in ["killed", "asked", "dropped"] {
        let dir = tempfile::tempdir().unwrap();
        let vm = boot(parts.config(dir.path(), "/busybox sleep 1000")).await.unwrap();
        let pids = pids(&*vm);
        assert_eq!(pids.len(), 2, "QEMU and the vsock backend");
        let start = Instant::now();
        match how {
            "killed" => {
                assert!(
                    std::process::Command::new("kill")
                        .args(["-9", &vm.pid().to_string()])
                        .status()
                        .unwrap()
                        .success()
                );
                assert_eq!(vm.wait().await.code, 137);
                vm.stop(Duration::ZERO).await.unwrap();
            }
            "asked" => assert_eq!(vm.stop(Duration::ZERO).await.unwrap().code, 0),
            _ => drop(vm),
        }
        eprintln!("{how}: {:?}", start.elapsed());
        assert_nothing_left(dir.path(), &pids);
    }
}

#[tokio::test]
async fn a_backend_that_dies_ends_the_vm() {
    let Some(parts) = Parts::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let vm = boot(parts.config(dir.path(), "/busybox sleep 1000")).await.unwrap();
    let helper = vm.helper_pids()[0].to_string();
    assert!(std::process::Command::new("kill").args(["-9", &helper]).status().unwrap().success());
    let exit = vm.wait().await;
    assert!(exit.last_words.contains("the vsock backend ended with code 137"), "{}", exit.last_words);
}

#[tokio::test]
async fn a_paused_guest_stands_still() {
    let Some(parts) = Parts::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let script = "n=0; while :; do n=$((n+1)); echo tick $n; /busybox usleep 50000; done";
    let vm = boot(parts.config(dir.path(), script)).await.unwrap();
    console_shows(&*vm, "tick 1").await;
    vm.pause().await.unwrap();
    // What was on its way arrives.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = vm.last_words();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(vm.last_words(), before);
    vm.resume().await.unwrap();
    let start = Instant::now();
    while vm.last_words().lines().last().is_some_and(|line| before.ends_with(line) || !line.contains("tick"))
    {
        assert!(start.elapsed() < BOOT, "it does not go on:\n{}", vm.last_words());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    vm.stop(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_is_started_paused_waits_for_its_word() {
    let Some(parts) = Parts::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = parts.config(dir.path(), "echo I was let go; /busybox sleep 1000");
    config.paused = true;
    let vm = boot(config).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(vm.last_words(), "", "no instruction was executed");
    vm.resume().await.unwrap();
    console_shows(&*vm, "I was let go").await;
    vm.stop(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_kernel_panic_ends_the_vm_with_its_words() {
    let Some(parts) = Parts::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let vm = boot(parts.config(dir.path(), "exit 3")).await.unwrap();
    let exit = tokio::time::timeout(BOOT, vm.wait()).await.unwrap();
    assert!(exit.last_words.contains("Kernel panic - not syncing"), "{}", exit.last_words);
}

#[tokio::test]
async fn failures_are_fast_say_why_and_leave_nothing() {
    let Some(parts) = Parts::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let base = parts.config(dir.path(), "");
    let broken = dir.path().join("broken");
    fs::write(&broken, "#!/bin/sh\necho I am broken >&2\nexit 9\n").unwrap();
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let table = [
        (
            bulkhead_hypervisor::VmConfig { machine: "pdp11".into(), ..base.clone() },
            "unsupported machine type",
        ),
        (
            bulkhead_hypervisor::VmConfig { kernel: "/nowhere".into(), ..base.clone() },
            "guest kernel not found",
        ),
        (bulkhead_hypervisor::VmConfig { vmm: "/nowhere".into(), ..base.clone() }, "QEMU not found"),
        (bulkhead_hypervisor::VmConfig { vmm: broken.clone(), ..base.clone() }, "I am broken"),
        (bulkhead_hypervisor::VmConfig { backend: broken.clone(), ..base.clone() }, "I am broken"),
        (bulkhead_hypervisor::VmConfig { backend: "/nowhere".into(), ..base.clone() }, "/nowhere"),
        (
            bulkhead_hypervisor::VmConfig { netns: Some("/nowhere".into()), ..base.clone() },
            "network namespace",
        ),
        (bulkhead_hypervisor::VmConfig { vcpus: 0, ..base.clone() }, "invalid VM configuration"),
    ];
    for (config, expected) in table {
        let start = Instant::now();
        let error = boot(config).await.err().unwrap().to_string();
        eprintln!("{:?}: {error}", start.elapsed());
        assert!(error.contains(expected), "no {expected:?} in {error}");
        assert!(start.elapsed() < Duration::from_secs(3), "{error}");
        assert_nothing_left(dir.path(), &[]);
    }
}

#[tokio::test]
async fn a_boot_that_is_given_up_leaves_nothing() {
    let Some(parts) = Parts::find() else { return };
    for millis in [0, 2, 10, 30, 60] {
        let dir = tempfile::tempdir().unwrap();
        let config = parts.config(dir.path(), "/busybox sleep 1000");
        drop(tokio::time::timeout(Duration::from_millis(millis), boot(config)).await);
        assert_nothing_left(dir.path(), &[]);
        let dir = dir.path().to_string_lossy().into_owned();
        let start = Instant::now();
        while processes_with(&dir) > 0 {
            assert!(start.elapsed() < Duration::from_secs(2), "processes of {dir} are left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// How many processes have the text in their command line.
fn processes_with(text: &str) -> usize {
    let commands = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("cmdline"));
    commands.filter(|path| fs::read_to_string(path).is_ok_and(|words| words.contains(text))).count()
}

#[tokio::test]
async fn the_verdict_on_kvm_is_bounded_and_remembered() {
    let Some(parts) = Parts::find() else { return };
    if !Path::new("/dev/kvm").exists() {
        skip::<()>("no /dev/kvm");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut config = parts.config(dir.path(), "/busybox sleep 1000");
    config.accel = AccelPolicy::Auto;
    let query = AccelQuery::from(&config);
    let start = Instant::now();
    // Two at once: one boots a guest, the other waits for its outcome.
    let (one, two) = tokio::join!(resolve_accel(&query), resolve_accel(&query));
    let (one, two) = (one.unwrap(), two.unwrap());
    eprintln!("{one:?} after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert_eq!((one.accel, one.probed != two.probed), (two.accel, true));
    assert_eq!(processes_with(&dir.path().to_string_lossy()), 0);
    let start = Instant::now();
    let again = resolve_accel(&query).await.unwrap();
    assert!(!again.probed && again.reason == one.reason && start.elapsed() < Duration::from_millis(100));
    assert!(
        !fs::read_dir(dir.path().join("cache"))
            .unwrap()
            .flatten()
            .any(|entry| entry.path().ends_with("accel.new"))
    );
}

/// The product's own initramfs: the agent listens on vsock, and the shared directory is there.
#[tokio::test]
async fn the_agent_is_reached_through_vsock() {
    let Some(parts) = Parts::find() else { return };
    let Some(initramfs) = std::env::var_os("BULKHEAD_TEST_INITRAMFS") else {
        skip::<()>("BULKHEAD_TEST_INITRAMFS is not set");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    let mut config = parts.config(dir.path(), "");
    config.initramfs = initramfs.into();
    config.share = Some(Share { tag: "kataShared".into(), path: share });
    let start = Instant::now();
    let vm = boot(config).await.unwrap();
    assert_eq!(vm.helper_pids().len(), if matches!(vm.endpoint(), Endpoint::Hybrid { .. }) { 2 } else { 1 });
    let dialed = vm.endpoint().dial_within(1024, BOOT).await;
    dialed.map(drop).map_err(|error| error.with_last_words(|| vm.last_words()).to_string()).unwrap();
    eprintln!("the agent listens after {:?}", start.elapsed());
    assert!(matches!(vm.endpoint().dial(7).await, Err(Error::NotListening { port: 7 })));
    vm.stop(Duration::ZERO).await.unwrap();
}
