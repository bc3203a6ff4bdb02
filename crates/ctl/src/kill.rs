//! `bulkhead kill`: a signal for a container's first process.

use std::str::FromStr as _;

use anyhow::{Context as _, Result, bail};
use bulkhead_protocol::agent::SignalProcessRequest;
use bulkhead_sandbox::Config;
use clap::Args;

use crate::{
    failure, name, run,
    running::{self, Running, bounded},
};

/// Sends a signal to a running container.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// The signal, by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = signal)]
    signal: u32,
    /// The container
    #[arg(value_parser = name::check)]
    name: String,
}

/// Sends the signal.
pub(crate) fn run(args: &Kill) -> Result<u8> {
    run::ensure_root()?;
    let config = Config::load()?;
    let running = running::find_alive(&config, &args.name)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(send(&running, args.signal)).with_context(|| format!("kill container {}", args.name))?;
    Ok(0)
}

/// Sends a signal to the container's first process; SIGKILL goes to all.
pub(crate) async fn send(running: &Running, signal: u32) -> Result<()> {
    let agent = running.agent().await?;
    let request =
        SignalProcessRequest { container_id: running.state.id.clone(), signal, ..Default::default() };
    agent
        .signal_process(bounded(running.bound()), &request)
        .await
        .map_err(|error| failure::agent("SignalProcess", &error))?;
    Ok(())
}

/// `TERM`, `SIGTERM`, `term`, `15`.
fn signal(text: &str) -> Result<u32> {
    let upper = text.to_ascii_uppercase();
    if let Ok(number) = upper.parse::<u32>() {
        return if (1..=64).contains(&number) {
            Ok(number)
        } else {
            bail!("signals are numbered from 1 to 64")
        };
    }
    let long = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let known =
        nix::sys::signal::Signal::from_str(&long).ok().with_context(|| format!("{text} is no signal"))?;
    Ok((known as i32).unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals() {
        for (text, number) in [("TERM", 15), ("SIGTERM", 15), ("int", 2), ("9", 9), ("64", 64)] {
            assert_eq!(signal(text).unwrap(), number);
        }
        for text in ["", "0", "65", "-1", "FOO", "SIG"] {
            assert!(signal(text).is_err(), "{text}");
        }
    }
}
