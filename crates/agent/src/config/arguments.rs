//! The arguments of a plain process.

use std::ffi::OsString;

use super::{Config, Report, environment, file, value::Value};
use crate::error::{Error, Result};

/// What the command line asks for.
#[derive(Debug, PartialEq)]
pub(crate) enum Command {
    /// To serve, with what could not be heeded.
    Serve(Config, Report),
    /// To say its version.
    Version,
    /// To say how it is called.
    Help,
}

/// How the program is called.
pub(crate) const USAGE: &str = "usage: bulkhead-agent [-c FILE] [--server ADDRESS]
  -c, --config FILE   settings in TOML; the names are those of the kernel's command line without `agent.`
  --server ADDRESS    where to take requests: unix://PATH or vsock://CID:PORT
  -v, --version       print the version
  -h, --help          print this";

impl Command {
    /// Reads the arguments of this process.
    pub(crate) fn of_arguments() -> Result<Command> {
        Command::read(std::env::args_os().skip(1), |name| std::env::var_os(name))
    }

    fn read(
        mut arguments: impl Iterator<Item = OsString>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Command> {
        let (mut settings, mut server) = (Vec::new(), None);
        while let Some(argument) = arguments.next() {
            let argument = argument.to_string_lossy();
            let (name, mut joined) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
                _ => (argument.as_ref(), None),
            };
            let mut value = || {
                let next = || arguments.next().map(|value| value.to_string_lossy().into_owned());
                joined
                    .take()
                    .or_else(next)
                    .ok_or_else(|| Error::Invalid(format!("{name} needs a value\n{USAGE}")))
            };
            match name {
                "-v" | "--version" => return Ok(Command::Version),
                "-h" | "--help" => return Ok(Command::Help),
                "-c" | "--config" => {
                    settings =
                        file::load(&value()?, |path| file::read(path.as_ref())).map_err(Error::Invalid)?;
                }
                "--server" => server = Some(value()?),
                _ => return Err(Error::Invalid(format!("unknown argument {name:?}\n{USAGE}"))),
            }
        }
        let (mut config, mut report) = (Config::default(), Report::default());
        config.take_file(settings, &mut report);
        environment::read(&mut config, variable, &mut report);
        if let Some(server) = server {
            config.apply("server_addr", &Value::Word(server), |setting| setting.key, &mut report);
        }
        let mut report = report.strict()?;
        config.leave_the_ports_of_a_guest(&mut report);
        Ok(Command::Serve(config, report))
    }
}

impl Config {
    /// Ports other than the server's are for the host of a guest; on a machine that is somebody else's whoever comes first
    /// could be on them.
    fn leave_the_ports_of_a_guest(&mut self, report: &mut Report) {
        let default = Config::default();
        for (name, asked) in [
            ("log_vport", std::mem::replace(&mut self.log_port, default.log_port) != 0),
            ("passfd_listener_port", std::mem::replace(&mut self.stream_port, default.stream_port) != 0),
            ("debug_console", std::mem::replace(&mut self.debug_console, default.debug_console)),
        ] {
            if asked {
                report.unheeded(format!("{name} has no effect: the agent is not the init of a guest"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Command> {
        let environment = |name: &str| (name == "KATA_AGENT_SERVER_ADDR").then(|| "unix:///env".into());
        Command::read(arguments.iter().map(|argument| (*argument).into()), environment)
    }

    fn config(arguments: &[&str]) -> Config {
        match read(arguments) {
            Ok(Command::Serve(config, _)) => config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn arguments_come_before_the_environment_and_that_before_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "server_addr = 'unix:///file'\nlog_level = \"debug\"\n").unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(config(&[]).server, "unix:///env");
        let both = config(&["--config", path]);
        assert_eq!((both.server.as_str(), both.log_level), ("unix:///env", tracing::Level::DEBUG));
        assert_eq!(config(&["-c", path, "--server", "unix:///arg"]).server, "unix:///arg");
        assert_eq!(config(&["--server=unix:///arg"]).server, "unix:///arg");
        let plain = Command::read(["-c".into(), path.into()].into_iter(), |_| None).unwrap();
        assert!(matches!(plain, Command::Serve(config, _) if config.server == "unix:///file"));
    }

    #[test]
    fn what_is_wrong_is_refused_with_the_usage() {
        assert_eq!(read(&["-v"]).unwrap(), Command::Version);
        assert_eq!(read(&["--help"]).unwrap(), Command::Help);
        for arguments in [&["--server"][..], &["--sever", "x"], &["--config"], &["x"], &[""]] {
            assert!(read(arguments).unwrap_err().to_string().contains("usage"), "{arguments:?}");
        }
        assert!(read(&["--server", "tcp://x"]).unwrap_err().to_string().contains("unix://<path>"));
        assert!(read(&["-c", "/does/not/exist"]).unwrap_err().to_string().contains("/does/not/exist"));
    }

    #[test]
    fn a_plain_process_opens_no_port_of_a_guest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            "log_vport = 1025\npasfd_listener_port = 1\npassfd_listener_port = 1027\ndebug_console = true\n",
        )
        .unwrap();
        let Command::Serve(config, report) = read(&["-c", file.path().to_str().unwrap()]).unwrap() else {
            panic!()
        };
        assert_eq!(config, Config { server: "unix:///env".into(), ..Config::default() });
        assert_eq!(report.unheeded.len(), 4, "{report:?}");
        assert!(report.unheeded[0].contains("is passfd_listener_port meant?"), "{report:?}");
    }
}
