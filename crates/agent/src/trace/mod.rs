//! Tracing: a span for each request, in the trace of the host that sent it. Off unless asked for, and then free.
//!
//! ```text
//! request ──► Span ──end──► queue ──► one task ──► the collector on the host
//! ```
//! The queue is bounded: while the collector is away spans are dropped and counted, and no request waits. Each span is
//! sent as eight bytes of length, the most significant first, and JSON of the fields that collectors of such spans expect.

mod context;
mod export;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::TtrpcContext;

use crate::{config::Config, error::Result, server::Address};

use context::Parent;
use export::Finished;

/// So many spans wait for the collector.
const QUEUE: usize = 1024;
/// The end of the agent waits this long for spans to get out.
const FAREWELL: Duration = Duration::from_secs(2);

/// Requests that come often, or wait for long, and would tell nothing.
const UNTRACED: [&str; 6] = [
    "write_stdin",
    "read_stdout",
    "read_stderr",
    "get_oom_event",
    "mem_agent_compact_set",
    "mem_agent_memcg_set",
];

/// Where spans go.
#[derive(Clone, Default)]
pub(crate) struct Tracer {
    queue: Option<Arc<Queue>>,
}

struct Queue {
    spans: mpsc::Sender<Message>,
    /// Spans that found no room, until that is told.
    dropped: Arc<AtomicU64>,
}

enum Message {
    Span(Box<Finished>),
    /// To be answered once all that came before has been sent.
    Flush(oneshot::Sender<()>),
}

/// A request that is being handled. One that is given up, since its client has hung up, ends as it is dropped.
pub(crate) struct Span {
    queue: Arc<Queue>,
    span: Option<Box<Finished>>,
}

impl Tracer {
    /// Starts the task that sends, when tracing is asked for; has to be called on the runtime then.
    pub(crate) fn start(config: &Config) -> Result<Tracer> {
        if !config.tracing {
            return Ok(Tracer::default());
        }
        let address = Address::parse(&config.trace_address)?;
        let (spans, received) = mpsc::channel(QUEUE);
        let dropped = Arc::<AtomicU64>::default();
        crate::sync::spawn(export::run(address, received, Arc::clone(&dropped)));
        Ok(Tracer { queue: Some(Arc::new(Queue { spans, dropped })) })
    }

    /// Begins the span of a request; `None` while tracing is off, and for a request that its sender does not trace.
    pub(crate) fn begin(&self, method: &'static str, context: &TtrpcContext) -> Option<Span> {
        let queue = self.queue.as_ref()?;
        if UNTRACED.contains(&method) {
            return None;
        }
        let parent = Parent::of(&context.metadata);
        if !parent.sampled {
            return None;
        }
        let span = Finished {
            name: method,
            id: random(),
            parent,
            start: SystemTime::now(),
            end: SystemTime::UNIX_EPOCH,
            failure: Some("given up: the client hung up, or its time ran out".into()),
        };
        Some(Span { queue: Arc::clone(queue), span: Some(Box::new(span)) })
    }

    /// Waits a while for the spans so far to get out.
    pub(crate) async fn flush(&self) {
        let Some(queue) = &self.queue else { return };
        let flushed = async {
            let (flush, flushed) = oneshot::channel();
            if queue.spans.send(Message::Flush(flush)).await.is_ok() {
                // The task never ends before the queue does.
                let _ = flushed.await;
            }
        };
        if tokio::time::timeout(FAREWELL, flushed).await.is_err() {
            tracing::warn!("the collector of spans did not take the last of them");
        }
    }
}

impl Span {
    /// Ends it.
    pub(crate) fn end<T>(mut self, result: &Result<T>) {
        if let Some(span) = &mut self.span {
            span.failure = result.as_ref().err().map(ToString::to_string);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(mut span) = self.span.take() else { return };
        span.end = SystemTime::now();
        if self.queue.spans.try_send(Message::Span(span)).is_err() {
            self.queue.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A number that nobody else has, and never 0. Not secret.
fn random() -> u64 {
    RandomState::new().build_hasher().finish().max(1)
}

#[cfg(any(test, fuzzing))]
/// Lines of traceparent, tracestate and why a request failed: the span is JSON.
pub(crate) fn fuzz(text: &str) {
    let [parent, state, failure] = crate::fuzz::words(text).map(str::to_owned);
    let metadata = [("traceparent".into(), vec![parent]), ("tracestate".into(), vec![state])];
    let parent = context::Parent::of(&metadata.into());
    assert!(parent.trace != 0 && parent.state.len() <= 32);
    let now = std::time::SystemTime::now();
    let span = export::Finished { name: "x", id: 1, parent, start: now, end: now, failure: Some(failure) };
    span.fuzz();
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::error::Error;

    fn context(metadata: &[(&str, &str)]) -> TtrpcContext {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()]));
        TtrpcContext {
            mh: Default::default(),
            metadata: metadata.collect(),
            timeout_nano: 0,
            connection_data: Default::default(),
        }
    }

    fn tracer(room: usize) -> (Tracer, mpsc::Receiver<Message>) {
        let (spans, received) = mpsc::channel(room);
        (Tracer { queue: Some(Arc::new(Queue { spans, dropped: Arc::default() })) }, received)
    }

    fn received(spans: &mut mpsc::Receiver<Message>) -> Box<Finished> {
        match spans.try_recv() {
            Ok(Message::Span(span)) => span,
            _ => panic!("no span"),
        }
    }

    #[test]
    fn off_is_nothing_at_all() {
        let tracer = Tracer::start(&Config::default()).unwrap();
        assert!(tracer.queue.is_none());
        assert!(tracer.begin("create_container", &context(&[])).is_none());
    }

    #[test]
    fn a_span_has_its_end_and_its_outcome() {
        let (tracer, mut spans) = tracer(8);
        let parent = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")];
        tracer.begin("create_container", &context(&parent)).unwrap().end(&Ok(()));
        let span = received(&mut spans);
        assert_eq!((span.name, span.failure.as_deref()), ("create_container", None));
        assert_eq!(span.parent.span, 0xb7ad_6b71_6920_3331);
        assert!(span.id != 0 && span.end >= span.start);
        let failure: Result<()> = Err(Error::UnknownContainer("c".into()));
        tracer.begin("start_container", &context(&[])).unwrap().end(&failure);
        assert_eq!(received(&mut spans).failure.as_deref(), Some("container \"c\" not found"));
        drop(tracer.begin("wait_process", &context(&[])).unwrap());
        assert!(received(&mut spans).failure.unwrap().starts_with("given up"));
    }

    #[test]
    fn what_is_not_sampled_or_not_traced_has_no_span() {
        let (tracer, _spans) = tracer(8);
        let unsampled = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")];
        assert!(tracer.begin("create_container", &context(&unsampled)).is_none());
        for method in UNTRACED {
            assert!(tracer.begin(method, &context(&[])).is_none(), "{method}");
        }
    }

    #[test]
    fn spans_without_room_are_counted() {
        let (tracer, _spans) = tracer(1);
        for _ in 0..3 {
            tracer.begin("check", &context(&[])).unwrap().end(&Ok(()));
        }
        assert_eq!(tracer.queue.unwrap().dropped.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn numbers_differ() {
        let numbers: HashMap<u64, ()> = (0..1000).map(|_| (random(), ())).collect();
        assert_eq!(numbers.len(), 1000);
    }
}
