//! Runs that are there: found by their state files, owned by another process.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_hypervisor::Accel;
use bulkhead_protocol::{agent_ttrpc::AgentServiceClient, ports};
use bulkhead_sandbox::{Config, State};
use ttrpc::r#async::{Client, transport::Socket};

/// Label: the container's name.
pub(crate) const NAME: &str = "name";
/// Label: the image or root file system it was made from.
pub(crate) const IMAGE: &str = "image";
/// Label: its command.
pub(crate) const COMMAND: &str = "command";
/// Label: the directory of the run.
pub(crate) const DIR: &str = "dir";
/// Label: the root file system on the host.
pub(crate) const ROOTFS: &str = "rootfs";
/// File in the directory of the run: what the VM runs under, which is known only once it runs.
pub(crate) const ACCEL: &str = "accel";

/// How long an agent that runs may take to accept a connection, and to answer, on hardware virtualization.
const AGENT_BOUND: Duration = Duration::from_secs(60);

/// A pod of this host, whoever owns it.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    /// Its state file.
    pub(crate) state: State,
}

impl Running {
    /// A label, or nothing.
    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        self.state.labels.get(key).map(String::as_str)
    }

    /// Its name; a pod of containerd has only its id.
    pub(crate) fn name(&self) -> &str {
        self.label(NAME).unwrap_or(&self.state.id)
    }

    /// Whether `bulkhead run` made it.
    pub(crate) fn is_ours(&self) -> bool {
        self.label(NAME).is_some()
    }

    /// Whether its owner lives.
    pub(crate) fn is_alive(&self) -> bool {
        start_time(self.state.owner.pid) == Some(self.state.owner.start_time)
    }

    /// What its VM runs under, as far as somebody has written it down.
    pub(crate) fn accel(&self) -> Option<String> {
        std::fs::read_to_string(Path::new(self.label(DIR)?).join(ACCEL)).ok()
    }

    /// The bundle's directory.
    pub(crate) fn bundle(&self) -> Option<PathBuf> {
        self.label(DIR).map(|dir| Path::new(dir).join("bundle"))
    }

    /// How long its agent may take to accept a connection, and to answer an ordinary call.
    pub(crate) fn bound(&self) -> Duration {
        bound(self.accel().as_deref())
    }

    /// A connection to its agent.
    pub(crate) async fn agent(&self) -> Result<AgentServiceClient> {
        let connection = self.state.endpoint.dial_within(ports::AGENT, self.bound()).await;
        let connection = connection.with_context(|| format!("reach the agent of {}", self.name()))?;
        Ok(AgentServiceClient::new(Client::new(Socket::new(connection))))
    }
}

/// For calls that are answered within [`Running::bound`].
pub(crate) fn bounded(bound: Duration) -> ttrpc::context::Context {
    ttrpc::context::with_timeout(i64::try_from(bound.as_nanos()).unwrap_or(i64::MAX))
}

/// An accelerator that nobody has written down is no reason to wait longer.
fn bound(accel: Option<&str>) -> Duration {
    if accel == Some("tcg") { Accel::Tcg.scale(AGENT_BOUND) } else { AGENT_BOUND }
}

/// No bound: for calls that wait for the container.
pub(crate) fn unbounded() -> ttrpc::context::Context {
    ttrpc::context::Context::default()
}

/// Every pod of this host, oldest first.
pub(crate) fn all(config: &Config) -> Result<Vec<Running>> {
    let mut states = bulkhead_sandbox::list(&config.state_root).context("list the sandboxes")?;
    states.sort_by(|one, other| (one.created, &one.id).cmp(&(other.created, &other.id)));
    Ok(states.into_iter().map(|state| Running { state }).collect())
}

/// The run of that name or id, alive or not. One of containerd is not ours to touch.
pub(crate) fn find(config: &Config, name: &str) -> Result<Option<Running>> {
    select(all(config)?, name)
}

/// The live run of that name or id.
pub(crate) fn find_alive(config: &Config, name: &str) -> Result<Running> {
    let Some(running) = find(config, name)? else {
        bail!("no run is named {name}; `bulkhead ps` lists them")
    };
    ensure!(
        running.is_alive(),
        "{name} is dead, its owner was killed; remove what it left with `bulkhead rm {name}`"
    );
    Ok(running)
}

fn select(all: Vec<Running>, name: &str) -> Result<Option<Running>> {
    let mut matching: Vec<Running> =
        all.into_iter().filter(|running| running.name() == name || running.state.id == name).collect();
    // A name may be another run's id, and what a dead run left may bear the name of a live one.
    matching.sort_by_key(|running| (!running.is_alive(), running.name() != name));
    let Some(first) = matching.into_iter().next() else { return Ok(None) };
    ensure!(first.is_ours(), "{name} belongs to containerd; use `ctr task` for it");
    Ok(Some(first))
}

/// Field 22 of `/proc/<pid>/stat`, which tells a process from a later one with its pid.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may itself contain some.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    // A dead process that nobody has waited for holds nothing any more.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bulkhead_hypervisor::Endpoint;

    use super::*;

    fn running(id: &str, name: Option<&str>, alive: bool) -> Running {
        let start_time = start_time(std::process::id()).unwrap();
        let owner =
            serde_json::json!({"pid": std::process::id(), "start_time": start_time + u64::from(!alive)});
        let mut labels = BTreeMap::new();
        labels.extend(name.map(|name| (NAME.to_owned(), name.to_owned())));
        let state = State {
            version: 1,
            id: id.to_owned(),
            owner: serde_json::from_value(owner).unwrap(),
            processes: Vec::new(),
            endpoint: Endpoint::Unix { path: "/x".into() },
            containers: Vec::new(),
            labels,
            created: 1,
        };
        Running { state }
    }

    #[test]
    fn names_ids_and_strangers() {
        let all = vec![
            running("id1", Some("web"), false),
            running("id2", Some("web"), true),
            running("web2", Some("id1"), true),
            running("pod", None, true),
        ];
        let id = |name: &str| select(all.clone(), name).map(|found| found.map(|running| running.state.id));
        assert_eq!(id("web").unwrap().unwrap(), "id2");
        assert_eq!(id("id1").unwrap().unwrap(), "web2");
        assert_eq!(id("nothing").unwrap(), None);
        assert!(id("pod").unwrap_err().to_string().contains("containerd"));
        assert!(all[1].is_alive() && !all[0].is_alive());
    }

    #[test]
    fn who_is_slow_gets_more_time() {
        for (accel, longer) in
            [(Some("tcg"), true), (Some("kvm"), false), (Some("none"), false), (None, false)]
        {
            assert_eq!(bound(accel) > AGENT_BOUND, longer, "{accel:?}");
        }
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        assert!(start_time(std::process::id()).unwrap() > 0);
        assert_eq!(start_time(u32::MAX), None);
    }
}
