//! Limits, devices, freezing and figures: with cgroup v2, in a VM.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bulkhead_executor::{Container, Error, Status, UserNames};
use bulkhead_protocol::oci;

use crate::{cases, support::*};

cases![
    limits_are_set_and_updated,
    limits_that_nothing_can_exceed_are_no_obstacle,
    processes_are_in_the_cgroup_from_birth,
    a_memory_hog_is_killed,
    a_fork_bomb_is_stopped,
    a_process_too_many_is_an_error,
    devices_are_filtered,
    a_privileged_container_reaches_listed_devices_only,
    device_rules_can_be_replaced,
    a_paused_container_stands_still,
    nested_cgroups_are_killed_and_removed,
    an_exec_enters_a_container_that_manages_cgroups,
    figures,
    the_container_sees_its_own_cgroup_only,
    a_signal_reaches_every_process,
    nothing_is_left_after_a_failed_create,
    shared_pid_namespaces_are_cleaned_up_by_the_cgroup,
    a_cgroup_in_use_is_not_touched,
];

const MOUNT: &str = "/sys/fs/cgroup";

fn resources(spec: &mut oci::Spec) -> &mut oci::LinuxResources {
    linux(spec).Resources.mut_or_insert_default()
}

fn value(container: &Container, file: &str) -> String {
    let dir = Path::new(MOUNT).join(container.id());
    fs::read_to_string(dir.join(file)).unwrap_or_else(|e| panic!("{file}: {e}")).trim().to_owned()
}

fn limits_are_set_and_updated() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("sleep 1000");
    let wanted = resources(&mut spec);
    let cpu = wanted.CPU.mut_or_insert_default();
    (cpu.Shares, cpu.Quota, cpu.Period) = (1024, 50_000, 200_000);
    cpu.Cpus = "0".into();
    let memory = wanted.Memory.mut_or_insert_default();
    (memory.Limit, memory.Swap, memory.Reservation) = (64 << 20, 96 << 20, 16 << 20);
    wanted.Pids.mut_or_insert_default().Limit = 20;
    let (container, init) = start(spec);
    for (file, wanted) in [
        ("cpu.weight", "39"),
        ("cpu.max", "50000 200000"),
        ("cpuset.cpus", "0"),
        ("memory.max", "67108864"),
        ("memory.low", "16777216"),
        ("memory.swap.max", "33554432"),
        ("pids.max", "20"),
    ] {
        assert_eq!(value(&container, file), wanted, "{file}");
    }
    let mut update = oci::LinuxResources::new();
    update.CPU.mut_or_insert_default().Quota = -1;
    update.Memory.mut_or_insert_default().Limit = -1;
    update.Pids.mut_or_insert_default().Limit = 30;
    container.update(&update).unwrap();
    for (file, wanted) in [
        ("cpu.max", "max 200000"),
        ("memory.max", "max"),
        ("pids.max", "30"),
        ("cpu.weight", "39"),
        ("memory.swap.max", "33554432"),
    ] {
        assert_eq!(value(&container, file), wanted, "{file}");
    }
    let mut bad = oci::LinuxResources::new();
    bad.CPU.mut_or_insert_default().Cpus = "77".into();
    let error = container.update(&bad).unwrap_err();
    assert!(matches!(error, Error::Cgroup { .. }), "{error}");
    finish(&container, init);
}

/// As container engines and their hosts send them to every container.
fn limits_that_nothing_can_exceed_are_no_obstacle() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("sleep 1000");
    let wanted = resources(&mut spec);
    for size in ["64KB", "2MB", "1GB", "3MB"] {
        let limit = oci::LinuxHugepageLimit { Pagesize: size.into(), Limit: 4 << 20, ..Default::default() };
        wanted.HugepageLimits.push(limit);
    }
    let memory = wanted.Memory.mut_or_insert_default();
    (memory.Limit, memory.Swap, memory.Swappiness) = (64 << 20, 64 << 20, 60);
    (memory.Kernel, memory.KernelTCP, memory.DisableOOMKiller) = (32 << 20, 32 << 20, true);
    let (container, init) = start(spec);
    assert_eq!(value(&container, "memory.max"), "67108864");
    assert_eq!(value(&container, "memory.swap.max"), "0");
    // What the machine has is limited.
    assert_eq!(value(&container, "hugetlb.2MB.max"), "4194304");
    finish(&container, init);
}

fn processes_are_in_the_cgroup_from_birth() {
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("sleep 1000"));
    let exec = container.exec(shell("sleep 1000"), UserNames::default()).unwrap();
    for pid in [init.pid, exec.pid] {
        let path = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(path, format!("0::/{}\n", container.id()));
    }
    assert_eq!(container.pids().unwrap().len(), 2);
    finish(&container, init);
    wait(exec.pid);
    assert!(!Path::new(MOUNT).join(container.id()).exists());
}

fn a_memory_hog_is_killed() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("echo start; dd if=/dev/zero of=/dev/null bs=40M count=1");
    let memory = resources(&mut spec).Memory.mut_or_insert_default();
    (memory.Limit, memory.Swap) = (16 << 20, 16 << 20);
    let (container, init) = start(spec);
    let events = container.memory_events().unwrap();
    let output = collect(init);
    assert_eq!(output.code, 137, "{output:?}");
    assert!(fs::read_to_string(events).unwrap().contains("oom_kill 1"));
    assert_eq!(container.stats().unwrap().memory.unwrap().events["oom_kill"], 1);
    container.delete().unwrap();
}

fn a_fork_bomb_is_stopped() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done");
    resources(&mut spec).Pids.mut_or_insert_default().Limit = 5;
    let output = run(spec);
    assert!(output.stderr.contains("can't fork"), "{output:?}");
}

/// The container's own limit, and then that of the program that makes its processes.
fn a_process_too_many_is_an_error() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("exec sleep 1000");
    resources(&mut spec).Pids.mut_or_insert_default().Limit = 1;
    let (container, init) = start(spec);
    let error = container.exec(shell("true"), UserNames::default()).unwrap_err().to_string();
    assert!(error.contains("no further process is allowed") && error.contains("pids.max"), "{error}");
    let mut update = oci::LinuxResources::new();
    update.Pids.mut_or_insert_default().Limit = 2;
    container.update(&update).unwrap();
    assert_eq!(exec_script(&container, "echo $((6 * 7))"), "42\n");

    let few = Path::new(MOUNT).join("few");
    fs::create_dir(&few).unwrap();
    fs::write(few.join("cgroup.procs"), "0").unwrap();
    fs::write(few.join("pids.max"), fs::read_to_string(few.join("pids.current")).unwrap().trim()).unwrap();
    let made = create(rootfs.spec("true")).map(drop);
    let run = container.exec(shell("true"), UserNames::default()).map(drop);
    fs::write(Path::new(MOUNT).join("cgroup.procs"), "0").unwrap();
    fs::remove_dir(few).unwrap();
    for result in [made, run] {
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with("starting bulkhead-init: Resource temporarily unavailable"), "{error}");
    }
    assert_eq!(exec_script(&container, "echo again"), "again\n");
    finish(&container, init);
}

/// Opens of device nodes, each made by the container itself. What is allowed need not exist: only refusals are looked for.
const PROBE: &str = "mknod /tmp/mem c 1 1; mknod /tmp/odd c 240 11; mknod /tmp/zero c 1 5; mknod /tmp/disk b 7 0; \
     for d in mem odd zero disk; do (: < /tmp/$d) 2>&1 | grep -o 'Operation not permitted' \
     || echo $d opened; done; echo x > /dev/null && head -c 1 /dev/urandom | wc -c";

fn devices_are_filtered() {
    let rootfs = Rootfs::new();
    let refused = "Operation not permitted\n";
    let output = run(rootfs.spec(PROBE)).stdout;
    assert_eq!(output, format!("{refused}{refused}zero opened\n{refused}1\n"));

    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec(PROBE);
    let rule = |allow, kind: &str, major, minor, access: &str| oci::LinuxDeviceCgroup {
        Allow: allow,
        Type: kind.into(),
        Major: major,
        Minor: minor,
        Access: access.into(),
        ..Default::default()
    };
    resources(&mut spec).Devices =
        vec![rule(false, "a", -1, -1, "rwm"), rule(true, "c", 240, 11, "r"), rule(true, "c", 1, 1, "w")];
    let output = run(spec).stdout;
    assert_eq!(output, format!("{refused}odd opened\nzero opened\n{refused}1\n"));

    // A further process is bound as well.
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("sleep 1000"));
    let output = exec(&container, shell(PROBE)).stdout;
    assert!(output.starts_with(refused), "{output}");
    finish(&container, init);
}

/// With every capability and nothing masked, as Kata's hosts send a privileged one: without its device rules.
fn a_privileged_container_reaches_listed_devices_only() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec(PROBE);
    capabilities(process(&mut spec), &["SYS_ADMIN", "SYS_RAWIO", "MKNOD", "DAC_OVERRIDE", "NET_ADMIN"]);
    linux(&mut spec).MaskedPaths.clear();
    linux(&mut spec).ReadonlyPaths.clear();
    linux(&mut spec).Devices.push(oci::LinuxDevice {
        Path: "/dev/odd".into(),
        Type: "c".into(),
        Major: 240,
        Minor: 11,
        ..Default::default()
    });
    let refused = "Operation not permitted\n";
    let output = run(spec).stdout;
    assert_eq!(output, format!("{refused}odd opened\nzero opened\n{refused}1\n"));
}

fn device_rules_can_be_replaced() {
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("mknod /tmp/odd c 240 11; echo; sleep 1000"));
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    let open = "(: < /tmp/odd) 2>&1 | grep -q 'not permitted' && echo no || echo yes";
    assert_eq!(exec_script(&container, open), "no\n");
    let mut update = oci::LinuxResources::new();
    let all = |allow| oci::LinuxDeviceCgroup { Allow: allow, Access: "rwm".into(), ..Default::default() };
    update.Devices = vec![all(true)];
    container.update(&update).unwrap();
    assert_eq!(exec_script(&container, open), "yes\n");
    update.Devices = vec![all(false)];
    container.update(&update).unwrap();
    assert_eq!(exec_script(&container, open), "no\n");
    container.delete().unwrap();
    wait(init.pid);
}

fn a_paused_container_stands_still() {
    let rootfs = Rootfs::new();
    let (container, init) = start(rootfs.spec("while :; do :; done"));
    container.pause().unwrap();
    assert_eq!(container.status(), Status::Paused);
    let usage = || container.stats().unwrap().cpu.usage_ns;
    let before = usage();
    std::thread::sleep(std::time::Duration::from_millis(500));
    // A busy loop would have used nearly all of it; the kernel may still have been accounting for the last slice.
    let used = usage() - before;
    assert!(used < 200_000_000, "{used} ns");
    for (error, text) in [
        (container.pause().unwrap_err(), "is paused: cannot pause"),
        (container.exec(shell("true"), UserNames::default()).unwrap_err(), "is paused: cannot exec"),
        (container.start().unwrap_err(), "is paused: cannot start"),
    ] {
        assert!(error.to_string().contains(text), "{error}");
    }
    container.resume().unwrap();
    assert_eq!(container.status(), Status::Running);
    assert!(container.resume().is_err());
    assert_eq!(exec_script(&container, "echo alive"), "alive\n");
    // A frozen container can be killed.
    container.pause().unwrap();
    finish(&container, init);
}

/// A container that manages cgroups: its own is writable, and its processes are in one below.
fn manager(rootfs: &Rootfs) -> oci::Spec {
    let mut spec = rootfs.spec(
        "mkdir /sys/fs/cgroup/init /sys/fs/cgroup/other; echo 0 > /sys/fs/cgroup/init/cgroup.procs; \
         echo +pids > /sys/fs/cgroup/cgroup.subtree_control; sh -c 'echo 0 > /sys/fs/cgroup/other/cgroup.procs; \
         exec sleep 1000' & until grep -q . /sys/fs/cgroup/other/cgroup.procs; do :; done; echo; sleep 1000",
    );
    for mount in &mut spec.Mounts {
        if mount.destination.starts_with("/sys") {
            mount.options.retain(|o| o != "ro");
        }
    }
    spec
}

fn nested_cgroups_are_killed_and_removed() {
    let rootfs = Rootfs::new();
    let (container, init) = start(manager(&rootfs));
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    let dir = Path::new(MOUNT).join(container.id());
    assert!(dir.join("other").is_dir());
    let pids = container.pids().unwrap();
    assert!(pids.len() >= 2, "{pids:?}");
    container.delete().unwrap();
    wait(init.pid);
    assert!(!dir.exists());
}

fn an_exec_enters_a_container_that_manages_cgroups() {
    let rootfs = Rootfs::new();
    let (container, init) = start(manager(&rootfs));
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    assert_eq!(exec_script(&container, "cat /proc/self/cgroup"), "0::/init\n");
    container.delete().unwrap();
    wait(init.pid);
}

fn figures() {
    let rootfs = Rootfs::new();
    let mut spec =
        rootfs.spec("dd if=/dev/zero of=/dev/shm/x bs=1M count=8 2> /dev/null; echo; while :; do :; done");
    let cpu = resources(&mut spec).CPU.mut_or_insert_default();
    (cpu.Quota, cpu.Period) = (10_000, 50_000);
    resources(&mut spec).Memory.mut_or_insert_default().Limit = 64 << 20;
    let (container, init) = start(spec);
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let stats = container.stats().unwrap();
    assert!(stats.cpu.usage_ns > 0 && stats.cpu.usage_ns >= stats.cpu.user_ns, "{stats:?}");
    assert!(
        stats.cpu.periods > 0 && stats.cpu.throttled_periods > 0 && stats.cpu.throttled_ns > 0,
        "{stats:?}"
    );
    let memory = stats.memory.unwrap();
    assert!(memory.usage >= 8 << 20 && memory.stat["shmem"] >= 8 << 20, "{memory:?}");
    assert_eq!(memory.limit, Some(64 << 20));
    let pids = stats.pids.unwrap();
    assert!(pids.current >= 1 && pids.limit.is_none(), "{pids:?}");
    container.delete().unwrap();
    wait(init.pid);
}

fn the_container_sees_its_own_cgroup_only() {
    let rootfs = Rootfs::new();
    let script = "cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.procs | grep -c .; \
         touch /sys/fs/cgroup/x 2>&1; ls -d /sys/fs/cgroup/test-* 2> /dev/null | wc -l";
    let readonly = "touch: /sys/fs/cgroup/x: Read-only file system\n";
    let output = run(rootfs.spec(script)).stdout;
    assert!(output.starts_with("0::/\n") && output.ends_with(&format!("{readonly}0\n")), "{output}");
    // Without a namespace of its own, as Kata's hosts ask for.
    let mut spec = rootfs.spec(script);
    linux(&mut spec).Namespaces.retain(|n: &oci::LinuxNamespace| n.Type != "cgroup");
    let output = run(spec).stdout;
    assert!(output.starts_with("0::/test-") && output.ends_with(&format!("{readonly}0\n")), "{output}");
}

fn a_signal_reaches_every_process() {
    let rootfs = Rootfs::new();
    let wait_for = "echo ready; while :; do sleep 1; done";
    let (container, init) = start(rootfs.spec(&format!("trap 'echo got' USR1; {wait_for}")));
    let exec =
        container.exec(shell(&format!("trap 'exit 6' USR1; {wait_for}")), UserNames::default()).unwrap();
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "ready\n");
    read_until(&mut blocking(exec.streams.stdout.unwrap()), "ready\n");
    container.signal_all(libc::SIGUSR1).unwrap();
    assert_eq!(wait(exec.pid), 6);
    read_until(&mut stdout, "got\n");
    container.signal_all(libc::SIGKILL).unwrap();
    assert_eq!(wait(init.pid), 137);
    container.delete().unwrap();
}

fn cgroups_below(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .unwrap()
        .flatten()
        .filter(|e| e.file_type().unwrap().is_dir())
        .map(|e| e.path())
        .collect()
}

fn nothing_is_left_after_a_failed_create() {
    let rootfs = Rootfs::new();
    let before = cgroups_below(Path::new(MOUNT));
    let mut spec = rootfs.spec("true");
    linux(&mut spec).CgroupsPath = "/pods/one/two".into();
    process(&mut spec).Args = vec!["missing".into()];
    assert!(matches!(refused(spec.clone()), Error::CommandNotFound(_)));
    assert_eq!(cgroups_below(Path::new(MOUNT)), before);

    process(&mut spec).Args = vec!["true".into()];
    resources(&mut spec).CPU.mut_or_insert_default().Cpus = "77".into();
    assert_refused(spec, "cgroup file /sys/fs/cgroup/pods/one/two/cpuset.cpus");
    assert_eq!(cgroups_below(Path::new(MOUNT)), before);
}

fn shared_pid_namespaces_are_cleaned_up_by_the_cgroup() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("(setsid sleep 1000 &) ; echo; sleep 1000");
    linux(&mut spec).Namespaces.retain(|n: &oci::LinuxNamespace| n.Type != "pid");
    let (container, init) = start(spec);
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    assert!(container.pids().unwrap().len() >= 2);
    container.delete().unwrap();
    wait(init.pid);
    assert!(!Path::new(MOUNT).join(container.id()).exists());
}

fn a_cgroup_in_use_is_not_touched() {
    let rootfs = Rootfs::new();
    let in_group = |script: &str| {
        let mut spec = rootfs.spec(script);
        linux(&mut spec).CgroupsPath = "system.slice:test:shared".into();
        spec
    };
    let (first, init) = start(in_group("sleep 1000"));
    assert_refused(in_group("true"), "cgroup /sys/fs/cgroup/system.slice/test/shared is in use");
    assert_eq!(first.pids().unwrap().len(), 1);
    finish(&first, init);
    // A leftover is made anew, without its limits.
    let dir = Path::new(MOUNT).join("system.slice/test/shared");
    assert!(!dir.parent().unwrap().exists());
    fs::create_dir_all(dir.join("nested")).unwrap();
    fs::write(dir.join("cgroup.max.depth"), "3").unwrap();
    let (second, init) = start(in_group("sleep 1000"));
    assert_eq!(fs::read_to_string(dir.join("cgroup.max.depth")).unwrap(), "max\n");
    finish(&second, init);
    fs::remove_dir(dir.parent().unwrap()).unwrap();
    fs::remove_dir(dir.parent().unwrap().parent().unwrap()).unwrap();
}
