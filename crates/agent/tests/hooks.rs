//! Hooks of the spec and of the guest, run by the agent: their order and place, and what becomes of their failures.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "each file of tests uses a part")]
mod support;

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_protocol::{agent::*, oci, status::Kind};
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

/// A script that is run as a hook.
fn script(script: &str) -> oci::Hook {
    oci::Hook {
        Path: "/bin/busybox".into(),
        Args: ["sh", "-c", script].map(String::from).to_vec(),
        Env: vec!["PATH=/bin".into()],
        ..Default::default()
    }
}

/// Directories of the guest's hooks, and the file that they write to.
struct GuestHooks {
    directory: tempfile::TempDir,
}

impl GuestHooks {
    fn new() -> GuestHooks {
        GuestHooks { directory: tempfile::tempdir().unwrap() }
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    fn add(&self, kind: &str, name: &str, script: &str) {
        let file = self.directory.path().join(kind).join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, format!("#!/bin/busybox sh\nexec >> {}\n{script}\n", self.log().display()))
            .unwrap();
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    async fn create_sandbox(&self, agent: &Agent) {
        let guest_hook_path = self.directory.path().to_str().unwrap().into();
        let request = CreateSandboxRequest { guest_hook_path, ..Default::default() };
        agent.client.create_sandbox(context(), &request).await.unwrap();
    }
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn the_guests_hooks_run_behind_the_specs_in_order_and_in_its_namespaces() {
    let agent = agent_or_skip!();
    let hooks = GuestHooks::new();
    hooks.add("prestart", "20-b", "echo guest-b $1; readlink /proc/self/ns/mnt");
    hooks.add("prestart", "10-a", "echo guest-a $1");
    hooks.add("poststart", "hook", "echo guest $1");
    hooks.add("poststop", "hook", "echo guest $1; cat; echo");
    hooks.create_sandbox(&agent).await;
    // Looked at once: what comes later is not run.
    hooks.add("prestart", "30-c", "echo late");
    let mut spec = agent.spec(&["sleep", "1000"]);
    let own = |kind: &str| vec![script(&format!("echo own {kind} >> {}", hooks.log().display()))];
    let list = spec.Hooks.mut_or_insert_default();
    (list.Prestart, list.Poststart, list.Poststop) = (own("prestart"), own("poststart"), own("poststop"));
    agent.create("c1", spec).await.unwrap();
    let namespace = std::fs::read_link(format!("/proc/{}/ns/mnt", agent.pid())).unwrap();
    let namespace = namespace.to_str().unwrap();
    assert_eq!(lines(&hooks.log()), ["own prestart", "guest-a prestart", "guest-b prestart", namespace]);
    agent.start_container("c1").await.unwrap();
    assert_eq!(lines(&hooks.log())[4..], ["own poststart", "guest poststart"]);
    agent.remove("c1").await.unwrap();
    let log = lines(&hooks.log());
    assert_eq!(log[6..8], ["own poststop", "guest poststop"]);
    assert!(log[8].contains("\"id\":\"c1\"") && log[8].contains("\"status\":\"stopped\""), "{}", log[8]);
    assert_eq!(log.len(), 9);
}

#[tokio::test]
async fn a_guest_hook_path_must_be_a_directory() {
    let agent = agent_or_skip!();
    for path in ["relative", "/etc/passwd", "/nul\0"] {
        let request = CreateSandboxRequest { guest_hook_path: path.into(), ..Default::default() };
        failed(agent.client.create_sandbox(context(), &request).await, Kind::InvalidArgument);
    }
    let hooks = GuestHooks::new();
    // Without a directory of any kind.
    hooks.create_sandbox(&agent).await;
    agent.run("c1", &["true"]).await;
    assert_eq!(agent.wait("c1", "").await.unwrap(), 0);
}

#[tokio::test]
async fn a_guest_without_the_directory_of_hooks_has_none() {
    let agent = agent_or_skip!();
    let request = CreateSandboxRequest { guest_hook_path: "/no/such/directory".into(), ..Default::default() };
    agent.client.create_sandbox(context(), &request).await.unwrap();
    agent.run("c1", &["true"]).await;
    assert_eq!(agent.wait("c1", "").await.unwrap(), 0);
}

#[tokio::test]
async fn a_failing_hook_fails_its_request_and_leaves_nothing() {
    let agent = agent_or_skip!();
    let volume = agent.rootfs().parent().unwrap().join("volume");
    let storage = Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        mount_point: volume.to_str().unwrap().into(),
        ..Default::default()
    };
    type List = fn(&mut oci::Hooks) -> &mut Vec<oci::Hook>;
    let lists: [(&str, List); 3] = [
        ("prestart", |hooks| &mut hooks.Prestart),
        ("createRuntime", |hooks| &mut hooks.CreateRuntime),
        ("createContainer", |hooks| &mut hooks.CreateContainer),
    ];
    for (kind, list) in lists {
        let mut spec = agent.spec(&["true"]);
        *list(spec.Hooks.mut_or_insert_default()) = vec![script("echo no >&2; exit 4")];
        let request = CreateContainerRequest {
            container_id: "c1".into(),
            OCI: Some(spec).into(),
            storages: vec![storage.clone()],
            ..Default::default()
        };
        let text = failed(agent.client.create_container(context(), &request).await, Kind::Internal);
        assert_eq!(text, format!("{kind} hook /bin/busybox: exit code 4: no"));
        failed(agent.wait("c1", "").await, Kind::InvalidArgument);
    }
    // The reaper and the spawn race for a program that is not there.
    for _ in 0..20 {
        let mut spec = agent.spec(&["true"]);
        let missing = oci::Hook { Path: "/no/such/hook".into(), ..Default::default() };
        spec.Hooks.mut_or_insert_default().Prestart = vec![missing];
        let text = failed(agent.create("c1", spec).await, Kind::Internal);
        assert!(text.contains("/no/such/hook") && text.contains("No such file"), "{text}");
    }
    let mut spec = agent.spec(&["true"]);
    spec.Hooks.mut_or_insert_default().StartContainer = vec![script("exit 4")];
    agent.create("c1", spec).await.unwrap();
    failed(agent.start_container("c1").await, Kind::Internal);
    failed(agent.start_container("c1").await, Kind::FailedPrecondition);
    assert_eq!(agent.wait("c1", "").await.unwrap(), 1);
    agent.remove("c1").await.unwrap();
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid())).unwrap();
    assert_eq!(children, "");
}

#[tokio::test]
async fn many_hooks_at_once_lose_no_exit() {
    let agent = Arc::new(agent_or_skip!());
    let lives: Vec<_> = (0..20)
        .map(|n| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move {
                let id = format!("container{n}");
                let mut spec = agent.spec(&["sh", "-c", "exit 5"]);
                let hooks = spec.Hooks.mut_or_insert_default();
                // Half of them run in the agent, half in the container.
                hooks.CreateRuntime = vec![script("exit 0"); 2];
                hooks.CreateContainer = vec![script("exit 0"); 2];
                hooks.Poststop = vec![script("exit 0")];
                agent.create(&id, spec).await.unwrap();
                agent.start_container(&id).await.unwrap();
                assert_eq!(agent.wait(&id, "").await.unwrap(), 5);
                agent.remove(&id).await.unwrap();
            })
        })
        .collect();
    for life in lives {
        life.await.unwrap();
    }
}
