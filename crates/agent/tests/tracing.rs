//! Spans of a real agent, as the collector of the host gets them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "other tests use the rest")]
mod support;

use std::{path::PathBuf, time::Duration};

use bulkhead_protocol::agent::*;
use support::{Agent, cannot_run, context};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
};
use ttrpc::context::Context;

const PATIENCE: Duration = Duration::from_secs(60);
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
/// The same numbers as JSON has them.
const TRACE: &str = "\"trace_id\":14576827793038113322513871894673895836,";
const SPAN: &str = "\"parent_span_id\":13235353014750950193,";

struct Collector {
    _directory: tempfile::TempDir,
    path: PathBuf,
    listener: UnixListener,
}

impl Collector {
    fn new() -> Collector {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("collector.sock");
        let listener = UnixListener::bind(&path).unwrap();
        Collector { _directory: directory, path, listener }
    }

    async fn accept(&self) -> UnixStream {
        tokio::time::timeout(PATIENCE, self.listener.accept()).await.expect("no spans come").unwrap().0
    }

    fn settings(&self, tracing: bool) -> String {
        format!("tracing = {tracing}\ntrace_addr = \"unix://{}\"\n", self.path.display())
    }
}

/// The next span; `None` at the end.
async fn span(connection: &mut UnixStream) -> Option<(String, serde_json::Value)> {
    let read = async {
        let length = connection.read_u64().await.ok()?;
        let mut json = vec![0; usize::try_from(length).unwrap()];
        connection.read_exact(&mut json).await.unwrap();
        let text = String::from_utf8(json).unwrap();
        let value = serde_json::from_str(&text).unwrap();
        Some((text, value))
    };
    tokio::time::timeout(PATIENCE, read).await.expect("no span comes")
}

fn traced(parent: &str) -> Context {
    let mut context = context();
    context.add("traceparent".into(), parent.into());
    context.add("tracestate".into(), "vendor=note".into());
    context
}

async fn start(agent: &Agent, context: Context) {
    let request = StartContainerRequest { container_id: "nobody".into(), ..Default::default() };
    agent.client.start_container(context, &request).await.unwrap_err();
}

#[tokio::test]
async fn each_request_has_a_span_in_the_trace_of_its_sender() {
    if let Some(reason) = cannot_run() {
        return eprintln!("skipped: {reason}");
    }
    let collector = Collector::new();
    let agent = Agent::start_with(&collector.settings(true)).await;
    start(&agent, traced(PARENT)).await;
    let mut connection = collector.accept().await;
    let (text, value) = span(&mut connection).await.unwrap();
    assert!(text.contains(TRACE) && text.contains(SPAN), "{text}");
    assert_eq!(value["name"], "start_container");
    assert_eq!(value["status_code"], "Error");
    assert!(value["status_message"].as_str().unwrap().contains("nobody"));
    assert_eq!(value["span_context"]["trace_state"], serde_json::json!([["vendor", "note"]]));
    let time = |key: &str| {
        (value[key]["secs_since_epoch"].as_u64().unwrap(), value[key]["nanos_since_epoch"].as_u64().unwrap())
    };
    assert!(time("start_time") <= time("end_time"));

    // Streams have no spans, nor has what its sender does not sample; a request without a trace begins one.
    let read = ReadStreamRequest { container_id: "nobody".into(), len: 1, ..Default::default() };
    agent.client.read_stdout(traced(PARENT), &read).await.unwrap_err();
    start(&agent, traced(&PARENT.replace("-01", "-00"))).await;
    agent.client.get_guest_details(context(), &GuestDetailsRequest::new()).await.unwrap();
    let (text, value) = span(&mut connection).await.unwrap();
    assert_eq!((&value["name"], &value["status_code"]), (&"get_guest_details".into(), &"Ok".into()));
    assert!(!text.contains(TRACE) && value["parent_span_id"] == 0, "{text}");

    // A collector that went away gets what comes next on a new connection. A first span may be lost in the old one.
    drop(connection);
    start(&agent, traced(PARENT)).await;
    start(&agent, traced(PARENT)).await;
    let mut connection = collector.accept().await;
    assert!(span(&mut connection).await.unwrap().0.contains(TRACE));

    // The last request's span gets out before the agent ends.
    assert!(agent.destroy().await.success());
    let mut last = None;
    while let Some((_, value)) = span(&mut connection).await {
        last = Some(value["name"].clone());
    }
    assert_eq!(last.unwrap(), "destroy_sandbox");
}

#[tokio::test]
async fn without_tracing_nobody_is_called() {
    if let Some(reason) = cannot_run() {
        return eprintln!("skipped: {reason}");
    }
    let collector = Collector::new();
    let agent = Agent::start_with(&collector.settings(false)).await;
    start(&agent, traced(PARENT)).await;
    assert!(agent.destroy().await.success());
    let waiting =
        std::future::poll_fn(|context| std::task::Poll::Ready(collector.listener.poll_accept(context))).await;
    assert!(waiting.is_pending());
}

#[tokio::test]
async fn a_collector_that_is_not_there_delays_no_request_and_not_the_end() {
    if let Some(reason) = cannot_run() {
        return eprintln!("skipped: {reason}");
    }
    let agent = Agent::start_with("tracing = true\ntrace_addr = 'unix:///does/not/exist'\n").await;
    // More than the queue takes.
    for _ in 0..1500 {
        start(&agent, traced(PARENT)).await;
    }
    let ended = tokio::time::timeout(PATIENCE, agent.destroy()).await.expect("it hangs");
    assert!(ended.success());
}
