//! QEMU's control protocol, as far as a test needs it: one command at a time, and events kept until somebody asks.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// A command or an event that takes longer does not come.
const BOUND: Duration = Duration::from_secs(30);

/// A connection ready for commands.
pub(super) struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and negotiates.
    pub(super) fn connect(path: &Path) -> anyhow::Result<Qmp> {
        let stream = UnixStream::connect(path).context("connecting to QMP")?;
        stream.set_read_timeout(Some(BOUND))?;
        let mut qmp = Qmp { reader: BufReader::new(stream), events: VecDeque::new() };
        qmp.read().context("QMP's greeting")?;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs a command; `arguments` may be null. An error has QEMU's words.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        writeln!(self.reader.get_mut(), "{request}").with_context(|| format!("QMP {command}"))?;
        loop {
            let mut message = self.read().with_context(|| format!("QMP {command}"))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message.get("return").is_some() {
                return Ok(message["return"].take());
            } else {
                bail!("QMP {command} {arguments}: {}", message["error"]["desc"]);
            }
        }
    }

    /// Waits for an event for which `wanted` holds. What comes before it is dropped.
    pub(super) fn event(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        loop {
            let message = match self.events.pop_front() {
                Some(message) => message,
                None => self.read().with_context(|| format!("waiting for the QMP event {name}"))?,
            };
            if message["event"] == name && wanted(&message["data"]) {
                return Ok(message);
            }
        }
    }

    fn read(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU hung up");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
