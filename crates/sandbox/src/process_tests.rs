//! A process' life against a fake agent: streams, drain, exit, and a VM that goes.

use std::{
    io::{Read, Write},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bulkhead_hypervisor::Accel;
use bulkhead_protocol::{oci, status::Kind};
use tokio::time::timeout;

use super::*;
use crate::{StdioTarget, agent::Agent, fake_agent::Bench};

const SOON: Duration = Duration::from_secs(5);
const A_WHILE: Duration = Duration::from_millis(150);

fn pipe() -> (std::fs::File, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (reader.into(), writer)
}

fn fifo(path: &Path) -> StdioTarget {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    StdioTarget::Uri(path.to_str().unwrap().to_owned())
}

fn init(bench: &Bench, stdio: Stdio) -> Arc<Process> {
    let terminal = stdio.terminal;
    Process::init(&bench.guest, "c1", terminal, Ends::open(stdio).unwrap())
}

fn exec(stdio: Stdio) -> Arc<Process> {
    let id = StreamId { container: "c1".into(), exec: "e:0".into() };
    Process::exec("e", id, oci::Process::new(), stdio)
}

async fn read_all(mut reader: std::fs::File) -> Vec<u8> {
    tokio::task::spawn_blocking(move || {
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        data
    })
    .await
    .unwrap()
}

fn pattern(length: u32) -> Vec<u8> {
    (0..length).flat_map(u32::to_le_bytes).collect()
}

#[tokio::test]
async fn output_is_whole_and_in_order_and_the_exit_comes_after_it() {
    let bench = Bench::new().await;
    let ((out, out_writer), (err, err_writer)) = (pipe(), pipe());
    let stdio = Stdio {
        stdout: StdioTarget::Fd(out_writer),
        stderr: StdioTarget::Fd(err_writer),
        ..Default::default()
    };
    let process = init(&bench, stdio);
    let data = pattern(100_000);
    for piece in data.chunks(7_919) {
        bench.agent.stdout.write(piece);
    }
    bench.agent.stderr.write(b"complaint");
    bench.agent.end(3);
    // Nobody has read yet, and a pipe does not hold so much.
    assert!(timeout(A_WHILE, process.wait()).await.is_err(), "the exit overtook the output");
    assert_eq!(read_all(out).await, data);
    assert_eq!(read_all(err).await, b"complaint");
    assert_eq!(timeout(SOON, process.wait()).await.unwrap().code, 3);
    let calls = bench.agent.calls();
    let position = |call: &str| calls.iter().position(|known| known == call).unwrap();
    assert!(position("WaitProcess") > position("ReadStdout end"), "{calls:?}");
    assert!(position("WaitProcess") > position("ReadStderr end"), "{calls:?}");
}

#[tokio::test]
async fn input_arrives_whole_and_its_end_closes_it() {
    let bench = Bench::new().await;
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let _process = init(&bench, Stdio { stdin: StdioTarget::Fd(reader), ..Default::default() });
    let data = pattern(60_000);
    let sent = data.clone();
    tokio::task::spawn_blocking(move || std::fs::File::from(writer).write_all(&sent).unwrap()).await.unwrap();
    timeout(SOON, bench.agent.called("CloseStdin")).await.unwrap();
    assert_eq!(bench.agent.stdin(), data);
}

#[tokio::test]
async fn closing_a_fifo_comes_after_what_was_written() {
    let bench = Bench::new().await;
    let path = bench.path("in");
    let process = init(&bench, Stdio { stdin: fifo(&path), ..Default::default() });
    // A writer that comes and goes does not end the input.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(b"one ").unwrap();
    let mut writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all(b"two").unwrap();
    process.close_stdin();
    timeout(SOON, bench.agent.called("CloseStdin")).await.unwrap();
    assert_eq!(bench.agent.stdin(), b"one two");
}

#[tokio::test]
async fn no_input_is_an_end_of_file_except_for_a_terminal() {
    let bench = Bench::new().await;
    let _process = init(&bench, Stdio::default());
    timeout(SOON, bench.agent.called("CloseStdin")).await.unwrap();
    let bench = Bench::new().await;
    let process = init(&bench, Stdio { terminal: true, ..Default::default() });
    bench.agent.end(0);
    process.wait().await;
    let calls = bench.agent.calls();
    assert!(!calls.iter().any(|call| call == "CloseStdin" || call == "ReadStderr end"), "{calls:?}");
}

#[tokio::test]
async fn output_that_nobody_wants_is_discarded() {
    let bench = Bench::new().await;
    let process = init(&bench, Stdio::default());
    bench.agent.stdout.write(&pattern(100_000));
    bench.agent.end(0);
    assert_eq!(timeout(SOON, process.wait()).await.unwrap().code, 0);
}

#[tokio::test]
async fn a_reader_who_leaves_does_not_disturb_the_process() {
    let bench = Bench::new().await;
    let (reader, writer) = pipe();
    let process = init(&bench, Stdio { stdout: StdioTarget::Fd(writer), ..Default::default() });
    drop(reader);
    bench.agent.stdout.write(&pattern(100_000));
    bench.agent.end(0);
    assert_eq!(timeout(SOON, process.wait()).await.unwrap().code, 0);
}

#[tokio::test]
async fn a_fast_process_waits_for_nobody_and_a_late_reader_finds_its_output() {
    let bench = Bench::new().await;
    let path = bench.path("out");
    let process = init(&bench, Stdio { stdout: fifo(&path), ..Default::default() });
    bench.agent.stdout.write(b"quick");
    bench.agent.end(0);
    assert_eq!(timeout(SOON, process.wait()).await.unwrap().code, 0);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let reader = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    assert_eq!(read_all(reader.into()).await, b"quick");
}

#[tokio::test(start_paused = true)]
async fn output_without_a_taker_does_not_hide_the_exit_for_ever() {
    let bench = Bench::new().await;
    let path = bench.path("out");
    let process = init(&bench, Stdio { stdout: fifo(&path), ..Default::default() });
    bench.agent.stdout.write(&pattern(100_000));
    let begun = tokio::time::Instant::now();
    // While it lives, it is merely held up.
    assert!(timeout(Duration::from_secs(3600), process.wait()).await.is_err());
    bench.agent.end(5);
    assert_eq!(process.wait().await.code, 5);
    assert!(begun.elapsed() < Duration::from_secs(3600 + 60), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn who_comes_after_the_exit_was_told_still_finds_the_output() {
    let bench = Bench::new().await;
    let path = bench.path("out");
    let process = init(&bench, Stdio { stdout: fifo(&path), ..Default::default() });
    bench.agent.stdout.write(&pattern(200_000));
    bench.agent.end(5);
    assert_eq!(process.wait().await.code, 5);
    assert_eq!(read_all(std::fs::File::open(&path).unwrap()).await, pattern(200_000));
}

#[tokio::test(start_paused = true)]
async fn a_reader_of_ours_may_take_all_the_time_there_is() {
    let bench = Bench::new().await;
    let (reader, writer) = pipe();
    let process = init(&bench, Stdio { stdout: StdioTarget::Fd(writer), ..Default::default() });
    bench.agent.stdout.write(&pattern(200_000));
    bench.agent.end(5);
    assert!(
        timeout(Duration::from_secs(3600), process.wait()).await.is_err(),
        "the exit overtook the output"
    );
    assert_eq!(read_all(reader).await, pattern(200_000));
    assert_eq!(process.wait().await.code, 5);
}

#[tokio::test(start_paused = true)]
async fn a_process_in_a_hurry_is_not_held_up_by_its_output() {
    let bench = Bench::new().await;
    let process = init(&bench, Stdio { stdout: fifo(&bench.path("out")), ..Default::default() });
    bench.agent.stdout.write(&pattern(100_000));
    bench.agent.end_with_open_streams(137);
    process.hurry();
    let begun = tokio::time::Instant::now();
    assert_eq!(process.wait().await.code, 137);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_guest_that_sends_too_much_is_not_believed() {
    let bench = Bench::new().await;
    *lock(&bench.agent.excess) = true;
    let (reader, writer) = pipe();
    let process = init(&bench, Stdio { stdout: StdioTarget::Fd(writer), ..Default::default() });
    bench.agent.stdout.write(&pattern(100_000));
    bench.agent.end(0);
    assert_eq!(read_all(reader).await, b"");
    assert_eq!(timeout(SOON, process.wait()).await.unwrap().code, 0);
}

#[tokio::test]
async fn an_exit_code_that_is_none_is_unknown() {
    let bench = Bench::new().await;
    let process = init(&bench, Stdio::default());
    bench.agent.end(70_000);
    assert_eq!(timeout(SOON, process.wait()).await.unwrap().code, 255);
}

#[tokio::test]
async fn when_the_vm_is_lost_every_waiter_learns_it_at_once() {
    let bench = Bench::new().await;
    // Output that nobody takes must not delay it for long.
    let process = init(&bench, Stdio { stdout: fifo(&bench.path("out")), ..Default::default() });
    bench.agent.stdout.write(&pattern(100_000));
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            tokio::spawn({
                let process = process.clone();
                async move { process.wait().await }
            })
        })
        .collect();
    bench.lose_vm();
    for waiter in waiters {
        let exit = timeout(SOON, waiter).await.unwrap().unwrap();
        assert_eq!(exit, Exit { code: 137, at: SystemTime::UNIX_EPOCH });
    }
    let error = exec(Stdio::default()).start(bench.guest.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("Kernel panic"), "{error}");
}

#[tokio::test]
async fn a_broken_connection_is_noticed_without_a_call() {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let (agent, _health) = Agent::over(Box::new(ours), Accel::Kvm);
    let broken = agent.broken();
    drop(theirs);
    timeout(SOON, broken).await.unwrap();
}

#[tokio::test]
async fn an_exec_is_unknown_to_the_guest_until_it_is_started() {
    let bench = Bench::new().await;
    let process = exec(Stdio { terminal: true, ..Default::default() });
    process.resize(&bench.guest, 24, 80).await.unwrap();
    assert!(bench.agent.calls().is_empty());
    assert!(!process.in_guest() && !process.started());
    process.clone().start(bench.guest.clone()).await.unwrap();
    assert!(process.started());
    let calls = bench.agent.calls();
    assert_eq!(calls[0], "ExecProcess e:0");
    assert!(calls.contains(&"TtyWinResize 24x80".to_owned()), "{calls:?}");
    let again = process.clone().start(bench.guest.clone()).await.unwrap_err();
    assert_eq!(again.to_string(), "exec e of container c1 was started already");
    bench.agent.end(0);
    assert_eq!(process.wait().await.code, 0);
}

#[tokio::test]
async fn a_command_that_cannot_be_started_has_a_shells_code_and_the_agents_text() {
    for (kind, text, code) in [
        (Kind::InvalidArgument, "exec: \"foo\": executable file not found in $PATH", 127),
        (Kind::PermissionDenied, "exec: \"/foo\": permission denied", 126),
        (Kind::Internal, "no memory", 255),
    ] {
        let bench = Bench::new().await;
        *lock(&bench.agent.refusal) = Some((kind, text.into()));
        let process = exec(Stdio::default());
        let error = process.clone().start(bench.guest.clone()).await.unwrap_err();
        assert_eq!(error.to_string(), format!("ExecProcess: {text}"));
        assert_eq!(error.kind(), kind);
        assert_eq!(timeout(SOON, process.wait()).await.unwrap().code, code);
        assert!(process.clone().start(bench.guest.clone()).await.is_err());
    }
}

#[tokio::test]
async fn init_may_end_before_its_start_is_answered() {
    let bench = Bench::new().await;
    let process = init(&bench, Stdio::default());
    process.clone().start(bench.guest.clone()).await.unwrap();
    bench.agent.end(0);
    assert_eq!(process.wait().await.code, 0);
    let error = process.clone().start(bench.guest.clone()).await.unwrap_err();
    assert_eq!(error.to_string(), "container c1 has ended already");
    assert!(process.forget().is_some());
}

#[tokio::test]
async fn an_exec_that_was_never_started_can_be_forgotten() {
    let bench = Bench::new().await;
    let process = exec(Stdio::default());
    assert!(process.forget().is_some());
    process.wait().await;
    assert!(process.clone().start(bench.guest.clone()).await.is_err());
    let running = exec(Stdio::default());
    running.clone().start(bench.guest.clone()).await.unwrap();
    assert!(running.forget().is_none());
}
