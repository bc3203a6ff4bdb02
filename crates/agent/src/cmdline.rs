//! How the agent is told to be: the kernel's command line, the environment, the arguments.

use std::{ffi::OsString, path::Path, time::Duration};

use bulkhead_protocol::ports;
use tracing::Level;

use crate::error::{During, Error, Result};

/// The agent's configuration.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// `agent.server_addr`: where requests are taken, `vsock://<cid or -1>:<port>` or `unix://<path>`.
    pub(crate) server: String,
    /// `agent.log`: the least severe that is logged.
    pub(crate) log_level: Level,
    /// `agent.log_vport`: the vsock port of the log stream; 0 for none.
    pub(crate) log_port: u32,
    /// `agent.container_pipe_size`: bytes in an output pipe; 0 for the kernel's own choice.
    pub(crate) pipe_size: usize,
    /// `agent.hotplug_timeout`: how long a device may take to appear.
    pub(crate) hotplug_timeout: Duration,
}

/// What the command line asks for.
#[derive(Debug, PartialEq)]
pub(crate) enum Command {
    /// To serve.
    Serve(Config),
    /// To say its version.
    Version,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            server: format!("vsock://-1:{}", ports::AGENT),
            log_level: Level::WARN,
            log_port: 0,
            pipe_size: 0,
            hotplug_timeout: Duration::from_secs(3),
        }
    }
}

impl Config {
    /// The configuration of a guest's init. The kernel hands its arguments over in a file, too.
    pub(crate) fn of_init() -> Result<Config> {
        let file = Path::new("/proc/cmdline");
        let line = std::fs::read_to_string(file).during(|| format!("read {}", file.display()))?;
        let mut config = Config::default();
        config.read_kernel_line(&line)?;
        config.read_environment(|name| std::env::var_os(name))?;
        Ok(config)
    }

    /// Takes the words that it knows; all the others are somebody else's.
    fn read_kernel_line(&mut self, line: &str) -> Result<()> {
        for word in line.split_whitespace() {
            let Some((key, value)) = word.split_once('=') else { continue };
            match key {
                "agent.server_addr" => self.server = value.to_owned(),
                "agent.log" => self.log_level = level(value)?,
                "agent.log_vport" => self.log_port = number(key, value)?,
                "agent.hotplug_timeout" => self.hotplug_timeout = Duration::from_secs(number(key, value)?),
                "agent.container_pipe_size" => self.pipe_size = number(key, value)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_environment(&mut self, variable: impl Fn(&str) -> Option<OsString>) -> Result<()> {
        let text = |name| variable(name).and_then(|value| value.into_string().ok());
        if let Some(server) = text("KATA_AGENT_SERVER_ADDR") {
            self.server = server;
        }
        if let Some(name) = text("KATA_AGENT_LOG_LEVEL") {
            self.log_level = level(&name)?;
        }
        Ok(())
    }
}

impl Command {
    /// Reads the arguments of a plain process.
    pub(crate) fn of_arguments() -> Result<Command> {
        Command::read(std::env::args().skip(1), |name| std::env::var_os(name))
    }

    fn read(
        mut arguments: impl Iterator<Item = String>,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Command> {
        let mut config = Config::default();
        config.read_environment(environment)?;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "-v" | "--version" => return Ok(Command::Version),
                "--server" => {
                    config.server =
                        arguments.next().ok_or_else(|| Error::Invalid("--server needs an address".into()))?;
                }
                _ => {
                    return Err(Error::Invalid(format!(
                        "unknown argument {argument:?}; usage: bulkhead-agent [--version] [--server unix://PATH | vsock://CID:PORT]"
                    )));
                }
            }
        }
        Ok(Command::Serve(config))
    }
}

fn level(name: &str) -> Result<Level> {
    Ok(match name {
        "fatal" | "panic" | "critical" | "error" => Level::ERROR,
        "warn" | "warning" => Level::WARN,
        "info" => Level::INFO,
        "debug" => Level::DEBUG,
        "trace" => Level::TRACE,
        _ => {
            return Err(Error::Invalid(format!(
                "log level {name:?} is not error, warn, info, debug or trace"
            )));
        }
    })
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| Error::Invalid(format!("{key}={value} is not a number that fits")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(line: &str) -> Result<Config> {
        let mut config = Config::default();
        config.read_kernel_line(line).map(|()| config)
    }

    #[test]
    fn the_kernel_line_is_read_and_foreign_words_are_left() {
        let config =
            kernel("console=ttyS0 quiet agent.log=debug agent.log_vport=1025 agent.trace=true -- x").unwrap();
        assert_eq!(config, Config { log_level: Level::DEBUG, log_port: 1025, ..Config::default() });
        assert_eq!(kernel("agent.server_addr=unix:///run/a.sock").unwrap().server, "unix:///run/a.sock");
        assert_eq!(kernel("agent.container_pipe_size=1048576").unwrap().pipe_size, 1 << 20);
        assert_eq!(kernel("").unwrap().server, "vsock://-1:1024");
    }

    #[test]
    fn a_bad_value_is_refused_by_name() {
        assert!(kernel("agent.log=loud").unwrap_err().to_string().contains("loud"));
        assert!(
            kernel("agent.container_pipe_size=-1").unwrap_err().to_string().contains("container_pipe_size")
        );
    }

    #[test]
    fn arguments_come_before_the_environment() {
        let environment = |name: &str| (name == "KATA_AGENT_SERVER_ADDR").then(|| "unix:///env".into());
        let read = |arguments: &[&str]| Command::read(arguments.iter().map(|a| (*a).to_owned()), environment);
        let server = |command| match command {
            Ok(Command::Serve(config)) => config.server,
            other => panic!("{other:?}"),
        };
        assert_eq!(server(read(&[])), "unix:///env");
        assert_eq!(server(read(&["--server", "unix:///arg"])), "unix:///arg");
        assert_eq!(read(&["--version"]).unwrap(), Command::Version);
        assert!(read(&["--server"]).is_err());
        assert!(read(&["--sever", "x"]).unwrap_err().to_string().contains("usage"));
    }
}
