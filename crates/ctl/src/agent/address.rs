//! Where an agent is: an address that the user wrote, or that of a sandbox of this host.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_hypervisor::{Connection, Endpoint};
use bulkhead_protocol::ports;
use bulkhead_sandbox::Config;

use crate::running::{self, Running};

/// An agent's endpoint and port.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Address {
    endpoint: Endpoint,
    port: u32,
    /// How long the guest may take to take a connection; not at all for what the user wrote himself.
    patience: Option<Duration>,
}

impl Address {
    /// The address of a running sandbox: the one of this name or id, or the only one.
    pub(crate) fn of_pod(name: Option<&str>) -> Result<Address> {
        let config = Config::load()?;
        let alive: Vec<Running> = running::all(&config)?.into_iter().filter(Running::is_alive).collect();
        let running = choose(&alive, name)?;
        let endpoint = running.state.endpoint.clone();
        Ok(Address { endpoint, port: ports::AGENT, patience: Some(running.bound()) })
    }

    /// A connection.
    pub(crate) async fn dial(&self) -> Result<Connection> {
        let dialed = match self.patience {
            Some(patience) => self.endpoint.dial_within(self.port, patience).await,
            None => self.endpoint.dial(self.port).await,
        };
        dialed.with_context(|| format!("reach the agent at {self}"))
    }
}

fn choose<'a>(alive: &'a [Running], name: Option<&str>) -> Result<&'a Running> {
    let Some(name) = name else {
        ensure!(!alive.is_empty(), "no sandbox runs here; say which agent is meant with --addr");
        let [only] = alive else {
            let names: Vec<&str> = alive.iter().map(Running::name).collect();
            bail!("{} sandboxes run here; choose one with --pod: {}", names.len(), names.join(", "))
        };
        return Ok(only);
    };
    let named = |running: &&Running| running.name() == name || running.state.id == name;
    alive
        .iter()
        .find(named)
        .with_context(|| format!("no sandbox named {name} runs; `bulkhead ps` lists them"))
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Address> {
        let usage = "use vsock://CID:PORT, hvsock://SOCKET:PORT or unix://SOCKET";
        let (kind, rest) = text.split_once("://").with_context(|| format!("{text:?}: {usage}"))?;
        let with_port = || -> Result<(&str, u32)> {
            let (place, port) =
                rest.rsplit_once(':').with_context(|| format!("{text:?} has no port; {usage}"))?;
            Ok((place, port.parse().with_context(|| format!("{port:?} is no port; {usage}"))?))
        };
        let (endpoint, port) = match kind {
            "unix" => {
                ensure!(!rest.is_empty(), "{text:?} names no socket; {usage}");
                // The kernel's name of an abstract socket begins with a zero byte.
                let path = rest.strip_prefix('@').map_or(rest.to_owned(), |name| format!("\0{name}"));
                (Endpoint::Unix { path: path.into() }, ports::AGENT)
            }
            "hvsock" => {
                let (path, port) = with_port()?;
                ensure!(!path.is_empty(), "{text:?} names no socket; {usage}");
                (Endpoint::Hybrid { path: path.into() }, port)
            }
            "vsock" => {
                let (cid, port) = with_port()?;
                let cid = cid.parse().with_context(|| format!("{cid:?} is no context id; {usage}"))?;
                (Endpoint::Vsock { cid }, port)
            }
            _ => bail!("{kind:?} is no kind of address; {usage}"),
        };
        Ok(Address { endpoint, port, patience: None })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Vsock { cid } => write!(f, "vsock://{cid}:{}", self.port),
            Endpoint::Hybrid { path } => write!(f, "hvsock://{}:{}", path.display(), self.port),
            Endpoint::Unix { path } => {
                write!(f, "unix://{}", path.to_string_lossy().replacen('\0', "@", 1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        for text in
            ["vsock://3:1024", "hvsock:///run/vm.sock:1024", "unix:///run/agent.sock", "unix://@abstract"]
        {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for (text, reason) in [
            ("", "use vsock://"),
            ("/run/agent.sock", "use vsock://"),
            ("tcp://x:1", "no kind of address"),
            ("vsock://x:1", "no context id"),
            ("vsock://3", "has no port"),
            ("hvsock:///run/x:y", "no port"),
            ("hvsock://:1", "names no socket"),
            ("unix://", "names no socket"),
        ] {
            let error = format!("{:#}", text.parse::<Address>().unwrap_err());
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }
}
