//! QEMU's control protocol: JSON objects, one a line. Answers are matched to commands by id; events go to a callback.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex as AsyncMutex, oneshot},
    task::JoinHandle,
    time::timeout,
};

use crate::Error;

/// Longest line taken from a VMM, which may have been broken into.
const LINE_BYTES: u64 = 1 << 20;

const HUNG_UP: &str = "QEMU hung up";

/// What a command comes to: its value, or QEMU's words.
type Answer = Result<Value, String>;
/// Commands that wait for their answer; `None` once QEMU has hung up.
type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>>;

/// A connection to QMP, ready for commands.
pub(super) struct Qmp {
    writer: AsyncMutex<OwnedWriteHalf>,
    pending: Pending,
    next_id: AtomicU64,
    /// How long an answer may take.
    bound: Duration,
    reader: JoinHandle<()>,
}

impl Qmp {
    /// Connects and negotiates. `event` hears every event's name and data; `bound` is for each answer, and does not hold
    /// for the greeting, which comes when QEMU has set up the machine.
    pub(super) async fn connect(
        path: &Path,
        bound: Duration,
        event: impl Fn(&str, &Value) + Send + 'static,
    ) -> Result<Qmp, Error> {
        let stream = UnixStream::connect(path).await;
        let stream = stream.map_err(Error::io(format!("connect to QMP at {}", path.display())))?;
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = read_message(&mut reader).await;
        if greeting.as_ref().is_none_or(|greeting| !greeting.contains_key("QMP")) {
            return Err(failed("greeting", "QEMU hung up or did not greet"));
        }
        let pending = Pending::new(Mutex::new(Some(HashMap::new())));
        let reader = tokio::spawn(read_answers(reader, Arc::clone(&pending), event));
        let qmp = Qmp { writer: AsyncMutex::new(writer), pending, next_id: AtomicU64::new(1), bound, reader };
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    /// Runs a command; `arguments` may be null.
    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        match self.pending().as_mut() {
            Some(pending) => pending.insert(id, reply),
            None => return Err(failed(command, HUNG_UP)),
        };
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let done = timeout(self.bound, async {
            let mut line = request.to_string();
            line.push('\n');
            // Far smaller than a socket's buffer, so a cancelled caller leaves all of it or none behind.
            self.writer.lock().await.write_all(line.as_bytes()).await.map_err(|error| error.to_string())?;
            answer.await.unwrap_or_else(|_| Err(HUNG_UP.to_owned()))
        })
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {:?}", self.bound)));
        if let Some(pending) = self.pending().as_mut() {
            pending.remove(&id);
        }
        done.map_err(|reason| failed(command, &reason))
    }

    fn pending(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn failed(command: &str, reason: &str) -> Error {
    Error::Qmp { command: command.to_owned(), reason: reason.to_owned() }
}

/// Hands out answers and events until QEMU hangs up; then every waiting command fails, by the drop of its sender.
async fn read_answers(
    mut reader: BufReader<OwnedReadHalf>,
    pending: Pending,
    event: impl Fn(&str, &Value) + Send,
) {
    while let Some(message) = read_message(&mut reader).await {
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            event(name, message.get("data").unwrap_or(&Value::Null));
            continue;
        }
        let waiting = message
            .get("id")
            .and_then(Value::as_u64)
            .and_then(|id| pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.remove(&id));
        match waiting {
            // The caller may have gone.
            Some(reply) => drop(reply.send(answer_of(&message))),
            None => tracing::debug!(?message, "QMP message for nobody"),
        }
    }
    pending.lock().unwrap_or_else(PoisonError::into_inner).take();
}

fn answer_of(message: &Map<String, Value>) -> Answer {
    match (message.get("return"), message.get("error")) {
        (Some(value), _) => Ok(value.clone()),
        (None, Some(error)) => Err(error["desc"].as_str().map_or_else(|| error.to_string(), str::to_owned)),
        (None, None) => Err("an answer without return and error".to_owned()),
    }
}

/// The next object, or `None` when QEMU hung up or does not speak the protocol.
async fn read_message(reader: &mut BufReader<OwnedReadHalf>) -> Option<Map<String, Value>> {
    let mut line = Vec::new();
    let read = reader.take(LINE_BYTES).read_until(b'\n', &mut line).await;
    if read.is_err() || line.last() != Some(&b'\n') {
        return None;
    }
    serde_json::from_slice(&line).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::net::UnixListener;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;

    /// A server that greets, and answers every command by `script`, which gets its name and id.
    fn server(
        greeting: &'static str,
        script: impl Fn(&str, u64) -> String + Send + 'static,
    ) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            writer.write_all(format!("{greeting}\r\n").as_bytes()).await.unwrap();
            let mut reader = BufReader::new(reader);
            while let Some(request) = read_message(&mut reader).await {
                let command = request["execute"].as_str().unwrap();
                let answer = match command {
                    "qmp_capabilities" => format!(r#"{{"return": {{}}, "id": {}}}"#, request["id"]),
                    _ => script(command, request["id"].as_u64().unwrap()),
                };
                if answer == "hang up" {
                    break;
                }
                writer.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
            }
        });
        (dir, path)
    }

    async fn connect(path: &Path) -> Result<Qmp, Error> {
        Qmp::connect(path, Duration::from_millis(300), |_, _| {}).await
    }

    #[tokio::test]
    async fn answers_find_their_commands_whatever_comes_between() {
        let (_dir, path) = server(GREETING, |command, id| match command {
            "query-status" => format!(
                "{}\n{}\n{}",
                r#"{"event": "RTC_CHANGE", "data": {"offset": 7}}"#,
                r#"{"return": "for nobody", "id": 999}"#,
                json!({ "return": { "status": "running" }, "id": id })
            ),
            _ => json!({ "error": { "class": "GenericError", "desc": "Device 'x' not found" }, "id": id })
                .to_string(),
        });
        let (heard, events) = mpsc::channel();
        let qmp = Qmp::connect(&path, Duration::from_secs(5), move |name, data| {
            heard.send((name.to_owned(), data.clone())).unwrap();
        });
        let qmp = qmp.await.unwrap();
        let (status, error) = tokio::join!(
            qmp.execute("query-status", Value::Null),
            qmp.execute("device_del", json!({ "id": "x" }))
        );
        assert_eq!(status.unwrap()["status"], "running");
        assert_eq!(error.unwrap_err().to_string(), "QMP device_del: Device 'x' not found");
        assert_eq!(events.recv().unwrap(), ("RTC_CHANGE".to_owned(), json!({ "offset": 7 })));
    }

    #[tokio::test]
    async fn a_server_that_hangs_up_fails_what_waits_and_what_comes() {
        let (_dir, path) = server(GREETING, |_, _| "hang up".to_owned());
        let qmp = connect(&path).await.unwrap();
        for _ in 0..2 {
            let error = qmp.execute("stop", Value::Null).await.unwrap_err();
            assert!(!error.to_string().contains("no answer"), "{error}");
        }
    }

    #[tokio::test]
    async fn silence_is_bounded() {
        let (_dir, path) = server(GREETING, |_, _| String::new());
        // The empty line is not JSON: the reader stops, which the command must notice too.
        let qmp = connect(&path).await.unwrap();
        assert!(qmp.execute("stop", Value::Null).await.is_err());

        let (_dir, path) = server(GREETING, |_, _| r#"{"event": "X"}"#.to_owned());
        let qmp = connect(&path).await.unwrap();
        let error = qmp.execute("stop", Value::Null).await.unwrap_err();
        assert_eq!(error.to_string(), "QMP stop: no answer within 300ms");
        assert!(qmp.pending().as_ref().unwrap().is_empty(), "forgotten commands");
    }

    #[tokio::test]
    async fn another_protocol_is_refused() {
        let (_dir, path) = server("SSH-2.0-OpenSSH_9.2", |_, _| String::new());
        let error = connect(&path).await.err().unwrap();
        assert!(error.to_string().starts_with("QMP greeting: "), "{error}");
    }
}
