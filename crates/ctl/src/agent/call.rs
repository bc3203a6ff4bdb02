//! `bulkhead agent call`: one call, its request and its reply as JSON.

use std::{
    io::{Read as _, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_protocol::status;
use clap::Args;
use ttrpc::{
    r#async::{Client, transport::Socket},
    proto::{KeyValue, Request},
};

use super::{address::Address, api, json};

/// Calls a method of an agent; request and reply are JSON.
///
/// Exits with 0 when the call succeeded, with 1 otherwise; the status is on the standard error then.
#[derive(Debug, Args)]
pub(crate) struct Call {
    /// Where the agent is: vsock://CID:PORT, hvsock://SOCKET:PORT or unix://SOCKET
    #[arg(long, value_name = "ADDRESS", conflicts_with = "pod")]
    addr: Option<Address>,
    /// The sandbox whose agent is meant; not needed when only one runs
    #[arg(long, value_name = "NAME|ID")]
    pod: Option<String>,
    /// How long the call may take, in seconds; 0 is forever
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    timeout: Duration,
    /// Send metadata along
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// List the methods with their messages instead
    #[arg(long, exclusive = true)]
    list: bool,
    /// CreateContainer, Health.Check, grpc.AgentService/CreateContainer
    #[arg(required_unless_present = "list")]
    method: Option<String>,
    /// The request: JSON, @FILE, or @- for the standard input; nothing is the empty request
    #[arg(value_name = "JSON|@FILE")]
    request: Option<String>,
}

/// Calls, and prints the reply.
pub(crate) async fn run(call: &Call) -> Result<u8> {
    let Some(method) = &call.method else {
        return print(&list());
    };
    let method = api::find(method)?;
    let request = json::read(&method.input, &text(call.request.as_deref().unwrap_or_default())?)?;
    let address = match &call.addr {
        Some(address) => address.clone(),
        None => Address::of_pod(call.pod.as_deref())?,
    };
    let request = Request {
        service: method.service.clone(),
        method: method.name.clone(),
        payload: request.write_to_bytes_dyn().context("encode the request")?,
        timeout_nano: i64::try_from(call.timeout.as_nanos()).unwrap_or(i64::MAX),
        metadata: call.metadata.iter().map(key_value).collect(),
        ..Default::default()
    };
    let client = Client::new(Socket::new(address.dial().await?));
    let response = match client.request(request).await {
        Ok(response) => response,
        Err(ttrpc::Error::RpcStatus(status)) => {
            let code = format!("{:?} ({})", status.code(), status.code.value());
            bail!("{}: {code}: {}", method.name, status::message(&ttrpc::Error::RpcStatus(status)))
        }
        Err(error) => bail!("{}: no answer from {address}: {error}", method.name),
    };
    let reply = method.output.parse_from_bytes(&response.payload);
    let reply = reply.with_context(|| format!("the reply is no {}", method.output.name()))?;
    print(&(serde_json::to_string_pretty(&json::show(&*reply, true)?)? + "\n"))
}

fn print(text: &str) -> Result<u8> {
    std::io::stdout().write_all(text.as_bytes()).context("write to the standard output")?;
    Ok(0)
}

fn list() -> String {
    let line = |method: api::Method| {
        format!("{} {} -> {}\n", method.path(), method.input.full_name(), method.output.full_name())
    };
    api::methods().into_iter().map(line).collect()
}

/// The request's text, from wherever it is.
fn text(argument: &str) -> Result<String> {
    match argument.strip_prefix('@') {
        None => Ok(argument.to_owned()),
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("read the request from the standard input")?;
            Ok(text)
        }
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("read the request from {file}")),
    }
}

fn key_value((key, value): &(String, String)) -> KeyValue {
    KeyValue { key: key.clone(), value: value.clone(), ..Default::default() }
}

fn seconds(text: &str) -> Result<Duration> {
    let seconds: f64 = text.parse().context("a number of seconds is expected")?;
    Duration::try_from_secs_f64(seconds).context("a number of seconds is expected")
}

fn pair(text: &str) -> Result<(String, String)> {
    let (key, value) = text.split_once('=').context("KEY=VALUE is expected")?;
    ensure!(!key.is_empty(), "KEY=VALUE is expected");
    // Peers look keys up in lower case.
    Ok((key.to_lowercase(), value.to_owned()))
}
