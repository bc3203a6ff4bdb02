//! The process: its command, who it is, and what it may do.

use bulkhead_protocol::oci;
use serde::{Deserialize, Serialize};

use super::{Capabilities, Host, absolute, no_nul};
use crate::{Error, seccomp};

/// Users and groups to look up in the container's own `/etc/passwd` and `/etc/group`. A number that is no name there
/// stands for itself; what is empty leaves the spec's numbers. A user found by name brings its group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNames {
    /// The user.
    pub user: String,
    /// The group.
    pub group: String,
    /// The supplementary groups.
    pub additional_groups: Vec<String>,
}

/// The process to become.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ProcessPlan {
    /// The command; never empty.
    pub(crate) args: Vec<String>,
    /// `KEY=value`, each key once.
    pub(crate) env: Vec<String>,
    /// The working directory.
    pub(crate) cwd: String,
    /// User.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Names that stand above the three numbers.
    pub(crate) names: UserNames,
    /// File mode creation mask.
    pub(crate) umask: u32,
    /// Capabilities, reduced to what can be granted.
    pub(crate) capabilities: Capabilities,
    /// Resource limits: number, soft, hard.
    pub(crate) rlimits: Vec<(u32, u64, u64)>,
    /// execve brings no privileges.
    pub(crate) no_new_privileges: bool,
    /// For the out-of-memory killer. The wire does not tell 0 from unset (proto3), so that both are 0: unset would leave
    /// the caller's own score, which protects it and not its containers.
    pub(crate) oom_score_adj: i32,
    /// AppArmor profile, which the kernel has.
    pub(crate) apparmor: Option<String>,
    /// SELinux label, where that is active.
    pub(crate) selinux: Option<String>,
    /// The system call filter.
    pub(crate) seccomp: Option<seccomp::Filter>,
    /// The process has a terminal.
    pub(crate) terminal: bool,
    /// Its size: rows and columns.
    pub(crate) console_size: Option<(u16, u16)>,
}

/// In the order of their numbers.
const RLIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

impl ProcessPlan {
    /// What `process` asks for, under the container's system call filter.
    pub(super) fn new(
        process: &oci::Process,
        seccomp: Option<seccomp::Filter>,
        host: Host,
    ) -> Result<ProcessPlan, Error> {
        if process.Args.first().is_none_or(String::is_empty) {
            return Err(Error::Invalid("the process has no command".to_owned()));
        }
        process.Args.iter().try_for_each(|arg| no_nul("argument", arg))?;
        let user = process.User.clone().unwrap_or_default();
        Ok(ProcessPlan {
            args: process.Args.clone(),
            env: environment(&process.Env)?,
            cwd: absolute("working directory", if process.Cwd.is_empty() { "/" } else { &process.Cwd })?,
            uid: user.UID,
            gid: user.GID,
            groups: user.AdditionalGids,
            names: UserNames::default(),
            umask: 0o022,
            capabilities: Capabilities::new(
                &process.Capabilities.clone().unwrap_or_default(),
                host.capabilities,
            )?,
            rlimits: rlimits(&process.Rlimits)?,
            no_new_privileges: process.NoNewPrivileges,
            oom_score_adj: oom_score_adj(process.OOMScoreAdj)?,
            apparmor: label(&process.ApparmorProfile, "AppArmor profile")?,
            selinux: label(&process.SelinuxLabel, "SELinux label")?,
            seccomp,
            terminal: process.Terminal,
            console_size: process.ConsoleSize.as_ref().and_then(console_size),
        })
    }
}

/// Of a key that appears twice, the last one counts.
fn environment(env: &[String]) -> Result<Vec<String>, Error> {
    let mut result: Vec<String> = Vec::with_capacity(env.len());
    for entry in env {
        no_nul("environment variable", entry)?;
        let key = match entry.find('=') {
            Some(end) if end > 0 => &entry[..=end],
            _ => return Err(Error::Invalid(format!("environment variable {entry:?} is not KEY=value"))),
        };
        result.retain(|other| !other.starts_with(key));
        result.push(entry.clone());
    }
    Ok(result)
}

fn rlimits(list: &[oci::POSIXRlimit]) -> Result<Vec<(u32, u64, u64)>, Error> {
    let mut limits: Vec<(u32, u64, u64)> = Vec::new();
    for limit in list {
        let name = limit.Type.strip_prefix("RLIMIT_").unwrap_or(&limit.Type);
        let number = (0u32..)
            .zip(RLIMITS)
            .find(|(_, n)| *n == name)
            .map(|(number, _)| number)
            .ok_or_else(|| Error::Invalid(format!("unknown resource limit {:?}", limit.Type)))?;
        if limits.iter().any(|l| l.0 == number) {
            return Err(Error::Invalid(format!("resource limit {} is given twice", limit.Type)));
        }
        if limit.Soft > limit.Hard {
            return Err(Error::Invalid(format!(
                "resource limit {}: soft {} is above hard {}",
                limit.Type, limit.Soft, limit.Hard
            )));
        }
        limits.push((number, limit.Soft, limit.Hard));
    }
    Ok(limits)
}

/// The name of a resource limit, for messages.
pub(crate) fn rlimit_name(number: u32) -> String {
    RLIMITS.get(number as usize).map_or_else(|| number.to_string(), |name| format!("RLIMIT_{name}"))
}

fn oom_score_adj(value: i64) -> Result<i32, Error> {
    i32::try_from(value)
        .ok()
        .filter(|v| (-1000..=1000).contains(v))
        .ok_or_else(|| Error::Invalid(format!("oom_score_adj {value} is not within -1000..=1000")))
}

fn label(text: &str, what: &str) -> Result<Option<String>, Error> {
    no_nul(what, text)?;
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// Zero by zero is no size.
fn console_size(size: &oci::Box) -> Option<(u16, u16)> {
    let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    (size.Height != 0 || size.Width != 0).then(|| (clamp(size.Height), clamp(size.Width)))
}

#[cfg(test)]
mod tests {
    use super::{
        super::test_spec::{HOST, minimal},
        *,
    };

    fn plan(change: impl FnOnce(&mut oci::Process)) -> Result<ProcessPlan, Error> {
        let spec = minimal();
        let mut process = spec.Process.clone().unwrap();
        change(&mut process);
        ProcessPlan::new(&process, None, HOST)
    }

    #[test]
    fn defaults_are_safe() {
        let plan = plan(|p| p.Cwd.clear()).unwrap();
        assert_eq!((plan.cwd.as_str(), plan.umask, plan.uid), ("/", 0o022, 0));
        assert_eq!(plan.capabilities, Capabilities::default());
        assert!(plan.groups.is_empty() && plan.seccomp.is_none() && !plan.terminal);
    }

    #[test]
    fn values_are_taken_over() {
        let plan = plan(|p| {
            p.User.mut_or_insert_default().AdditionalGids = vec![5, 6];
            p.Rlimits.push(oci::POSIXRlimit {
                Type: "RLIMIT_NOFILE".into(),
                Soft: 1,
                Hard: 2,
                ..Default::default()
            });
            p.OOMScoreAdj = -1000;
            p.Terminal = true;
            p.ConsoleSize = Some(oci::Box { Height: 24, Width: 70000, ..Default::default() }).into();
            p.Env = ["A=1", "B=2", "A=3=4"].map(String::from).to_vec();
        })
        .unwrap();
        assert_eq!(plan.groups, [5, 6]);
        assert_eq!(plan.rlimits, [(7, 1, 2)]);
        assert_eq!(plan.oom_score_adj, -1000);
        assert_eq!(plan.console_size, Some((24, u16::MAX)));
        assert_eq!(plan.env, ["B=2", "A=3=4"]);
        assert_eq!(rlimit_name(7), "RLIMIT_NOFILE");
    }

    #[test]
    fn bad_values_are_refused() {
        let limit = |name: &str, soft, hard| oci::POSIXRlimit {
            Type: name.into(),
            Soft: soft,
            Hard: hard,
            ..Default::default()
        };
        for (error, text) in [
            (plan(|p| p.Args.clear()), "no command"),
            (plan(|p| p.Args[0].clear()), "no command"),
            (plan(|p| p.Args.push("a\0b".into())), "NUL"),
            (plan(|p| p.Env.push("novalue".into())), "KEY=value"),
            (plan(|p| p.Env.push("=x".into())), "KEY=value"),
            (plan(|p| p.Cwd = "relative".into()), "not absolute"),
            (plan(|p| p.Cwd = "/a/../../b".into()), "\"..\""),
            (plan(|p| p.Rlimits.push(limit("RLIMIT_LUCK", 0, 0))), "unknown resource limit"),
            (plan(|p| p.Rlimits.push(limit("RLIMIT_CPU", 2, 1))), "above hard"),
            (plan(|p| p.Rlimits = vec![limit("RLIMIT_CPU", 1, 1); 2]), "twice"),
            (plan(|p| p.OOMScoreAdj = 1001), "oom_score_adj"),
            (plan(|p| p.ApparmorProfile = "a\0b".into()), "NUL"),
            (plan(|p| p.SelinuxLabel = "a\0b".into()), "NUL"),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
