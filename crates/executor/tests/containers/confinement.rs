//! What a process is and may do.

use bulkhead_protocol::oci;

use crate::{cases, support::*};

cases![
    users_and_groups,
    capabilities_are_exact,
    ambient_capabilities_survive_for_users,
    an_exec_gets_the_containers_capabilities,
    no_new_privileges,
    seccomp_with_and_without_privileges,
    seccomp_binds_every_exec,
    resource_limits,
    oom_score,
    environment,
    signals_and_session,
    labels_that_nothing_enforces_are_left_out,
    the_executor_cannot_be_traced,
];

/// A line of `/proc/self/status`.
fn status(spec: oci::Spec, key: &str) -> String {
    let mut spec = spec;
    process(&mut spec).Args =
        ["/bin/grep", &format!("^{key}:"), "/proc/self/status"].map(String::from).to_vec();
    succeed(spec).split_once(":").unwrap().1.trim().to_owned()
}

fn users_and_groups() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs
        .spec("id -u; id -g; id -G; touch /tmp/mine; stat -c '%u:%g' /dev/stdin -L; echo ok > /dev/stdout");
    std::os::unix::fs::chown(rootfs.at("tmp"), Some(1000), Some(1000)).unwrap();
    let user = process(&mut spec).User.mut_or_insert_default();
    (user.UID, user.GID, user.AdditionalGids) = (1000, 1001, vec![5, 2000]);
    process(&mut spec).Capabilities.clear();
    assert_eq!(succeed(spec), "1000\n1001\n1001 5 2000\n1000:0\nok\n");
    // Supplementary groups of the caller do not come along.
    assert_eq!(succeed(rootfs.spec("id -G")), "0\n");
}

const SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

fn capability_sets(spec: &oci::Spec) -> Vec<u64> {
    SETS.iter().map(|set| u64::from_str_radix(&status(spec.clone(), set), 16).unwrap()).collect()
}

fn capabilities_are_exact() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("");
    capabilities(process(&mut spec), &["CHOWN", "KILL", "NET_BIND_SERVICE"]);
    let bits = 1 | 1 << 5 | 1 << 10;
    assert_eq!(capability_sets(&spec), [0, bits, bits, bits, 0]);
    process(&mut spec).Capabilities.clear();
    assert_eq!(capability_sets(&spec), [0; 5]);
    // A user without ambient ones has none after execve.
    capabilities(process(&mut spec), &["KILL"]);
    process(&mut spec).User.mut_or_insert_default().UID = 1000;
    assert_eq!(capability_sets(&spec), [0, 0, 0, 1 << 5, 0]);
}

fn ambient_capabilities_survive_for_users() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("");
    capabilities(process(&mut spec), &["KILL", "CHOWN"]);
    let sets = process(&mut spec).Capabilities.mut_or_insert_default();
    sets.Inheritable = vec!["CAP_KILL".into()];
    sets.Ambient = vec!["CAP_KILL".into(), "CAP_CHOWN".into()];
    process(&mut spec).User.mut_or_insert_default().UID = 1000;
    let kill = 1 << 5;
    assert_eq!(capability_sets(&spec), [kill, kill, kill, kill | 1, kill], "CHOWN is not inheritable");
}

fn an_exec_gets_the_containers_capabilities() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("sleep 1000");
    capabilities(process(&mut spec), &["KILL"]);
    let (container, init) = start(spec);
    let mut process = shell("grep -E '^Cap(Eff|Bnd|Inh)' /proc/self/status | cut -f2");
    process.Capabilities.clear();
    let kill = "0000000000000020";
    assert_eq!(exec(&container, process.clone()).stdout, format!("0000000000000000\n{kill}\n{kill}\n"));
    process.Capabilities.mut_or_insert_default();
    assert_eq!(exec(&container, process).stdout, "0000000000000000\n".repeat(3));
    finish(&container, init);
}

fn no_new_privileges() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("");
    assert_eq!(status(spec.clone(), "NoNewPrivs"), "0");
    process(&mut spec).NoNewPrivileges = true;
    assert_eq!(status(spec, "NoNewPrivs"), "1");
}

fn profile(action: &str, errno: Option<u32>) -> oci::LinuxSeccomp {
    let mut rule = oci::LinuxSyscall {
        Names: ["mkdir", "mkdirat", "no_such_call"].map(String::from).to_vec(),
        Action: action.into(),
        ..Default::default()
    };
    errno.into_iter().for_each(|errno| rule.set_errnoret(errno));
    oci::LinuxSeccomp {
        DefaultAction: "SCMP_ACT_ALLOW".into(),
        Architectures: ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"].map(String::from).to_vec(),
        Syscalls: vec![rule],
        ..Default::default()
    }
}

fn seccomp_with_and_without_privileges() {
    let rootfs = Rootfs::new();
    for no_new_privileges in [true, false] {
        for (action, errno, wanted) in [
            ("SCMP_ACT_ERRNO", None, "Operation not permitted"),
            ("SCMP_ACT_ERRNO", Some(28), "No space left on device"),
            ("SCMP_ACT_KILL_PROCESS", None, "Bad system call"),
        ] {
            let mut spec = rootfs.spec("mkdir /tmp/x; true");
            process(&mut spec).NoNewPrivileges = no_new_privileges;
            linux(&mut spec).Seccomp = Some(profile(action, errno)).into();
            let output = run(spec.clone());
            assert!(output.stderr.contains(wanted), "{output:?}");
            assert_eq!(status(spec.clone(), "Seccomp"), "2");
            // The capability that installing it needs is not left over.
            assert_eq!(u64::from_str_radix(&status(spec, "CapPrm"), 16).unwrap() >> 21 & 1, 0);
        }
    }
}

fn seccomp_binds_every_exec() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("sleep 1000");
    linux(&mut spec).Seccomp = Some(profile("SCMP_ACT_ERRNO", Some(28))).into();
    let (container, init) = start(spec);
    let output = exec(&container, shell("mkdir /tmp/x"));
    assert!(output.stderr.contains("No space left on device"), "{output:?}");
    finish(&container, init);
}

fn limit(name: &str, soft: u64, hard: u64) -> oci::POSIXRlimit {
    oci::POSIXRlimit { Type: name.into(), Soft: soft, Hard: hard, ..Default::default() }
}

fn resource_limits() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -f");
    process(&mut spec).Rlimits =
        vec![limit("RLIMIT_NOFILE", 100, 200), limit("RLIMIT_CORE", 0, 0), limit("RLIMIT_FSIZE", 512, 512)];
    assert_eq!(succeed(spec), "100\n200\n0\n1\n");
}

fn oom_score() {
    let rootfs = Rootfs::new();
    let own = "/proc/self/oom_score_adj";
    let before = std::fs::read_to_string(own).unwrap();
    let spec = |score| {
        let mut spec = rootfs.spec(&format!("cat {own}"));
        process(&mut spec).OOMScoreAdj = score;
        spec
    };
    assert_eq!(succeed(spec(555)), "555\n");
    // Unset is 0, whatever the caller's own is; unless the caller may not have that either.
    let least = if std::fs::write(own, "0").is_ok() { "0\n" } else { &before };
    std::fs::write(own, "900").unwrap();
    assert_eq!(succeed(spec(0)), least);
    // Less than one's own takes a capability; without it the request is refused, and not forgotten.
    if std::fs::write(own, "-500").is_ok() {
        assert_eq!(succeed(spec(-600)), "-600\n");
    } else {
        assert_refused(spec(-600), "setting oom_score_adj (-600): Permission denied");
    }
    std::fs::write(own, before).unwrap();
}

fn environment() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("env | sort");
    process(&mut spec).Env = ["PATH=/bin", "SPACE= x ", "A=1", "A=2"].map(String::from).to_vec();
    // Left out: what the shell sets itself.
    let env = |spec| {
        let lines = succeed(spec);
        lines
            .lines()
            .filter(|l| !["PWD=", "SHLVL=", "_="].iter().any(|p| l.starts_with(p)))
            .collect::<Vec<_>>()
            .join("\n")
    };
    assert_eq!(env(spec.clone()), "A=2\nHOME=/root\nPATH=/bin\nSPACE= x ");
    process(&mut spec).User.mut_or_insert_default().UID = 1000;
    assert!(env(spec.clone()).contains("HOME=/home/me\n"));
    process(&mut spec).User.mut_or_insert_default().UID = 4242;
    assert!(env(spec.clone()).contains("HOME=/\n"));
    process(&mut spec).Env.push("HOME=/mine".into());
    assert!(env(spec).contains("HOME=/mine\n"));

    // A pipe in place of the file must not block.
    std::fs::remove_file(rootfs.at("etc/passwd")).unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        rootfs.at("etc/passwd"),
        fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    assert_eq!(succeed(rootfs.spec("echo $HOME")), "/\n");

    let mut spec = rootfs.spec("");
    process(&mut spec).Args = ["sh", "-c", "echo found"].map(String::from).to_vec();
    process(&mut spec).Env.clear();
    assert_eq!(succeed(spec), "found\n", "a default PATH");
}

fn signals_and_session() {
    let rootfs = Rootfs::new();
    let spec = rootfs.spec("");
    // The test program ignores SIGPIPE, as every Rust program does.
    assert_eq!(status(spec.clone(), "SigIgn"), "0000000000000000");
    assert_eq!(status(spec, "SigBlk"), "0000000000000000");
    assert_eq!(succeed(rootfs.spec("cut -d' ' -f5,6 /proc/self/stat")), "1 1\n", "group and session");
}

/// As a host names them by default; its virtual machines have neither the module nor the profile.
fn labels_that_nothing_enforces_are_left_out() {
    let rootfs = Rootfs::new();
    let selinux = std::path::Path::new("/sys/fs/selinux/enforce").exists();
    let label = |process: &mut oci::Process| {
        process.ApparmorProfile = "bulkhead-no-such-profile".into();
        if !selinux {
            process.SelinuxLabel = "system_u:system_r:container_t:s0".into();
        }
    };
    let mut spec = rootfs.spec("sleep 1000");
    label(process(&mut spec));
    if !selinux {
        linux(&mut spec).MountLabel = "system_u:object_r:container_file_t:s0".into();
    }
    let (container, init) = start(spec);
    let mut beside = shell("echo runs");
    label(&mut beside);
    assert_eq!(exec(&container, beside).stdout, "runs\n");
    finish(&container, init);
}

/// A container's process must not get hold of a child that is about to join it (CVE-2016-9962).
fn the_executor_cannot_be_traced() {
    let rootfs = Rootfs::new();
    let (container, init) = create(rootfs.spec("true")).unwrap();
    // Not dumpable: its files in proc belong to root alone, and reading its memory map takes a capability.
    let denied = "readlink /proc/1/exe 2>&1 || echo denied";
    let mut process = shell(denied);
    capabilities(&mut process, &[]);
    assert!(exec(&container, process).stdout.ends_with("denied\n"));
    finish(&container, init);
}
