//! The OCI configuration of a container that `bulkhead run` starts, and of a process that `bulkhead exec` adds.
//!
//! What nobody asked for is as with docker: its capabilities, its masked and read-only paths, its mounts. What the image
//! says comes next, what the command line says last. Everything here is a function of values.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use oci_spec::runtime as oci;
use serde_json::json;

use crate::{
    archive::Execution,
    limits::{Cpus, Memory},
    user::User,
    volume::Volume,
};

/// The executor's default too, for an environment that has none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What the command line says about a process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    /// `-e`, in order.
    pub(crate) env: Vec<String>,
    /// `-w`.
    pub(crate) cwd: Option<String>,
    /// The command; replaces the image's `Cmd`.
    pub(crate) command: Vec<String>,
    /// `-t`.
    pub(crate) terminal: bool,
    /// The terminal's rows and columns, when it is known.
    pub(crate) size: Option<(u16, u16)>,
}

/// Everything a container's configuration is made from.
#[derive(Debug)]
pub(crate) struct Container<'a> {
    pub(crate) hostname: &'a str,
    pub(crate) rootfs: &'a Path,
    pub(crate) execution: &'a Execution,
    pub(crate) overrides: &'a Overrides,
    pub(crate) user: &'a User,
    pub(crate) volumes: &'a [Volume],
    pub(crate) memory: Option<Memory>,
    pub(crate) cpus: Option<Cpus>,
}

/// The command that an image and a command line make together.
pub(crate) fn command(execution: &Execution, command: &[String]) -> Result<Vec<String>> {
    let rest = if command.is_empty() { &execution.cmd } else { command };
    let args: Vec<String> = execution.entrypoint.iter().chain(rest).cloned().collect();
    ensure!(!args.is_empty(), "no command: the image names none, so give one after --");
    Ok(args)
}

/// Where the command runs.
pub(crate) fn working_dir<'a>(execution: &'a Execution, overrides: &'a Overrides) -> &'a str {
    match overrides.cwd.as_deref() {
        Some(cwd) => cwd,
        None if execution.working_dir.is_empty() => "/",
        None => &execution.working_dir,
    }
}

/// Where a command that is a bare name is looked for.
pub(crate) fn search_path(execution: &Execution, overrides: &Overrides) -> String {
    let mut env = Vec::new();
    merge(&mut env, &execution.env);
    merge(&mut env, &overrides.env);
    env.iter().find_map(|setting| setting.strip_prefix("PATH=")).unwrap_or(PATH).to_owned()
}

/// The OCI configuration of a container.
pub(crate) fn container(from: &Container<'_>) -> Result<oci::Spec> {
    // The sandbox takes out what the VM stands for; a namespace that is left is made anew.
    let namespaces = ["pid", "ipc", "uts", "mount", "network", "cgroup"].map(|kind| json!({"type": kind}));
    let document = json!({
        "ociVersion": "1.0.2",
        "hostname": from.hostname,
        "root": {"path": from.rootfs, "readonly": false},
        "process": process(from)?,
        "mounts": mounts(from.volumes),
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "resources": resources(from.memory, from.cpus),
        },
    });
    serde_json::from_value(document).context("the container's configuration")
}

fn process(from: &Container<'_>) -> Result<serde_json::Value> {
    let (user, overrides) = (from.user, from.overrides);
    let cwd = working_dir(from.execution, overrides);
    ensure!(cwd.starts_with('/'), "the working directory {cwd:?} must be absolute");
    // As execve leaves them: who is not root starts with none, but can get them from a set-id program.
    let held: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
    let mut process = json!({
        "terminal": overrides.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": command(from.execution, &overrides.command)?,
        "env": environment(from),
        "cwd": cwd,
        "capabilities": {"bounding": CAPABILITIES, "effective": held, "permitted": held, "inheritable": [], "ambient": []},
        "noNewPrivileges": false,
    });
    if let Some((rows, columns)) = overrides.size {
        process["consoleSize"] = json!({"height": rows, "width": columns});
    }
    Ok(process)
}

fn environment(from: &Container<'_>) -> Vec<String> {
    let mut env = vec![format!("PATH={PATH}"), format!("HOSTNAME={}", from.hostname)];
    if from.overrides.terminal {
        env.push("TERM=xterm".to_owned());
    }
    merge(&mut env, &from.execution.env);
    merge(&mut env, &from.overrides.env);
    set_home(&mut env, &from.user.home);
    env
}

/// Applies settings over settings, each in its place; the last one of a name wins.
fn merge(env: &mut Vec<String>, settings: &[String]) {
    let name = |setting: &str| setting.split('=').next().unwrap_or_default().to_owned();
    for setting in settings {
        match env.iter_mut().find(|known| name(known) == name(setting)) {
            Some(known) => known.clone_from(setting),
            None => env.push(setting.clone()),
        }
    }
}

fn set_home(env: &mut Vec<String>, home: &str) {
    if !env.iter().any(|setting| setting.starts_with("HOME=")) {
        env.push(format!("HOME={home}"));
    }
}

fn mounts(volumes: &[Volume]) -> serde_json::Value {
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
    ];
    mounts.extend(volumes.iter().map(|volume| {
        let access = if volume.read_only { "ro" } else { "rw" };
        json!({"destination": volume.guest, "type": "bind", "source": volume.host, "options": ["rbind", "rprivate", access]})
    }));
    mounts.into()
}

fn resources(memory: Option<Memory>, cpus: Option<Cpus>) -> serde_json::Value {
    let allow = |kind: &str, major: i64, minor: Option<i64>, access: &str| json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": access});
    let mut resources = json!({"devices": [
        {"allow": false, "access": "rwm"},
        // Making nodes is harmless; using one needs a rule of its own.
        {"allow": true, "type": "c", "access": "m"},
        {"allow": true, "type": "b", "access": "m"},
        allow("c", 1, Some(3), "rwm"), // null
        allow("c", 1, Some(5), "rwm"), // zero
        allow("c", 1, Some(7), "rwm"), // full
        allow("c", 1, Some(8), "rwm"), // random
        allow("c", 1, Some(9), "rwm"), // urandom
        allow("c", 5, Some(0), "rwm"), // tty
        allow("c", 5, Some(1), "rwm"), // console
        allow("c", 5, Some(2), "rwm"), // ptmx
        allow("c", 136, None, "rwm"), // pts
    ]});
    if let Some(memory) = memory {
        resources["memory"] = json!({"limit": memory.bytes});
    }
    if let Some(cpus) = cpus {
        resources["cpu"] = json!({"quota": cpus.quota(), "period": cpus.period()});
    }
    resources
}

/// A further process in a container that was made from `spec`; `user` when another one was asked for.
pub(crate) fn exec(spec: &oci::Spec, overrides: &Overrides, user: Option<&User>) -> Result<oci::Process> {
    let base = spec.process().as_ref().context("the container's configuration has no process")?;
    let mut document = serde_json::to_value(base)?;
    let mut env = base.env().clone().unwrap_or_default();
    if overrides.terminal {
        merge(&mut env, &["TERM=xterm".to_owned()]);
    }
    if let Some(user) = user {
        env.retain(|setting| !setting.starts_with("HOME="));
        let held: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
        document["user"] = json!({"uid": user.uid, "gid": user.gid, "additionalGids": user.groups});
        document["capabilities"]["effective"] = json!(held);
        document["capabilities"]["permitted"] = json!(held);
    }
    merge(&mut env, &overrides.env);
    set_home(&mut env, user.map_or("/", |user| &user.home));
    document["env"] = json!(env);
    document["args"] = json!(overrides.command);
    document["terminal"] = json!(overrides.terminal);
    document["consoleSize"] =
        overrides.size.map_or(json!(null), |(rows, columns)| json!({"height": rows, "width": columns}));
    if let Some(cwd) = &overrides.cwd {
        ensure!(cwd.starts_with('/'), "the working directory {cwd:?} must be absolute");
        document["cwd"] = json!(cwd);
    }
    serde_json::from_value(document).context("the process' configuration")
}

/// `-e K=V`, and `-e K` for what the caller's environment says, which may be nothing.
pub(crate) fn settings(texts: &[String], environment: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let setting = |text: &String| {
        if text.contains('=') {
            Some(text.clone())
        } else {
            environment(text).map(|value| format!("{text}={value}"))
        }
    };
    texts.iter().filter_map(setting).collect()
}

/// Accepts what can be given to `-e`.
pub(crate) fn check_setting(text: &str) -> Result<String> {
    ensure!(
        !text.is_empty() && !text.starts_with('='),
        "an environment setting is NAME=VALUE, or NAME to pass it on"
    );
    Ok(text.to_owned())
}
