//! `bulkhead agent replay`: the calls of a recording once more, against another agent.
//!
//! A call starts once every call that had ended before its start in the recording has ended again, and after every call
//! that had started before it. So what was in order stays in order, and what overlapped overlaps again, at any speed.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    pin::Pin,
    str::FromStr,
    task::Poll,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tokio::task::JoinSet;
use ttrpc::{
    r#async::{Client, transport::Socket},
    proto::{KeyValue, Request, Response},
};

use super::{
    address::Address,
    api, comparison,
    comparison::Outcome,
    trace::{self, Entry, Status},
};
use crate::streams;

/// How much longer than in the recording a call may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Plays a recording against an agent, and compares.
///
/// Exits with 0 when every reply and status was the same, with 1 otherwise.
#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// Where the agent is: vsock://CID:PORT, hvsock://SOCKET:PORT or unix://SOCKET
    #[arg(long, value_name = "ADDRESS")]
    addr: Address,
    /// How much faster than recorded (0.5 is half as fast), or as-fast: without pauses
    #[arg(long, default_value = "1")]
    speed: Speed,
    /// Leave a field of the replies out of the comparison, wherever it is; `status` is the status's text
    #[arg(long, value_name = "FIELD")]
    ignore: Vec<String>,
    /// The recording
    file: PathBuf,
}

/// When calls are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Speed {
    /// At their times in the recording, divided by this.
    Times(f64),
    /// As soon as those before them allow it.
    AsFast,
}

/// Beyond these a pause is longer than any time, or shorter than any.
const FACTORS: std::ops::RangeInclusive<f64> = 1e-3..=1e6;

impl FromStr for Speed {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Speed> {
        if text == "as-fast" {
            return Ok(Speed::AsFast);
        }
        let factor: f64 = text.parse().context("a number or as-fast is expected")?;
        ensure!(FACTORS.contains(&factor), "a number from 0.001 to 1000000 or as-fast is expected");
        Ok(Speed::Times(factor))
    }
}

impl Speed {
    /// When a call of that time is due, counted from the beginning.
    fn due(self, start_us: u64) -> Duration {
        match self {
            Speed::AsFast => Duration::ZERO,
            Speed::Times(factor) => Duration::from_micros(start_us).div_f64(factor),
        }
    }
}

/// Replays, and prints the table.
pub(crate) async fn run(replay: &Replay) -> Result<u8> {
    let text = std::fs::read(&replay.file).with_context(|| format!("read {}", replay.file.display()))?;
    let (entries, cut) =
        trace::parse(&text).with_context(|| format!("understand {}", replay.file.display()))?;
    if cut {
        streams::say("the last line of the recording is cut off and left out");
    }
    let (entries, left_out): (Vec<Entry>, Vec<Entry>) =
        entries.into_iter().partition(|entry| !entry.streaming && entry.method.contains('/'));
    if !left_out.is_empty() {
        streams::say(&format!("{} streams and malformed requests are not replayed", left_out.len()));
    }
    let outcomes = Stage::new(replay, &entries)?.play().await?;
    let report = comparison::compare(&entries, &outcomes, &replay.ignore);
    use std::io::Write as _;
    std::io::stdout().write_all(report.text().as_bytes()).context("write to the standard output")?;
    Ok(u8::from(report.differs()))
}

/// A replay that goes on.
struct Stage<'a> {
    replay: &'a Replay,
    entries: &'a [Entry],
    requests: Vec<Request>,
    clients: HashMap<u64, Client>,
    running: JoinSet<(usize, Outcome)>,
    outcomes: Vec<Option<Outcome>>,
}

impl<'a> Stage<'a> {
    fn new(replay: &'a Replay, entries: &'a [Entry]) -> Result<Stage<'a>> {
        Ok(Stage {
            replay,
            entries,
            requests: entries.iter().map(request).collect::<Result<_>>()?,
            clients: HashMap::new(),
            running: JoinSet::new(),
            outcomes: vec![None; entries.len()],
        })
    }

    /// Makes every call; an outcome each, `None` of one that had got no answer and was cut off again.
    async fn play(mut self) -> Result<Vec<Option<Outcome>>> {
        let began = Instant::now();
        let mut ends = BTreeSet::new();
        for (index, entry) in self.entries.iter().enumerate() {
            while let Some((end, before)) = ends.first().copied()
                && end <= entry.start_us
            {
                ends.remove(&(end, before));
                self.finish(before).await?;
            }
            tokio::time::sleep_until((began + self.replay.speed.due(entry.start_us)).into()).await;
            if !entry.is_unanswered() {
                ends.insert((entry.end_us(), index));
            }
            self.start(index).await?;
        }
        for (_, index) in ends {
            self.finish(index).await?;
        }
        Ok(self.outcomes)
    }

    /// Sends a request, in this order; the answer comes later.
    async fn start(&mut self, index: usize) -> Result<()> {
        let entry = &self.entries[index];
        let client = match self.clients.get(&entry.connection) {
            Some(client) => client.clone(),
            None => {
                let client = Client::new(Socket::new(self.replay.addr.dial().await?));
                self.clients.insert(entry.connection, client.clone());
                client
            }
        };
        let limit = PATIENCE + Duration::from_micros(entry.duration_us);
        let request = std::mem::take(&mut self.requests[index]);
        let mut call = Box::pin(async move {
            let began = Instant::now();
            let answer = tokio::time::timeout(limit, client.request(request)).await;
            (index, outcome(answer, limit, began.elapsed()))
        });
        match poll_once(call.as_mut()).await {
            Poll::Ready((index, outcome)) => self.outcomes[index] = Some(outcome),
            Poll::Pending => drop(self.running.spawn(call)),
        }
        Ok(())
    }

    /// Waits for the answer to a request.
    async fn finish(&mut self, index: usize) -> Result<()> {
        while self.outcomes[index].is_none() {
            let ended = self.running.join_next().await.context("a call that was made is waited for")?;
            let (index, outcome) = ended.context("call the agent")?;
            self.outcomes[index] = Some(outcome);
        }
        Ok(())
    }
}

/// The first step of a call puts its request into the connection's queue.
async fn poll_once<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}

fn request(entry: &Entry) -> Result<Request> {
    let methods = api::methods();
    let method = trace::method(&methods, &entry.method);
    let (service, name) = entry.method.split_once('/').unwrap_or_default();
    let key_value = |(key, value): &(String, String)| KeyValue {
        key: key.clone(),
        value: value.clone(),
        ..Default::default()
    };
    Ok(Request {
        service: service.to_owned(),
        method: name.to_owned(),
        payload: trace::bytes(method.map(|method| &method.input), &entry.request)
            .with_context(|| format!("the request of {} at {} us", entry.method, entry.start_us))?,
        timeout_nano: entry.timeout_ns,
        metadata: entry.metadata.iter().map(key_value).collect(),
        ..Default::default()
    })
}

fn outcome(
    answer: Result<ttrpc::Result<Response>, tokio::time::error::Elapsed>,
    limit: Duration,
    took: Duration,
) -> Outcome {
    let answer = match answer {
        Ok(Ok(response)) => Ok(response.payload),
        Ok(Err(ttrpc::Error::RpcStatus(status))) => {
            Err(Status { code: status.code.value(), message: status.message })
        }
        Ok(Err(error)) => Err(Status { code: -1, message: format!("no answer: {error}") }),
        Err(_) => Err(Status { code: -1, message: format!("no answer within {limit:?}") }),
    };
    Outcome { answer, took }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_read() {
        assert_eq!("as-fast".parse::<Speed>().unwrap().due(1000), Duration::ZERO);
        assert_eq!("2".parse::<Speed>().unwrap().due(1000), Duration::from_micros(500));
        assert_eq!("0.5".parse::<Speed>().unwrap().due(1000), Duration::from_micros(2000));
        for bad in ["0", "-1", "x", "inf", "NaN", "", "1e-300", "1e7"] {
            assert!(bad.parse::<Speed>().is_err(), "{bad}");
        }
    }
}
