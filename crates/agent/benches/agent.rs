//! What the agent costs, measured from outside on a plain process: its size, the time to its first answer, a round trip,
//! its memory alone and with ten containers, its descriptors after a thousand execs.
//!
//! `BULKHEAD_BENCH_AGENT` names the program; `cargo xtask bench agent` sets it to the static one of the install prefix.

#![allow(clippy::unwrap_used, reason = "a failed measurement ends the program")]

#[path = "../tests/support/mod.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod support;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bulkhead_protocol::{health::CheckRequest, protobuf::Message};
use support::{Agent, process};

const STARTS: usize = 51;
const CHECKS: usize = 20_000;
const CONTAINERS: usize = 10;
const EXECS: usize = 1_000;

fn main() {
    let program = support::program();
    let size = std::fs::metadata(&program).unwrap().len();
    println!("{program}");
    figure("on disk", mib(size), "3 MiB");
    let starts = (0..STARTS).map(|_| time_to_first_answer(Path::new(&program))).collect();
    figure("start to the first Check, median", micros(median(starts)), "2000 us");
    let (mut agent, mut socket) = spawn(Path::new(&program));
    let checks = (0..CHECKS).map(|_| time_of_a_check(&mut socket)).collect();
    figure("round trip of a Check, median", micros(median(checks)), "40 us");
    agent.kill().unwrap();
    agent.wait().unwrap();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(containers());
}

/// Memory and descriptors, with containers.
async fn containers() {
    if let Some(reason) = support::cannot_run() {
        println!("skipped: {reason}");
        return;
    }
    let agent = Agent::start().await;
    agent.health.check(support::context(), &CheckRequest::new()).await.unwrap();
    figure("resident, idle", mib(resident(agent.pid())), "3 MiB");
    for n in 0..CONTAINERS {
        agent.run(&format!("c{n}"), &["sleep", "1000"]).await;
    }
    figure("resident, ten containers", mib(resident(agent.pid())), "4 MiB");
    let before = agent.descriptors();
    for n in 0..EXECS {
        let exec = n.to_string();
        agent.exec("c0", &exec, process(&["true"])).await.unwrap();
        assert_eq!(agent.wait("c0", &exec).await.unwrap(), 0);
        agent.stdout("c0", &exec).await;
        agent.stderr("c0", &exec).await;
    }
    figure(
        "descriptors after 1,000 execs",
        format!("{} (before: {before})", agent.descriptors()),
        "those before",
    );
    figure("resident after 1,000 execs", mib(resident(agent.pid())), "");
    for n in 0..CONTAINERS {
        agent.remove(&format!("c{n}")).await.unwrap();
    }
    assert!(agent.destroy().await.success());
}

fn figure(what: &str, value: String, bound: &str) {
    let bound = if bound.is_empty() { String::new() } else { format!("  (bound: {bound})") };
    println!("  {what:<34} {value:>12}{bound}");
}

fn mib(bytes: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let mib = bytes as f64 / f64::from(1 << 20);
    format!("{mib:.2} MiB")
}

fn micros(time: Duration) -> String {
    format!("{:.1} us", time.as_secs_f64() * 1e6)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

fn time_to_first_answer(program: &Path) -> Duration {
    let start = Instant::now();
    let (mut agent, mut socket) = spawn(program);
    time_of_a_check(&mut socket);
    let elapsed = start.elapsed();
    agent.kill().unwrap();
    agent.wait().unwrap();
    elapsed
}

/// Starts an agent on an abstract socket and connects as soon as it listens. There is no event to wait for that would not
/// cost what is measured.
fn spawn(program: &Path) -> (Child, UnixStream) {
    use std::os::linux::net::SocketAddrExt;
    let name = format!("bulkhead-bench-{}-{:?}", std::process::id(), Instant::now());
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    let agent = Command::new(program)
        .args(["--server", &format!("unix://@{name}")])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    let start = Instant::now();
    loop {
        match UnixStream::connect_addr(&address) {
            Ok(socket) => return (agent, socket),
            Err(error) => assert!(start.elapsed() < Duration::from_secs(10), "{error}"),
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// One call of ttrpc by hand, so that no client's time is measured: a header of ten bytes, then a request.
fn time_of_a_check(socket: &mut UnixStream) -> Duration {
    let request = ttrpc::Request {
        service: "grpc.Health".into(),
        method: "Check".into(),
        payload: CheckRequest::new().write_to_bytes().unwrap(),
        ..Default::default()
    }
    .write_to_bytes()
    .unwrap();
    let length = u32::try_from(request.len()).unwrap();
    let frame = [&length.to_be_bytes()[..], &1u32.to_be_bytes(), &[1, 0], &request].concat();
    let start = Instant::now();
    socket.write_all(&frame).unwrap();
    let mut header = [0; 10];
    socket.read_exact(&mut header).unwrap();
    let mut body = vec![0; u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize];
    socket.read_exact(&mut body).unwrap();
    start.elapsed()
}
