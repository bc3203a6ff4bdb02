//! The file of `record` and `replay`: one JSON object a line, described in docs/agent-tool.md.
//!
//! The first line is the [`Heading`], each further one an [`Entry`]: a call that has ended, in the order of the ends. A
//! message is JSON where that loses nothing, and else a string: its bytes in base64.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bulkhead_protocol::protobuf::reflect::MessageDescriptor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{api::Method, json};

/// The version of the format.
const VERSION: u32 = 1;

/// The first line.
#[derive(Debug, Deserialize, Serialize)]
struct Heading {
    bulkhead_agent_trace: u32,
    agent: String,
}

/// A call.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(crate) struct Entry {
    /// Which connection, counted from 0.
    pub(crate) connection: u64,
    /// The stream id on it.
    pub(crate) stream: u32,
    /// When the request had passed, in microseconds since the recording began.
    pub(crate) start_us: u64,
    /// How long until the reply had passed, or the connection had ended.
    pub(crate) duration_us: u64,
    /// `grpc.AgentService/CreateContainer`; empty when the frame was no request.
    pub(crate) method: String,
    /// The caller's time limit in nanoseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) timeout_ns: i64,
    /// The caller's metadata.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) metadata: Vec<(String, String)>,
    /// The request.
    pub(crate) request: Value,
    /// The reply of a call that succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reply: Option<Value>,
    /// The status of a call that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<Status>,
    /// The data frames of a stream.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) frames: Vec<Data>,
    /// Whether this is a stream, which cannot be replayed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) streaming: bool,
}

/// What a call failed with.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Status {
    /// The number of the code.
    pub(crate) code: i32,
    /// The text.
    pub(crate) message: String,
}

/// A data frame of a stream.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Data {
    /// Whether the agent sent it.
    pub(crate) from_agent: bool,
    /// When, as [`Entry::start_us`].
    pub(crate) at_us: u64,
    /// Its flags.
    pub(crate) flags: u8,
    /// Its payload in base64.
    pub(crate) data: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde wants it")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

impl Entry {
    /// Whether the connection ended before an answer came.
    pub(crate) fn is_unanswered(&self) -> bool {
        self.reply.is_none() && self.status.is_none()
    }

    /// When it ended.
    pub(crate) fn end_us(&self) -> u64 {
        self.start_us.saturating_add(self.duration_us)
    }
}

/// A message for the file.
pub(crate) fn body(message: Option<&MessageDescriptor>, bytes: &[u8]) -> Value {
    message.and_then(|message| lossless(message, bytes)).unwrap_or_else(|| BASE64.encode(bytes).into())
}

/// The message as JSON if nothing gets lost, as an unknown field would.
fn lossless(message: &MessageDescriptor, bytes: &[u8]) -> Option<Value> {
    let decoded = message.parse_from_bytes(bytes).ok()?;
    let shown = json::show(&*decoded, false).ok()?;
    let again = json::of_value(message, shown.clone()).ok()?;
    message.eq(&*decoded, &*again).then_some(shown)
}

/// The bytes of a message in the file.
pub(crate) fn bytes(message: Option<&MessageDescriptor>, body: &Value) -> Result<Vec<u8>> {
    match (body, message) {
        (Value::String(text), _) => BASE64.decode(text).context("a message that is neither JSON nor base64"),
        (value, Some(message)) => Ok(json::of_value(message, value.clone())?.write_to_bytes_dyn()?),
        (_, None) => bail!("a message of an unknown method that is not base64"),
    }
}

/// The request's message of a recorded method, if it is one of the API.
pub(crate) fn method<'a>(methods: &'a [Method], path: &str) -> Option<&'a Method> {
    methods.iter().find(|method| method.path() == path)
}

/// A file that is being written.
pub(crate) struct Writer {
    file: File,
}

impl Writer {
    /// Makes the file. It is its owner's alone, since requests carry environments and files.
    pub(crate) fn create(path: &Path, agent: String) -> Result<Writer> {
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(path);
        let mut writer = Writer { file: file.with_context(|| format!("create {}", path.display()))? };
        writer.line(&Heading { bulkhead_agent_trace: VERSION, agent })?;
        Ok(writer)
    }

    /// Writes a call.
    pub(crate) fn write(&mut self, entry: &Entry) -> Result<()> {
        self.line(entry)
    }

    /// One write a line, so that whoever kills us cuts at most the last one.
    fn line(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line).context("write the recording")?;
        text.push(b'\n');
        self.file.write_all(&text).context("write the recording")
    }
}

/// A file's calls in the order of their starts; whether its last line was cut off and left out.
pub(crate) fn parse(text: &[u8]) -> Result<(Vec<Entry>, bool)> {
    let complete = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let mut lines = text[..complete].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let heading = lines.next().and_then(|line| serde_json::from_slice::<Heading>(line).ok());
    let heading = heading.context("this is no recording of `bulkhead agent record`")?;
    let version = heading.bulkhead_agent_trace;
    ensure!(version == VERSION, "the recording has version {version}; this program knows {VERSION}");
    let mut entries = Vec::new();
    for (number, line) in lines.enumerate() {
        let entry =
            serde_json::from_slice(line).with_context(|| format!("line {} of the recording", number + 2));
        entries.push(entry?);
    }
    entries.sort_by_key(|entry: &Entry| (entry.start_us, entry.connection, entry.stream));
    Ok((entries, complete < text.len()))
}

/// Any file is read or refused, and so are the messages in it.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let Ok((entries, _)) = parse(data) else { return };
    let methods = super::api::methods();
    for entry in entries {
        let found = method(&methods, &entry.method);
        let _ = (entry.end_us(), entry.is_unanswered());
        let _ = bytes(found.map(|method| &method.input), &entry.request);
        if let Some(reply) = &entry.reply {
            let _ = bytes(found.map(|method| &method.output), reply);
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::{
        agent::{CopyFileRequest, WriteStreamRequest},
        protobuf::{Message as _, MessageFull as _},
    };

    use super::*;

    #[test]
    fn a_message_survives_the_file() {
        let copy = CopyFileRequest { path: "/x".into(), data: vec![0, 1, 255], ..Default::default() };
        let wire = copy.write_to_bytes().unwrap();
        let shown = body(Some(&CopyFileRequest::descriptor()), &wire);
        assert_eq!(shown["data"], "AAH/");
        assert_eq!(bytes(Some(&CopyFileRequest::descriptor()), &shown).unwrap(), wire);
        // Field 8 is unknown to this message, and must not get lost.
        let kept = body(Some(&WriteStreamRequest::descriptor()), &wire);
        assert!(kept.is_string());
        assert_eq!(bytes(None, &kept).unwrap(), wire);
        assert!(bytes(None, &shown).is_err());
    }

    #[test]
    fn a_file_is_read_as_it_was_written_but_for_a_cut_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace");
        let mut writer = Writer::create(&path, "unix:///x".into()).unwrap();
        assert!(Writer::create(&path, String::new()).is_err(), "a recording is not overwritten");
        let status = Some(Status { code: 5, message: "gone\n\"x\"".into() });
        let late = Entry { start_us: 9, method: "a/b".into(), status, ..Default::default() };
        let early = Entry { start_us: 2, metadata: vec![("k".into(), "v".into())], ..Default::default() };
        writer.write(&late).unwrap();
        writer.write(&early).unwrap();
        let mut text = std::fs::read(&path).unwrap();
        assert_eq!(parse(&text).unwrap(), (vec![early.clone(), late.clone()], false));
        text.truncate(text.len() - 3);
        assert_eq!(parse(&text).unwrap(), (vec![late], true));
        assert!(parse(b"{}\n").is_err() && parse(b"").is_err());
        assert!(parse(b"{\"bulkhead_agent_trace\":2,\"agent\":\"\"}\n").is_err());
    }

    /// Whatever a file contains, it is read or refused.
    #[test]
    fn nonsense_is_refused() {
        let heading = b"{\"bulkhead_agent_trace\":1,\"agent\":\"\"}\n".to_vec();
        for line in [&b"x\n"[..], b"{\"start_us\": -1}\n", b"\xff\n", b"[]\n"] {
            assert!(parse(&[heading.as_slice(), line].concat()).is_err());
        }
    }

    #[test]
    fn the_corpus_breaks_nothing() {
        for file in std::fs::read_dir("../../fuzz/corpus/recording").unwrap() {
            fuzz(&std::fs::read(file.unwrap().path()).unwrap());
        }
    }
}
