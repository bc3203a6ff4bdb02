//! How containerd starts, finds and gives up a shim, without any VM.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod support;

use containerd_shim_protos::{
    api::{ConnectRequest, CreateTaskRequest, DeleteResponse, ShutdownRequest, StateRequest},
    bootstrap_api::{BootstrapParams, BootstrapResult},
};
use protobuf::Message;
use rustix::process::{Signal, kill_process, test_kill_process};
use serde_json::json;
use std::{fs, os::unix::fs::PermissionsExt};
use support::{Containerd, Shim, code, context, ended, skip, spec, text};

/// A configuration with which no VM can be made.
const NO_KERNEL: &str =
    "[hypervisor.qemu]\nkernel = \"/nonexistent/vmlinuz\"\ninitrd = \"/nonexistent/initramfs.img\"\n";

fn shutdown(id: &str) -> ShutdownRequest {
    ShutdownRequest { id: id.into(), ..Default::default() }
}

#[tokio::test]
async fn start_prints_the_address_and_nothing_else() {
    if skip() {
        return;
    }
    let containerd = Containerd::new("").await;
    let bundle = containerd.make_bundle("one", &spec(&["true"], json!({})));
    let shim = containerd.start("one").await;
    assert_eq!(fs::metadata(&shim.path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::read_to_string(bundle.join("address")).unwrap(),
        format!("unix://{}", shim.path.display())
    );

    let pid = containerd.server_pid("one");
    let answer = shim
        .tasks
        .connect(context(), &ConnectRequest { id: "one".into(), ..Default::default() })
        .await
        .unwrap();
    assert_eq!(i32::try_from(answer.shim_pid).unwrap(), pid.as_raw_nonzero().get());
    // A group of its own: what containerd's helper is sent does not reach it.
    assert_ne!(rustix::process::getpgid(Some(pid)).unwrap(), rustix::process::getpgid(None).unwrap());
    kill_process(pid, Signal::TERM).unwrap();
    shim.tasks.connect(context(), &ConnectRequest::default()).await.expect("SIGTERM is ignored");

    shim.tasks.shutdown(context(), &shutdown("one")).await.unwrap();
    assert!(!shim.path.exists(), "the socket is gone before the answer");
    ended(pid).await;
}

#[tokio::test]
async fn both_versions_of_the_service_are_served() {
    if skip() {
        return;
    }
    let containerd = Containerd::new("").await;
    containerd.make_bundle("one", &spec(&["true"], json!({})));
    let shim = containerd.start("one").await;
    for (service, want) in [
        ("containerd.task.v2.Task", ttrpc::Code::NOT_FOUND),
        ("containerd.task.v3.Task", ttrpc::Code::NOT_FOUND),
        ("containerd.task.v4.Task", ttrpc::Code::INVALID_ARGUMENT),
    ] {
        let request = ttrpc::Request {
            service: service.into(),
            method: "State".into(),
            payload: StateRequest { id: "other".into(), ..Default::default() }.write_to_bytes().unwrap(),
            ..Default::default()
        };
        assert_eq!(code(shim.client.request(request).await), want, "{service}");
    }
    shim.tasks.shutdown(context(), &shutdown("one")).await.unwrap();
}

#[tokio::test]
async fn members_of_a_pod_get_its_server() {
    if skip() {
        return;
    }
    let containerd = Containerd::new("").await;
    let member =
        json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"});
    containerd.make_bundle("pod", &spec(&["true"], json!({"io.kubernetes.cri.container-type": "sandbox"})));
    let bundle = containerd.make_bundle("app", &spec(&["true"], member));

    let error = containerd.start_with("app", b"").unwrap_err();
    assert!(error.contains("belongs to the pod pod, whose shim does not listen"), "{error}");

    let shim = containerd.start("pod").await;
    let address = String::from_utf8(containerd.start_with("app", b"").unwrap()).unwrap();
    assert_eq!(address, format!("unix://{}", shim.path.display()));
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    assert!(!bundle.join("shim.pid").exists(), "no further server was made");

    // The end of a member's creation is no reason for the pod's server to go.
    let create =
        CreateTaskRequest { id: "app".into(), bundle: bundle.display().to_string(), ..Default::default() };
    let outcome = shim.tasks.create(context(), &create).await;
    assert_eq!(code(outcome), ttrpc::Code::FAILED_PRECONDITION, "the pod has no VM yet");
    let output = containerd.delete("app");
    assert!(output.status.success(), "{output:?}");
    assert!(test_kill_process(containerd.server_pid("pod")).is_ok());
    shim.tasks.shutdown(context(), &shutdown("pod")).await.unwrap();
    ended(containerd.server_pid("pod")).await;
}

#[tokio::test]
async fn who_asks_in_protobuf_is_answered_in_protobuf() {
    if skip() {
        return;
    }
    let containerd = Containerd::new("").await;
    containerd.make_bundle("one", &spec(&["true"], json!({})));
    let directory = containerd.path().join("s");
    let mut params = BootstrapParams {
        instance_id: "one".into(),
        namespace: support::NAMESPACE.into(),
        socket_dir: Some(directory.display().to_string()),
        ..Default::default()
    };
    let answer = containerd.start_with("one", &params.write_to_bytes().unwrap()).unwrap();
    let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    let shim = Shim::connect(&result.address).await;
    assert!(shim.path.starts_with(&directory));
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
    shim.tasks.shutdown(context(), &shutdown("one")).await.unwrap();
    ended(containerd.server_pid("one")).await;

    params.instance_id = "other".into();
    let answer = containerd.start_with("one", &params.write_to_bytes().unwrap()).unwrap();
    let shim = Shim::connect(std::str::from_utf8(&answer).unwrap()).await;
    shim.tasks.shutdown(context(), &shutdown("one")).await.unwrap();
}

#[tokio::test]
async fn a_failed_create_leaves_nothing() {
    if skip() {
        return;
    }
    let containerd = Containerd::new(NO_KERNEL).await;
    let good = spec(&["true"], json!({}));
    let mut unknown_namespace = good.clone();
    unknown_namespace["linux"]["namespaces"] = json!([{"type": "wormhole"}]);
    let mut bad_annotation = good.clone();
    bad_annotation["annotations"] = json!({"io.kubernetes.cri.container-type": "wormhole"});
    let bundle = containerd.make_bundle("one", &good);
    let shim = containerd.start("one").await;
    let create =
        CreateTaskRequest { id: "one".into(), bundle: bundle.display().to_string(), ..Default::default() };

    let config = bundle.join("config.json");
    for (content, words) in [
        ("{".to_owned(), "config.json"),
        (unknown_namespace.to_string(), "wormhole"),
        (bad_annotation.to_string(), "wormhole"),
    ] {
        fs::write(&config, content).unwrap();
        let outcome = shim.tasks.create(context(), &create).await;
        assert!(text(outcome.clone()).contains(words), "{outcome:?}");
        assert_eq!(code(outcome), ttrpc::Code::INVALID_ARGUMENT);
    }
    fs::remove_file(&config).unwrap();
    assert!(text(shim.tasks.create(context(), &create).await).contains("config.json"));
    fs::write(&config, good.to_string()).unwrap();
    let error = text(shim.tasks.create(context(), &create).await);
    assert!(error.contains("/nonexistent/"), "{error}");
    for id in ["", "../one", "a/b"] {
        let create = CreateTaskRequest { id: id.into(), ..create.clone() };
        assert_eq!(code(shim.tasks.create(context(), &create).await), ttrpc::Code::INVALID_ARGUMENT);
    }

    let state = shim.tasks.state(context(), &StateRequest { id: "one".into(), ..Default::default() }).await;
    assert_eq!(code(state), ttrpc::Code::NOT_FOUND);
    assert_eq!(containerd.events(), Vec::<String>::new());
    assert!(containerd.leftovers().is_empty());
    shim.tasks.shutdown(context(), &shutdown("one")).await.unwrap();
    ended(containerd.server_pid("one")).await;
}

#[tokio::test]
async fn delete_cleans_up_after_a_killed_server() {
    if skip() {
        return;
    }
    let containerd = Containerd::new("").await;
    containerd.make_bundle("one", &spec(&["true"], json!({})));
    let shim = containerd.start("one").await;
    let pid = containerd.server_pid("one");
    kill_process(pid, Signal::KILL).unwrap();
    ended(pid).await;
    assert!(shim.path.exists());
    let output = containerd.delete("one");
    assert!(output.status.success(), "{output:?}");
    let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.seconds > 1_600_000_000);
    assert!(!shim.path.exists());
    // The next one finds nothing in its way.
    let shim = containerd.start("one").await;
    shim.tasks.shutdown(context(), &shutdown("one")).await.unwrap();
}

#[tokio::test]
async fn delete_ends_a_server_that_hangs() {
    if skip() {
        return;
    }
    let containerd = Containerd::new("").await;
    containerd.make_bundle("one", &spec(&["true"], json!({})));
    let shim = containerd.start("one").await;
    let pid = containerd.server_pid("one");
    kill_process(pid, Signal::STOP).unwrap();
    assert!(containerd.delete("one").status.success());
    ended(pid).await;
    assert!(!shim.path.exists());
}

#[test]
fn a_wrong_command_line_is_explained() {
    let run = |args: &[&str]| {
        let program = env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2");
        std::process::Command::new(program).args(args).stdin(std::process::Stdio::null()).output().unwrap()
    };
    let output = run(&["-namespace", "n", "start"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("-id is required"));
    let output = run(&["-namespace", "n", "-id", "a"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("started by containerd"), "{output:?}");
    assert!(String::from_utf8_lossy(&run(&["-v"]).stdout).contains("Version:"));
}
