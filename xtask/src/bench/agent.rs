//! Asks a sandbox's agent for its figures.
//!
//! This is one call of ttrpc spoken by hand, so that xtask need not be built with the whole protocol: a header of ten bytes
//! (length, stream, type, flags; big endian), then a protobuf message.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// vsock port of the agent.
const PORT: u32 = 1024;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// Bytes of memory resident in the agent of the sandbox whose state is in this directory.
pub(super) fn resident(sandbox: &Path) -> Result<u64> {
    let mut stream = dial(&socket(sandbox)?)?;
    stream.write_all(&request("grpc.AgentService", "GetMetrics"))?;
    let metrics = text_of(&response(&mut stream)?)?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("kata_agent_total_rss "));
    let bytes: f64 = line.context("the agent's figures have no kata_agent_total_rss")?.parse()?;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a process has less than 2^53 bytes"
    )]
    Ok(bytes as u64)
}

/// The unix socket that leads to the guest's ports, from `state.json`.
fn socket(sandbox: &Path) -> Result<PathBuf> {
    let file = sandbox.join("state.json");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let state: Value = serde_json::from_str(&text)?;
    match endpoint(&state) {
        Some(path) => Ok(path.into()),
        None => bail!("this machine's own vsock leads to the guest, and only unix sockets are spoken here"),
    }
}

/// Wherever in the state, an endpoint is an object of this kind.
fn endpoint(state: &Value) -> Option<String> {
    let object = state.as_object()?;
    if object.get("kind").is_some_and(|kind| kind == "hybrid") {
        return object.get("path")?.as_str().map(str::to_owned);
    }
    object.values().find_map(endpoint)
}

fn dial(socket: &Path) -> Result<UnixStream> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    writeln!(stream, "CONNECT {PORT}")?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("the guest refused the connection")?;
        answer.extend(byte);
    }
    ensure!(answer.starts_with(b"OK "), "the guest's door answered {:?}", String::from_utf8_lossy(&answer));
    Ok(stream)
}

/// `Request { service: 1, method: 2 }` with an empty payload, on stream 1.
fn request(service: &str, method: &str) -> Vec<u8> {
    let mut message = Vec::new();
    for (tag, text) in [(1u8, service), (2, method)] {
        message.push(tag << 3 | 2);
        message.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        message.extend_from_slice(text.as_bytes());
    }
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &1u32.to_be_bytes(), &[REQUEST, 0], &message].concat()
}

fn response(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let mut header = [0; 10];
    stream.read_exact(&mut header).context("the agent does not answer")?;
    let [a, b, c, d, _, _, _, _, kind, _] = header;
    ensure!(kind == RESPONSE, "the agent answered with a message of type {kind}");
    let mut message = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// From `Response { status: 1, payload: 2 }` with the payload `Metrics { metrics: 1 }`, the text.
fn text_of(response: &[u8]) -> Result<String> {
    let payload = field(response, 2).with_context(|| {
        let status = field(response, 1).unwrap_or_default();
        format!("the agent gave no figures: {}", String::from_utf8_lossy(status))
    })?;
    let text = field(payload, 1).context("the agent's figures are empty")?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// The content of a message's length-delimited field.
fn field(mut message: &[u8], wanted: u64) -> Option<&[u8]> {
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let value = varint(&mut message)?;
        if key & 7 == 2 {
            let (content, rest) = message.split_at_checked(usize::try_from(value).ok()?)?;
            if key >> 3 == wanted {
                return Some(content);
            }
            message = rest;
        }
    }
    None
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_responses() {
        assert_eq!(request("s", "mm"), [0, 0, 0, 7, 0, 0, 0, 1, 1, 0, 10, 1, b's', 18, 2, b'm', b'm']);
        let text = "x".repeat(200);
        let metrics = [&[10, 0xc8, 1], text.as_bytes()].concat();
        let answer = [&[10, 2, 8, 0, 18, 0xcb, 1][..], &metrics].concat();
        assert_eq!(text_of(&answer).unwrap(), text);
        let refused = [10, 6, 8, 5, 18, 2, b'n', b'o'];
        assert!(text_of(&refused).unwrap_err().to_string().contains("no"));
        assert!(field(&[18, 200], 2).is_none());
    }

    #[test]
    fn the_endpoint_is_found() {
        let state = serde_json::json!({"vm": {"endpoint": {"kind": "hybrid", "path": "/run/x/vsock.sock"}}});
        assert_eq!(endpoint(&state).unwrap(), "/run/x/vsock.sock");
        assert!(endpoint(&serde_json::json!({"endpoint": {"kind": "vsock", "cid": 3}})).is_none());
    }
}
