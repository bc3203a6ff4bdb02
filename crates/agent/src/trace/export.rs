//! The way of spans to the collector.

use std::{
    fmt::Write,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    sync::mpsc,
};
use tokio_vsock::{VsockAddr, VsockStream};

use super::{Message, context::Parent};
use crate::{json::quote, server::Address};

/// The pauses between attempts to reach a collector that is away: nothing tells when it is back.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A request that was handled.
pub(super) struct Finished {
    /// Which one.
    pub(super) name: &'static str,
    /// The span's own number.
    pub(super) id: u64,
    /// Where it belongs.
    pub(super) parent: Parent,
    /// When it came.
    pub(super) start: SystemTime,
    /// When it was answered.
    pub(super) end: SystemTime,
    /// Why it failed, if it did.
    pub(super) failure: Option<String>,
}

/// Sends what comes until nothing can come any more. While there is no collector this waits, and the queue fills.
pub(super) async fn run(address: Address, mut queue: mpsc::Receiver<Message>, dropped: Arc<AtomicU64>) {
    let mut connection = None;
    while let Some(message) = queue.recv().await {
        match message {
            Message::Span(span) => deliver(&address, &mut connection, &span.frame()).await,
            // Whoever waited has given up.
            Message::Flush(done) => done.send(()).unwrap_or_default(),
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!(spans = lost, "spans were dropped while the collector was away or slow");
        }
    }
}

type Connection = Box<dyn AsyncWrite + Send + Unpin>;

/// Sends one frame, over a new connection when the old one has failed.
async fn deliver(address: &Address, connection: &mut Option<Connection>, frame: &[u8]) {
    let mut pause = FIRST_PAUSE;
    loop {
        if connection.is_none() {
            match connect(address).await {
                Ok(made) => *connection = Some(made),
                Err(error) => {
                    if pause == FIRST_PAUSE {
                        tracing::warn!(%address, %error, "no collector takes spans");
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        if let Some(open) = connection {
            match open.write_all(frame).await {
                Ok(()) => return,
                // A frame that was cut off ends with its connection.
                Err(_) => *connection = None,
            }
        }
    }
}

async fn connect(address: &Address) -> io::Result<Connection> {
    Ok(match address {
        Address::Vsock { cid, port } => Box::new(VsockStream::connect(VsockAddr::new(*cid, *port)).await?),
        Address::Unix(path) => match path.strip_prefix('@') {
            Some(name) => Box::new(UnixStream::connect(format!("\0{name}")).await?),
            None => Box::new(UnixStream::connect(path).await?),
        },
    })
}

impl Finished {
    /// The span with its length before it.
    fn frame(&self) -> Vec<u8> {
        let json = self.json();
        let mut frame = (json.len() as u64).to_be_bytes().to_vec();
        frame.extend_from_slice(json.as_bytes());
        frame
    }

    /// The fields of a span as the OpenTelemetry SDK for Rust 0.14 has them, which collectors read.
    fn json(&self) -> String {
        let Parent { trace, span, state, .. } = &self.parent;
        let mut json =
            format!("{{\"span_context\":{{\"trace_id\":{trace},\"span_id\":{},\"trace_flags\":1", self.id);
        json.push_str(",\"is_remote\":false,\"trace_state\":");
        for (n, (key, value)) in state.iter().enumerate() {
            json.push_str(if n == 0 { "[[" } else { ",[" });
            quote(&mut json, key);
            json.push(',');
            quote(&mut json, value);
            json.push(']');
        }
        json.push_str(if state.is_empty() { "null" } else { "]" });
        // Writing to a string cannot fail.
        let _ =
            write!(json, "}},\"parent_span_id\":{span},\"span_kind\":\"Server\",\"name\":\"{}\"", self.name);
        time(&mut json, "start_time", self.start);
        time(&mut json, "end_time", self.end);
        json.push_str(concat!(
            r#","attributes":{"map":{"rpc.system":{"String":"ttrpc"},"rpc.service":{"String":"grpc.AgentService"}},"#,
            r#""evict_list":["rpc.service","rpc.system"],"max_len":128,"dropped_count":0}"#,
            r#","events":{"queue":null,"max_len":128,"dropped_count":0}"#,
            r#","links":{"queue":null,"max_len":128,"dropped_count":0}"#,
        ));
        let code = if self.failure.is_none() { "Ok" } else { "Error" };
        let _ = write!(json, ",\"status_code\":\"{code}\",\"status_message\":");
        quote(&mut json, self.failure.as_deref().unwrap_or(""));
        json.push_str(r#","resource":{"attrs":{"service.name":{"String":"bulkhead-agent"}}}}"#);
        json
    }
}

fn time(json: &mut String, name: &str, time: SystemTime) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (seconds, nanoseconds) = (since.as_secs(), since.subsec_nanos());
    // Writing to a string cannot fail.
    let _ =
        write!(json, ",\"{name}\":{{\"secs_since_epoch\":{seconds},\"nanos_since_epoch\":{nanoseconds}}}");
}

#[cfg(any(test, fuzzing))]
impl Finished {
    /// Whether it is JSON; the numbers of traces are larger than those of most readers.
    pub(super) fn fuzz(&self) {
        let read = serde_json::from_str::<serde_json::Value>(&self.json());
        assert!(read.is_ok(), "{}: {read:?}", self.json());
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncReadExt,
        net::{UnixListener, UnixStream},
        sync::oneshot,
    };

    use super::*;

    fn span(name: &'static str) -> Finished {
        Finished {
            name,
            id: u64::MAX,
            parent: Parent {
                trace: u128::MAX,
                span: 5,
                sampled: true,
                state: vec![("a".into(), "\"".into())],
            },
            start: UNIX_EPOCH + Duration::new(3, 4),
            end: UNIX_EPOCH + Duration::new(5, 6),
            failure: None,
        }
    }

    #[test]
    fn a_span_has_the_fields_that_collectors_read() {
        let expected = concat!(
            r#"{"span_context":{"trace_id":340282366920938463463374607431768211455,"span_id":18446744073709551615,"#,
            r#""trace_flags":1,"is_remote":false,"trace_state":[["a","\""]]},"parent_span_id":5,"span_kind":"Server","#,
            r#""name":"create_container","start_time":{"secs_since_epoch":3,"nanos_since_epoch":4},"#,
            r#""end_time":{"secs_since_epoch":5,"nanos_since_epoch":6},"#,
            r#""attributes":{"map":{"rpc.system":{"String":"ttrpc"},"rpc.service":{"String":"grpc.AgentService"}},"#,
            r#""evict_list":["rpc.service","rpc.system"],"max_len":128,"dropped_count":0},"#,
            r#""events":{"queue":null,"max_len":128,"dropped_count":0},"#,
            r#""links":{"queue":null,"max_len":128,"dropped_count":0},"#,
            r#""status_code":"Ok","status_message":"","#,
            r#""resource":{"attrs":{"service.name":{"String":"bulkhead-agent"}}}}"#,
        );
        assert_eq!(span("create_container").json(), expected);
        let failed = Finished { failure: Some("no \"x\"".into()), ..span("x") };
        assert!(failed.json().contains(r#""status_code":"Error","status_message":"no \"x\"""#));
        let plain = Finished { parent: Parent { state: Vec::new(), ..span("x").parent }, ..span("x") };
        assert!(plain.json().contains(r#""trace_state":null}"#));
        let frame = span("x").frame();
        assert_eq!(u64::from_be_bytes(frame[..8].try_into().unwrap()), (frame.len() - 8) as u64);
    }

    async fn receive(connection: &mut UnixStream) -> String {
        let length = connection.read_u64().await.unwrap();
        let mut json = vec![0; usize::try_from(length).unwrap()];
        connection.read_exact(&mut json).await.unwrap();
        String::from_utf8(json).unwrap()
    }

    #[tokio::test]
    async fn a_collector_that_comes_late_or_comes_back_gets_the_spans() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("collector");
        let (spans, queue) = mpsc::channel(8);
        let address = Address::Unix(path.to_str().unwrap().into());
        let task = tokio::spawn(run(address, queue, Arc::default()));
        let send =
            |name| spans.try_send(Message::Span(Box::new(span(name)))).unwrap_or_else(|_| panic!("no room"));
        send("before");
        let listener = UnixListener::bind(&path).unwrap();
        let (mut connection, _) = listener.accept().await.unwrap();
        assert!(receive(&mut connection).await.contains("\"before\""));
        send("connected");
        assert!(receive(&mut connection).await.contains("\"connected\""));
        drop(connection);
        send("again");
        let (mut connection, _) = listener.accept().await.unwrap();
        assert!(receive(&mut connection).await.contains("\"again\""));
        let (flush, flushed) = oneshot::channel();
        spans.send(Message::Flush(flush)).await.unwrap_or_else(|_| panic!("the task has ended"));
        flushed.await.unwrap();
        drop(spans);
        task.await.unwrap();
    }
}
