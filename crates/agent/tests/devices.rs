//! Devices of a plain process: found, given to containers by their numbers, refused; the host's machine is left alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{os::unix::fs::MetadataExt, path::Path};

use bulkhead_protocol::{agent::*, oci, protobuf::MessageField, status::Kind};
use support::{Agent, cannot_run, context, failed, process};

macro_rules! agent_or_skip {
    () => {{
        if let Some(reason) = cannot_run() {
            eprintln!("skipped: {reason}");
            return;
        }
        Agent::start().await
    }};
}

fn device(kind: &str, id: &str, vm_path: &str) -> Device {
    Device {
        type_: kind.into(),
        id: id.into(),
        vm_path: vm_path.into(),
        container_path: "/dev/data".into(),
        ..Default::default()
    }
}

/// A spec with `/dev/data` by the host's numbers, and an environment that names a device of the host.
fn spec(agent: &Agent) -> oci::Spec {
    let mut spec = agent.spec(&["sleep", "1000"]);
    spec.Linux.mut_or_insert_default().Devices.push(oci::LinuxDevice {
        Path: "/dev/data".into(),
        Type: "b".into(),
        Major: 250,
        Minor: 7,
        ..Default::default()
    });
    spec
}

async fn create(agent: &Agent, spec: oci::Spec, devices: Vec<Device>) -> ttrpc::Result<()> {
    let request = CreateContainerRequest {
        container_id: "c1".into(),
        OCI: MessageField::some(spec),
        devices,
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await.map(drop)
}

#[tokio::test]
async fn a_device_has_the_numbers_of_where_the_container_runs() {
    let agent = agent_or_skip!();
    let node = Path::new("/dev/loop0");
    if !node.exists() || !Path::new("/sys/class/block/loop0/dev").exists() {
        eprintln!("skipped: there is no /dev/loop0");
        return;
    }
    create(&agent, spec(&agent), vec![device("mmioblk", "", "/dev/loop0")]).await.unwrap();
    agent.start_container("c1").await.unwrap();
    let (output, _) = agent.shell("c1", "e1", "stat -c '%F %t %T' /dev/data").await;
    let number = node.metadata().unwrap().rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    assert_eq!(output, format!("block special file {major:x} {minor:x}\n"));
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_by_name_and_leaves_nothing() {
    let agent = agent_or_skip!();
    let refused =
        async |devices: Vec<Device>, kind: Kind| failed(create(&agent, spec(&agent), devices).await, kind);
    for kind in ["floppy", "blk-ccw", "vfio-ap"] {
        let text = refused(vec![device(kind, "x", "")], Kind::Unimplemented).await;
        assert!(text.contains(kind) && text.contains("vfio-pci-gk"), "{text}");
    }
    let twice = vec![device("blk", "02", ""), device("blk", "03", "")];
    assert!(refused(twice, Kind::InvalidArgument).await.contains("/dev/data"));
    let long = "01/".repeat(1 << 20);
    for bad in [
        device("", "02", ""),
        device("blk", "../../../etc", ""),
        device("blk", "02\0", ""),
        device("blk", &long, ""),
        device("scsi", "- - -", ""),
        device("mmioblk", "", "/dev/../etc/shadow"),
        device("nvdimm", "", "/dev/pmem0\0"),
    ] {
        refused(vec![bad], Kind::InvalidArgument).await;
    }
    // It takes as long as the agent waits for devices.
    let text = refused(vec![device("mmioblk", "", "/dev/vdx")], Kind::DeadlineExceeded).await;
    assert!(text.contains("/dev/vdx") && text.contains("within 3 s"), "{text}");

    let mut passed = device("vfio-pci", "group", "");
    passed.options = vec!["0000:81:00.0=02".into()];
    let text = refused(vec![passed], Kind::FailedPrecondition).await;
    assert!(text.contains("driver"), "{text}");

    let mut spec = spec(&agent);
    spec.Annotations.insert("cdi.k8s.io/gpu".into(), "nvidia.com/gpu=0".into());
    let text = failed(create(&agent, spec, Vec::new()).await, Kind::Unimplemented);
    assert!(text.contains("cdi.k8s.io/gpu"), "{text}");

    // A device that the spec does not list.
    if Path::new("/dev/loop0").exists() {
        let mut device = device("mmioblk", "", "/dev/loop0");
        device.container_path = "/dev/unlisted".into();
        assert!(refused(vec![device], Kind::InvalidArgument).await.contains("/dev/unlisted"));
    }
    agent.run("c1", &["sleep", "1000"]).await;
    agent.exec("c1", "e1", process(&["true"])).await.unwrap();
}
