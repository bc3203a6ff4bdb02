//! How the agent is told to be.
//!
//! ```text
//! the init of a guest:  kernel line ──► agent.config_file ─► that file, and nothing else
//!                                  └──► its other words ──► environment
//! a plain process:      --config FILE ──► environment ──► --server
//! ```
//! Every setting is a row of one table, with its name on the kernel's line, its name in a file, its form and its default.
//! A value of the wrong form is never guessed at. A plain process refuses to start with it; an init, whose end is that of
//! the guest, says so in its log and goes on with the default.

mod arguments;
mod environment;
mod file;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod kernel_line;
mod settings;
mod value;

use std::{path::PathBuf, time::Duration};

use bulkhead_protocol::ports;
use tracing::Level;

pub(crate) use arguments::{Command, USAGE};
pub(crate) use file::read_to_limit;
use settings::SETTINGS;
use value::Value;

use crate::{
    boot::Image,
    error::{During, Error, Result},
};

/// The agent's configuration.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// Where requests are taken: `vsock://<cid or -1>:<port>` or `unix://<path>`.
    pub(crate) server: String,
    /// The least severe that is logged.
    pub(crate) log_level: Level,
    /// The vsock port of the log stream; 0 for none.
    pub(crate) log_port: u32,
    /// Bytes in an output pipe; 0 for the kernel's own choice.
    pub(crate) pipe_size: usize,
    /// How long a device may take to appear.
    pub(crate) hotplug_timeout: Duration,
    /// Whether there is a debug console.
    pub(crate) debug_console: bool,
    /// The vsock port of the debug console; 0 for `/dev/console`.
    pub(crate) debug_console_port: u32,
    /// The vsock port for connections that become standard streams; 0 for none.
    pub(crate) stream_port: u32,
    /// Whether requests are traced.
    pub(crate) tracing: bool,
    /// Where spans are sent: `vsock://<cid>:<port>` or `unix://<path>`.
    pub(crate) trace_address: String,
    /// A policy that is in force from the start; empty for none.
    pub(crate) policy_file: PathBuf,
}

/// What a source had that could not be taken as it was.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Report {
    /// Values of the wrong form; their settings keep their defaults.
    wrong: Vec<String>,
    /// What is not known, or not offered.
    unheeded: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            server: format!("vsock://-1:{}", ports::AGENT),
            log_level: Level::INFO,
            log_port: 0,
            pipe_size: 0,
            hotplug_timeout: Duration::from_secs(3),
            debug_console: false,
            debug_console_port: 0,
            stream_port: 0,
            tracing: false,
            trace_address: format!("vsock://{}:{}", ports::HOST_CID, ports::TRACE),
            policy_file: PathBuf::new(),
        }
    }
}

impl Config {
    /// The configuration of a guest's init. A file that it names is looked for in the guest's image.
    pub(crate) fn of_init(image: &Image) -> Result<(Config, Report)> {
        const LINE: &str = "/proc/cmdline";
        let line = std::fs::read(LINE).during(|| format!("read {LINE}"))?;
        Ok(Config::from_kernel(&line, |path| image.read(path, file::LIMIT), |name| std::env::var_os(name)))
    }

    /// What the names of a source say. `name` picks the name that the source uses.
    fn apply(
        &mut self,
        name: &str,
        value: &Value,
        names: impl Fn(&'static settings::Setting) -> &'static str,
        report: &mut Report,
    ) {
        match SETTINGS.iter().find(|setting| names(setting) == name && !name.is_empty()) {
            Some(setting) => setting.apply(self, name, value, report),
            None => report.unknown(name, SETTINGS.iter().map(names)),
        }
    }
}

impl Report {
    /// Logs everything. Has to be called once there is a log.
    pub(crate) fn log(&self) {
        for problem in &self.wrong {
            tracing::error!("{problem}");
        }
        for problem in &self.unheeded {
            tracing::warn!("{problem}");
        }
    }

    /// Refuses wrong values.
    fn strict(self) -> Result<Report> {
        if self.wrong.is_empty() { Ok(self) } else { Err(Error::Invalid(self.wrong.join("; "))) }
    }

    fn wrong(&mut self, problem: String) {
        self.wrong.push(problem);
    }

    fn unheeded(&mut self, problem: String) {
        self.unheeded.push(problem);
    }

    /// Names the known name that is nearest to an unknown one.
    fn unknown(&mut self, name: &str, known: impl Iterator<Item = &'static str>) {
        let nearest = known
            .filter(|known| !known.is_empty())
            .map(|known| (value::distance(name, known), known))
            .min()
            .filter(|(distance, _)| *distance <= 1 + name.len() / 4);
        let name = value::shown(name);
        self.unheeded(match nearest {
            Some((_, known)) => {
                format!("{name} is no setting of the agent and is ignored; is {known} meant?")
            }
            None => format!("{name} is no setting of the agent and is ignored"),
        });
    }
}
