//! `bulkhead agent record`: a proxy before an agent that writes down every call.
//!
//! ```text
//! client ──► pump ──► agent      each pump forwards what it has read before it reads on, bytes unchanged,
//!        ◄── pump ◄──            and shows it to the connection's `Transcript`, which writes calls that ended
//! ```

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bulkhead_protocol::protobuf::Message as _;
use clap::Args;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use ttrpc::proto::{
    FLAG_NO_DATA, FLAG_REMOTE_CLOSED, FLAG_REMOTE_OPEN, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST,
    MESSAGE_TYPE_RESPONSE, Request, Response,
};

use super::{
    address::Address,
    api::{self, Method},
    frames::{Frame, Frames},
    trace::{self, Data, Entry, Status, Writer},
};
use crate::streams;

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;

/// Writes every call to an agent, with its time, to a file.
///
/// A proxy: callers connect to its socket instead of the agent's. Ends on SIGINT or SIGTERM.
#[derive(Debug, Args)]
pub(crate) struct Record {
    /// Where callers connect to: unix://SOCKET
    #[arg(long, value_name = "ADDRESS", value_parser = socket)]
    listen: PathBuf,
    /// Where the agent is: vsock://CID:PORT, hvsock://SOCKET:PORT or unix://SOCKET
    #[arg(long, value_name = "ADDRESS")]
    addr: Address,
    /// The file to make
    file: PathBuf,
}

fn socket(text: &str) -> Result<PathBuf> {
    let path = text.strip_prefix("unix://").context("use unix://SOCKET")?;
    ensure!(path.starts_with('/'), "use unix://SOCKET with an absolute path");
    Ok(path.into())
}

/// Forwards until a signal comes.
pub(crate) async fn run(record: Record) -> Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let recording = Arc::new(Recording {
        writer: Mutex::new(Writer::create(&record.file, record.addr.to_string())?),
        methods: api::methods(),
        began: Instant::now(),
    });
    let listener = UnixListener::bind(&record.listen)
        .with_context(|| format!("listen on unix://{}", record.listen.display()))?;
    fs::set_permissions(&record.listen, fs::Permissions::from_mode(0o600)).context("protect the socket")?;
    streams::say(&format!("recording {} on unix://{}", record.addr, record.listen.display()));
    let ended = tokio::select! {
        ended = accept(&listener, &record.addr, &recording) => ended,
        _ = interrupt.recv() => Ok(0),
        _ = terminate.recv() => Ok(0),
    };
    // What it was bound to is nobody's any more.
    let _ = fs::remove_file(&record.listen);
    ended
}

/// Takes connections; their ends are of no consequence to the others. Returns only on an error of the file or the socket.
async fn accept(listener: &UnixListener, address: &Address, recording: &Arc<Recording>) -> Result<u8> {
    let mut connections = JoinSet::new();
    for number in 0.. {
        let client = loop {
            tokio::select! {
                accepted = listener.accept() => break accepted.context("take a connection")?.0,
                Some(ended) = connections.join_next() => ended.context("forward a connection")??,
            }
        };
        let (address, recording) = (address.clone(), Arc::clone(recording));
        connections.spawn(async move { connect(client, &address, &recording, number).await });
    }
    Ok(0)
}

/// A connection from its beginning to its end.
async fn connect(
    client: UnixStream,
    address: &Address,
    recording: &Arc<Recording>,
    number: u64,
) -> Result<()> {
    let agent = match address.dial().await {
        Ok(agent) => agent,
        Err(error) => {
            streams::say(&crate::failure::line(&error.context(format!("connection {number}"))));
            return Ok(());
        }
    };
    // Dropped, also by the end of the program, it writes what has got no answer.
    let transcript =
        Mutex::new(Transcript { recording: Arc::clone(recording), number, open: HashMap::new() });
    let (client_reader, client_writer) = client.into_split();
    let (agent_reader, agent_writer) = tokio::io::split(agent);
    let to_agent = pump(client_reader, agent_writer, |frame, at| lock(&transcript).sent(frame, at));
    let to_client = pump(agent_reader, client_writer, |frame, at| lock(&transcript).answered(frame, at));
    tokio::try_join!(to_agent, to_client).map(drop)
}

/// One direction of a connection, to its end. Only what `seen` fails with is an error.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut seen: impl FnMut(Frame, Instant) -> Result<()>,
) -> Result<()> {
    let (mut frames, mut buffer) = (Frames::default(), vec![0; CHUNK]);
    while let Ok(length) = from.read(&mut buffer).await
        && length > 0
    {
        let at = Instant::now();
        // Before it is forwarded: its answer must find it.
        for frame in frames.take(&buffer[..length]) {
            seen(frame, at)?;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
    // The other end is to learn of the end, too, and may still have something to say.
    let _ = to.shutdown().await;
    Ok(())
}

/// What all connections share.
struct Recording {
    writer: Mutex<Writer>,
    methods: Vec<Method>,
    began: Instant,
}

impl Recording {
    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
    }

    fn write(&self, entry: &Entry) -> Result<()> {
        lock(&self.writer).write(entry)
    }
}

/// The calls of a connection that have not ended.
struct Transcript {
    recording: Arc<Recording>,
    number: u64,
    open: HashMap<u32, Entry>,
}

impl Transcript {
    fn sent(&mut self, frame: Frame, at: Instant) -> Result<()> {
        match frame.header.type_ {
            MESSAGE_TYPE_REQUEST => {
                let entry = self.request(&frame, at);
                if let Some(forgotten) = self.open.insert(frame.header.stream_id, entry) {
                    self.end(forgotten, at)?;
                }
                Ok(())
            }
            MESSAGE_TYPE_DATA => {
                self.data(&frame, at, false);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn answered(&mut self, frame: Frame, at: Instant) -> Result<()> {
        let stream = frame.header.stream_id;
        let closes = frame.header.flags & FLAG_REMOTE_CLOSED != 0;
        match frame.header.type_ {
            MESSAGE_TYPE_RESPONSE => {
                let Some(mut entry) = self.open.remove(&stream) else { return Ok(()) };
                self.response(&mut entry, &frame.payload.unwrap_or_default());
                self.end(entry, at)
            }
            MESSAGE_TYPE_DATA => {
                self.data(&frame, at, true);
                if !closes {
                    return Ok(());
                }
                let Some(mut entry) = self.open.remove(&stream) else { return Ok(()) };
                entry.reply = Some(trace::body(None, &[]));
                self.end(entry, at)
            }
            _ => Ok(()),
        }
    }

    fn request(&self, frame: &Frame, at: Instant) -> Entry {
        let mut entry = Entry {
            connection: self.number,
            stream: frame.header.stream_id,
            start_us: self.recording.micros(at),
            streaming: frame.header.flags & (FLAG_REMOTE_OPEN | FLAG_NO_DATA) != 0,
            ..Default::default()
        };
        let payload = frame.payload.as_deref().unwrap_or_default();
        let Some(request) = Request::parse_from_bytes(payload).ok().filter(|_| frame.payload.is_some())
        else {
            entry.request = trace::body(None, payload);
            return entry;
        };
        entry.method = format!("{}/{}", request.service, request.method);
        entry.timeout_ns = request.timeout_nano;
        entry.metadata = request.metadata.into_iter().map(|pair| (pair.key, pair.value)).collect();
        let method = trace::method(&self.recording.methods, &entry.method);
        entry.request = trace::body(method.map(|method| &method.input), &request.payload);
        entry
    }

    fn response(&self, entry: &mut Entry, payload: &[u8]) {
        let response = match Response::parse_from_bytes(payload) {
            Ok(response) => response,
            Err(_) => {
                entry.reply = Some(trace::body(None, payload));
                return;
            }
        };
        match response.status.as_ref().filter(|status| status.code.value() != 0) {
            Some(status) => {
                entry.status = Some(Status { code: status.code.value(), message: status.message.clone() });
            }
            None => {
                let method = trace::method(&self.recording.methods, &entry.method);
                entry.reply = Some(trace::body(method.map(|method| &method.output), &response.payload));
            }
        }
    }

    fn data(&mut self, frame: &Frame, at: Instant, from_agent: bool) {
        let at_us = self.recording.micros(at);
        let Some(entry) = self.open.get_mut(&frame.header.stream_id) else { return };
        entry.streaming = true;
        let data = BASE64.encode(frame.payload.as_deref().unwrap_or_default());
        entry.frames.push(Data { from_agent, at_us, flags: frame.header.flags, data });
    }

    fn end(&self, mut entry: Entry, at: Instant) -> Result<()> {
        entry.duration_us = self.recording.micros(at).saturating_sub(entry.start_us);
        self.recording.write(&entry)
    }
}

impl Drop for Transcript {
    fn drop(&mut self) {
        let mut open: Vec<Entry> = std::mem::take(&mut self.open).into_values().collect();
        open.sort_by_key(|entry| (entry.start_us, entry.stream));
        for entry in open {
            if let Err(error) = self.end(entry, Instant::now()) {
                streams::say(&crate::failure::line(&error));
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
