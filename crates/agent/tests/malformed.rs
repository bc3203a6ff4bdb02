//! What no well-behaved host sends: broken frames, broken messages, cut connections, and every field of every request with
//! hostile values. Each is refused on its own call, and the agent lives.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "malformed/hostile.rs"]
mod hostile;
#[allow(dead_code, reason = "other tests use the rest")]
mod support;
#[path = "malformed/wire.rs"]
mod wire;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use bulkhead_protocol::{
    agent::*,
    health::CheckRequest,
    protobuf::{MessageDyn, MessageField, reflect::MessageDescriptor},
    status::Kind,
};
use hostile::Values;
use support::{Agent, cannot_run, context, failed, process};
use ttrpc::Code;
use wire::{LARGEST, REQUEST, Wire, envelope, frame, header, request};

macro_rules! agent_or_skip {
    () => {{
        if let Some(reason) = cannot_run() {
            eprintln!("skipped: {reason}");
            return;
        }
        Agent::start().await
    }};
}

fn socket(agent: &Agent) -> PathBuf {
    agent.rootfs().parent().unwrap().join("agent.sock")
}

async fn wire(agent: &Agent) -> Wire {
    Wire::connect(&socket(agent)).await
}

/// Resident memory of the agent, in KiB.
fn resident(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Open descriptors, once the test's own connection is among them.
async fn descriptors(agent: &Agent) -> usize {
    wire(agent).await.check().await;
    agent.health.check(context(), &CheckRequest::new()).await.unwrap();
    let start = Instant::now();
    // The wire's end.
    let mut last = agent.descriptors();
    while start.elapsed() < Duration::from_millis(100) {
        tokio::time::sleep(Duration::from_millis(5)).await;
        last = last.min(agent.descriptors());
    }
    last
}

/// Waits until the agent has closed what its clients have.
async fn descriptors_are(agent: &Agent, wanted: usize) {
    let start = Instant::now();
    while agent.descriptors() != wanted {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{} descriptors, {wanted} before",
            agent.descriptors()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_message_over_4_mib_is_refused_on_its_stream_and_the_connection_lives() {
    let agent = agent_or_skip!();
    let mut wire = wire(&agent).await;
    for size in [LARGEST + 1, 2 * LARGEST] {
        let text = wire.refused(&frame(7, REQUEST, 0, &vec![b'x'; size]), 7, Code::INVALID_ARGUMENT).await;
        assert!(text.contains(&size.to_string()), "{text}");
        wire.check().await;
    }
    // One of exactly that size is read and found to be garbage.
    wire.refused(&frame(9, REQUEST, 0, &vec![b'x'; LARGEST]), 9, Code::INVALID_ARGUMENT).await;
    wire.check().await;
}

#[tokio::test]
async fn a_header_without_its_body_waits_and_takes_no_memory() {
    let agent = agent_or_skip!();
    let (descriptors, before) = (descriptors(&agent).await, resident(&agent));
    let mut waiting = Vec::new();
    for n in 0..100_u32 {
        let length = if n % 2 == 0 { u32::MAX } else { u32::try_from(LARGEST).unwrap() };
        let mut wire = wire(&agent).await;
        wire.send(&header(length, 1, REQUEST, 0)).await;
        waiting.push(wire);
    }
    wire(&agent).await.check().await;
    let grown = resident(&agent).saturating_sub(before);
    assert!(grown < 4 << 10, "{grown} KiB for 100 headers");
    drop(waiting);
    descriptors_are(&agent, descriptors).await;
}

#[tokio::test]
async fn an_even_stream_is_refused() {
    let agent = agent_or_skip!();
    let mut wire = wire(&agent).await;
    let body = envelope("grpc.Health", "Check", Vec::new(), Duration::ZERO);
    for stream in [0, 2, u32::MAX - 1] {
        wire.refused(&frame(stream, REQUEST, 0, &body), stream, Code::INVALID_ARGUMENT).await;
    }
    wire.check().await;
}

#[tokio::test]
async fn garbage_in_the_envelope_or_the_payload_is_refused() {
    let agent = agent_or_skip!();
    let mut wire = wire(&agent).await;
    // No field, a length without its bytes, a group that never ends, a number that never ends, bad UTF-8 as the service.
    for garbage in [&b"\xff\xff\xff"[..], b"\x0a\x7f", b"\x0b", &[0x80; 32], b"\x0a\x02\xff\xfe"] {
        wire.refused(&frame(3, REQUEST, 0, garbage), 3, Code::INVALID_ARGUMENT).await;
        let body = envelope("grpc.AgentService", "CreateContainer", garbage.to_vec(), Duration::ZERO);
        let text = wire.refused(&frame(5, REQUEST, 0, &body), 5, Code::INVALID_ARGUMENT).await;
        assert!(text.contains("CreateContainer"), "{text}");
    }
    // A nesting that would exhaust a parser's stack: fields of OCI.Linux.Seccomp and unknown groups.
    let deep = envelope("grpc.AgentService", "CreateContainer", vec![0x0b; 1 << 20], Duration::ZERO);
    wire.refused(&frame(5, REQUEST, 0, &deep), 5, Code::INVALID_ARGUMENT).await;
    wire.check().await;
}

#[tokio::test]
async fn unknown_services_and_methods_are_told_apart() {
    let agent = agent_or_skip!();
    let mut wire = wire(&agent).await;
    for (service, method, code) in [
        ("grpc.Nonesuch", "Check", Code::INVALID_ARGUMENT),
        ("", "", Code::INVALID_ARGUMENT),
        ("grpc.AgentService", "Nonesuch", Code::UNIMPLEMENTED),
        ("grpc.AgentService", "", Code::UNIMPLEMENTED),
        ("grpc.Health", "CreateContainer", Code::UNIMPLEMENTED),
    ] {
        let body = envelope(service, method, Vec::new(), Duration::ZERO);
        wire.refused(&frame(11, REQUEST, 0, &body), 11, code).await;
    }
    wire.check().await;
}

#[tokio::test]
async fn other_message_types_are_ignored() {
    let agent = agent_or_skip!();
    let mut wire = wire(&agent).await;
    let body = envelope("grpc.Health", "Check", Vec::new(), Duration::ZERO);
    for kind in [0, 2, 4, 0x7f, 0xff] {
        wire.send(&frame(1, kind, 0xff, &body)).await;
    }
    // The next answer is this one's.
    wire.check().await;
    // Data for a stream that nobody opened has somebody to tell.
    wire.refused(&frame(13, 3, 0, b"data"), 13, Code::INVALID_ARGUMENT).await;
    wire.check().await;
}

#[tokio::test]
async fn ids_that_are_paths_are_refused() {
    let agent = agent_or_skip!();
    for id in ["../../etc", "..", "a/b", "/abs", "a\0b", "ü1", &"x".repeat(1 << 20)] {
        failed(agent.create(id, agent.spec(&["true"])).await, Kind::InvalidArgument);
        failed(agent.start_container(id).await, Kind::InvalidArgument);
        failed(agent.exec(id, "e", process(&["true"])).await, Kind::InvalidArgument);
        failed(agent.signal(id, "", 9).await, Kind::InvalidArgument);
        // What is not there is removed already.
        agent.remove(id).await.unwrap();
    }
}

#[tokio::test]
async fn five_hundred_half_open_connections_are_survived() {
    let agent = agent_or_skip!();
    let descriptors = descriptors(&agent).await;
    let whole = request(1, "GetGuestDetails", &GuestDetailsRequest::new());
    let mut half = Vec::new();
    for n in 0..500 {
        let mut wire = wire(&agent).await;
        wire.send(&whole[..n % whole.len()]).await;
        half.push(wire);
    }
    wire(&agent).await.check().await;
    drop(half);
    descriptors_are(&agent, descriptors).await;
}

/// The connection is cut after each byte of a request to run a program: it runs once the request was whole, and never else.
#[tokio::test]
async fn a_request_cut_at_any_byte_is_not_done_and_a_whole_one_is_done_once() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sleep", "1000"]).await;
    let descriptors = descriptors(&agent).await;
    let exec = |id: &str| ExecProcessRequest {
        container_id: "c1".into(),
        exec_id: id.into(),
        process: MessageField::some(process(&["sh", "-c", "echo ran >> /ran"])),
        ..Default::default()
    };
    let whole = request(1, "ExecProcess", &exec("cut"));
    for cut in 0..whole.len() {
        wire(&agent).await.send(&whole[..cut]).await;
    }
    descriptors_are(&agent, descriptors).await;
    failed(agent.wait("c1", "cut").await, Kind::NotFound);
    assert!(!agent.rootfs().join("ran").exists());

    // Whole, and the client gone at once: done to the end or not at all, so that a second attempt makes one of both.
    wire(&agent).await.send(&request(1, "ExecProcess", &exec("gone"))).await;
    let again = agent.client.exec_process(context(), &exec("gone")).await;
    assert!(again.is_ok() || failed(again, Kind::AlreadyExists).contains("gone"));
    assert_eq!(ended(&agent, "gone").await, 0);
    assert_eq!(lines(&agent), 1);
    let mut wire = wire(&agent).await;
    wire.send(&whole).await;
    assert_eq!(wire.answer().await.1, Code::OK);
    wire.refused(&whole, 1, Code::ALREADY_EXISTS).await;
    assert_eq!(ended(&agent, "cut").await, 0);
    assert_eq!(lines(&agent), 2);
}

fn lines(agent: &Agent) -> usize {
    std::fs::read_to_string(agent.rootfs().join("ran")).unwrap().lines().count()
}

/// The exit code of an exec that may be starting yet.
async fn ended(agent: &Agent, exec_id: &str) -> i32 {
    let start = Instant::now();
    loop {
        match agent.wait("c1", exec_id).await {
            Err(error) if Kind::of_error(&error) == Kind::NotFound => {
                assert!(start.elapsed() < Duration::from_secs(20), "{exec_id} never starts");
                tokio::task::yield_now().await;
            }
            code => return code.unwrap(),
        }
    }
}

/// All 44 methods, as the service descriptors have them: service, method, request.
fn methods() -> Vec<(String, String, MessageDescriptor)> {
    let files = [
        bulkhead_protocol::agent::file_descriptor(),
        bulkhead_protocol::health::file_descriptor(),
        bulkhead_protocol::types::file_descriptor(),
        bulkhead_protocol::csi::file_descriptor(),
    ];
    let message = |name: &str| {
        let name = name.trim_start_matches('.');
        let found = files.iter().find_map(|file| file.messages().find(|message| message.full_name() == name));
        found.unwrap_or_else(|| panic!("no message {name}"))
    };
    let mut methods = Vec::new();
    for file in files {
        for service in &file.proto().service {
            for method in &service.method {
                let service = format!("{}.{}", file.proto().package(), service.name());
                methods.push((service, method.name().to_owned(), message(method.input_type())));
            }
        }
    }
    methods
}

/// A request that would do something, so that what is deep in it is looked at.
fn sound(agent: &Agent, method: &str, request: &MessageDescriptor) -> Box<dyn MessageDyn> {
    match method {
        "CreateContainer" => Box::new(CreateContainerRequest {
            container_id: "fresh".into(),
            OCI: MessageField::some(agent.spec(&["true"])),
            ..Default::default()
        }),
        "ExecProcess" => Box::new(ExecProcessRequest {
            container_id: "live".into(),
            exec_id: "fresh".into(),
            process: MessageField::some(process(&["true"])),
            ..Default::default()
        }),
        _ => {
            let mut sound = request.new_instance();
            if let Some(id) = request.field_by_name("container_id") {
                id.set_singular_field(&mut *sound, "live".to_owned().into());
            }
            sound
        }
    }
}

/// What an attacker of the host's side would write into a field. `outside` is a directory that nothing may change.
fn values(outside: &str, link: &str, large: bool) -> Values {
    if large {
        return Values { strings: vec!["x".repeat(LARGEST - (64 << 10))], numbers: vec![], many: true };
    }
    let strings = [
        "",
        "\0",
        "a\0b",
        "..",
        ".",
        "/",
        &format!("../../../../../../../../../..{outside}/planted"),
        &format!("{outside}/precious"),
        &format!("{link}/precious"),
        "/proc/self/fd/7/../..",
        "%s%n",
        "-1",
        "18446744073709551616",
        "=",
        ":",
        "a\nb",
        "\u{202e}\u{feff}",
        "{\"a\":[[[[",
    ];
    let numbers = vec![-1, 0, 1, i64::MIN, i64::MAX, i64::from(i32::MIN), i64::from(u32::MAX), 1 << 40];
    Values { strings: strings.map(str::to_owned).to_vec(), numbers, many: false }
}

/// These wait for something that does not come.
const WAITING: [&str; 5] = ["GetOOMEvent", "WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin"];

#[tokio::test]
async fn every_field_of_every_request_may_be_hostile() {
    hostility(false).await;
}

#[tokio::test]
async fn every_string_of_every_request_may_have_4_mib() {
    hostility(true).await;
}

async fn hostility(large: bool) {
    let agent = agent_or_skip!();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("precious"), "untouched").unwrap();
    let link = agent.rootfs().join("link");
    std::os::unix::fs::symlink(outside.path(), &link).unwrap();
    let values = values(outside.path().to_str().unwrap(), link.to_str().unwrap(), large);
    agent.run("live", &["sleep", "1000"]).await;
    let mut methods = methods();
    assert_eq!(methods.len(), 44, "with the two of its health");
    // The one that ends the agent comes last.
    methods.sort_by_key(|(_, method, _)| method == "DestroySandbox");
    let (mut calls, mut wire) = (0, wire(&agent).await);
    for (service, method, request) in &methods {
        if method == "DestroySandbox" {
            continue;
        }
        let mut hostile = Vec::new();
        hostile::each(&*sound(&agent, method, request), &values, &mut |path, message| {
            let payload = message.write_to_bytes_dyn().unwrap();
            if payload.len() < LARGEST - 1024 {
                hostile.push((path, payload));
            }
        });
        for (path, payload) in hostile {
            calls += 1;
            let limit =
                if WAITING.contains(&method.as_str()) { Duration::from_millis(20) } else { Duration::ZERO };
            let started = Instant::now();
            wire.send(&frame(1, REQUEST, 0, &envelope(service, method, payload, limit))).await;
            let (_, code, text) = wire.answer().await;
            assert!(text.len() < 16 << 10, "{method} {path}: an error of {} bytes", text.len());
            assert!(!matches!(code, Code::UNKNOWN | Code::DATA_LOSS), "{method} {path}: {code:?} {text}");
            assert!(!text.contains("panicked"), "{method} {path}: {text}");
            assert!(code == Code::OK || !text.is_empty(), "{method} {path}: {code:?} without a word");
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "{method} {path} took {:?}",
                started.elapsed()
            );
            if code == Code::OK && method == "CreateContainer" {
                agent.remove("fresh").await.unwrap();
            }
        }
        // It may have been killed, frozen or removed.
        agent.remove("live").await.unwrap();
        agent.run("live", &["sleep", "1000"]).await;
    }
    assert!(calls > 1000 || large, "{calls} calls");
    assert_eq!(std::fs::read_to_string(outside.path().join("precious")).unwrap(), "untouched");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1, "something was planted");
    // And it works as before.
    assert_eq!(agent.shell("live", "after", "echo well").await, ("well\n".to_owned(), 0));
}
