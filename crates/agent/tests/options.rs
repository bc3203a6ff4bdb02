//! How a plain agent is told to be: arguments, environment, file; and what it refuses.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::Read,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// Nothing in these tests takes this long; a hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(60);

fn agent(arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_bulkhead-agent")]).args(arguments);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// Starts an agent that is to serve; what it says until it does, and the agent.
fn serving(command: &mut Command, socket: &Path) -> Serving {
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut serving = Serving(child);
    let start = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(start.elapsed() < PATIENCE, "nobody listens on {}", socket.display());
        assert!(serving.0.try_wait().unwrap().is_none(), "the agent has ended: {}", serving.end());
        std::thread::sleep(Duration::from_millis(5));
    }
    serving
}

struct Serving(Child);

impl Serving {
    /// Ends it; everything that it has said.
    fn end(&mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(self.0.wait().unwrap().success(), "{said}");
        said
    }
}

#[test]
fn it_tells_its_version_and_its_usage() {
    for argument in ["-v", "--version"] {
        let output = output(&mut agent(&[argument]));
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            format!("bulkhead-agent {}\n", env!("CARGO_PKG_VERSION"))
        );
    }
    let help = output(&mut agent(&["--help"]));
    assert!(help.status.success() && String::from_utf8(help.stdout).unwrap().contains("--config FILE"));
}

#[test]
fn what_is_wrong_is_refused_with_its_name_its_value_and_its_form() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("agent.toml");
    let path = file.to_str().unwrap();
    for (content, expected) in [
        ("hotplug_timeout = 0", &["hotplug_timeout: 0", "seconds above 0", "default is 3"][..]),
        ("container_pipe_size = -1", &["container_pipe_size: -1"]),
        ("log_level = \"loud\"", &["log_level: loud", "error, warn, info, debug or trace"]),
        ("debug_console_vport = \"1026\"", &["debug_console_vport: 1026", "a port number"]),
        ("a = 1\nb = [1]\n", &["agent.toml", "line 2"]),
        ("\0", &["line 1"]),
    ] {
        std::fs::write(&file, content).unwrap();
        let output = output(&mut agent(&["--config", path, "--server", "unix:///nowhere/at/all"]));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && expected.iter().all(|word| said.contains(word)),
            "{content:?}: {said}"
        );
    }
    for (variable, value) in [
        ("KATA_AGENT_LOG_LEVEL", "loud"),
        ("KATA_AGENT_TRACING", "maybe"),
        ("KATA_AGENT_SERVER_ADDR", "tcp://x"),
    ] {
        let output = output(agent(&[]).env(variable, value));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(variable) && said.contains(value), "{said}");
    }
    let output = output(&mut agent(&["--sever", "x"]));
    assert!(!output.status.success() && String::from_utf8(output.stderr).unwrap().contains("usage"));
}

#[test]
fn the_last_source_wins_and_what_has_no_effect_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let socket = |name: &str| directory.path().join(name);
    let address = |name: &str| format!("unix://{}", socket(name).display());
    let file = socket("agent.toml");
    let settings = format!(
        "server_addr = '{}'\nlog_level = 'debug'\nhotplug_timeot = 5\nmem_agent_enable = true\nlog_vport = 1025\n\
         [hotplug_timeout]\nsecs = 5\n",
        address("file")
    );
    std::fs::write(&file, settings).unwrap();
    let path = file.to_str().unwrap();

    let said = serving(&mut agent(&["-c", path]), &socket("file")).end();
    for expected in [
        "hotplug_timeot is no setting of the agent and is ignored; is hotplug_timeout meant?",
        "mem_agent_enable: true has no effect",
        "log_vport has no effect",
    ] {
        assert!(said.contains(expected), "{said}");
    }
    let from_environment = || {
        let mut command = agent(&["-c", path]);
        command.env("KATA_AGENT_SERVER_ADDR", address("environment")).env("KATA_AGENT_LOG_LEVEL", "error");
        command
    };
    let said = serving(&mut from_environment(), &socket("environment")).end();
    assert!(!said.contains("WARN") && !said.contains("INFO"), "the level of the environment counts: {said}");
    serving(from_environment().args(["--server", &address("argument")]), &socket("argument")).end();
}
