//! The agent's log: short lines on standard error, which is the console of a guest, and JSON lines on a vsock port when
//! the host asks for them.
//!
//! The last lines are kept. A reader of the port begins with the first one that nobody was given yet, so the first reader
//! sees the boot and one that comes back misses nothing that is still there; what is not is told.
//!
//! A subscriber of its own instead of a library's: the agent has no spans and no filters, and its size counts at each
//! boot.

use std::{
    collections::VecDeque,
    fmt::{Debug, Write as _},
    io::Write as _,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::Notify,
};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use crate::{error::Result, json::quote, port, sync::lock};

/// So many lines are kept for those who read later.
const BACKLOG: usize = 256;

/// The values of a line have at most this many bytes.
const LONGEST: usize = 16 << 10;

struct Log {
    level: Level,
    stream: Option<Arc<Lines>>,
}

/// The last lines of the log.
#[derive(Default)]
pub(crate) struct Lines {
    kept: Mutex<Kept>,
    more: Notify,
}

#[derive(Default)]
struct Kept {
    lines: VecDeque<Arc<str>>,
    /// The number of the first kept line; the log's first one is 0.
    first: u64,
    /// The number of the first line that no reader was given.
    given: u64,
}

/// What a reader gets next.
#[derive(Debug, PartialEq)]
enum Next {
    Line(Arc<str>),
    /// So many lines are gone already.
    Missed(u64),
    /// It has seen everything.
    Nothing,
}

/// Starts logging what is at least as severe as `level`. With `stream`, every line is kept for readers, too.
pub(crate) fn start(level: Level, stream: bool) -> Option<Arc<Lines>> {
    let stream = stream.then(Arc::<Lines>::default);
    let lines = stream.clone();
    // It fails when there is a subscriber already, as in tests; the first one stays.
    let _ = tracing::subscriber::set_global_default(Log { level, stream });
    lines
}

impl Lines {
    /// Sends the lines to every connection of the host. Has to be called on the runtime.
    pub(crate) fn serve(self: Arc<Self>, port: u32) -> Result<()> {
        port::serve(port, "readers of the log", move |connection, _| {
            let lines = Arc::clone(&self);
            crate::sync::spawn(async move { lines.send(connection).await });
        })
    }

    fn push(&self, line: String) {
        lock(&self.kept).push(line.into());
        self.more.notify_waiters();
    }

    /// Sends lines until the reader is gone.
    async fn send(&self, mut reader: impl AsyncRead + AsyncWrite + Unpin) {
        let mut position = lock(&self.kept).given;
        loop {
            let more = self.more.notified();
            let next = lock(&self.kept).after(&mut position);
            let sent = match next {
                Next::Line(line) => reader.write_all(line.as_bytes()).await,
                Next::Missed(lines) => reader.write_all(missed(lines).as_bytes()).await,
                Next::Nothing => {
                    // A reader has nothing to say; what comes from it is its end.
                    let mut byte = [0];
                    tokio::select! {
                        () = more => continue,
                        read = reader.read(&mut byte) => match read {
                            Ok(1..) => continue,
                            Ok(0) | Err(_) => return,
                        },
                    }
                }
            };
            if sent.is_err() {
                return;
            }
            let mut kept = lock(&self.kept);
            kept.given = kept.given.max(position);
        }
    }
}

impl Kept {
    fn push(&mut self, line: Arc<str>) {
        if self.lines.len() == BACKLOG {
            self.lines.pop_front();
            self.first += 1;
        }
        self.lines.push_back(line);
    }

    /// What follows a position, which is moved behind it.
    fn after(&self, position: &mut u64) -> Next {
        if *position < self.first {
            let missed = self.first - *position;
            *position = self.first;
            return Next::Missed(missed);
        }
        match usize::try_from(*position - self.first).ok().and_then(|index| self.lines.get(index)) {
            Some(line) => {
                *position += 1;
                Next::Line(Arc::clone(line))
            }
            None => Next::Nothing,
        }
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = event.metadata().level();
        // One write a line, so that lines do not mix; and nobody to tell when there is no console.
        let _ = std::io::stderr().write_all(short(level, &fields).as_bytes());
        if let Some(stream) = &self.stream {
            let (level, target) = (event.metadata().level(), event.metadata().target());
            stream.push(json(level, target, SystemTime::now(), &fields));
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
    /// What the values take in a line, in bytes.
    length: usize,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record(field.name(), value);
    }
}

impl Fields {
    fn record(&mut self, name: &'static str, value: &dyn Debug) {
        let mut text = Cut { text: String::new(), length: &mut self.length };
        // It fails where it is cut.
        let _ = write!(text, "{value:?}");
        let text = text.text;
        match name {
            "message" => self.message = text,
            name => self.others.push((name, text)),
        }
    }
}

/// A value, up to where its line is full: requests' own words are logged, and those may have megabytes.
struct Cut<'a> {
    text: String,
    length: &'a mut usize,
}

impl std::fmt::Write for Cut<'_> {
    fn write_str(&mut self, more: &str) -> std::fmt::Result {
        for char in more.chars() {
            if *self.length >= LONGEST {
                self.text.push('…');
                return Err(std::fmt::Error);
            }
            // As JSON has it.
            *self.length += match char {
                '"' | '\\' => 2,
                char if char < ' ' => 6,
                char => char.len_utf8(),
            };
            self.text.push(char);
        }
        Ok(())
    }
}

fn short(level: &Level, fields: &Fields) -> String {
    let mut line = format!("bulkhead-agent: {level}: {}", fields.message);
    for (name, value) in &fields.others {
        // Writing to a string cannot fail.
        let _ = write!(line, " {name}={value}");
    }
    line.push('\n');
    line
}

/// The line that tells a reader what it did not get.
fn missed(lines: u64) -> String {
    let fields = Fields {
        message: format!("{lines} lines of the log were not read in time and are lost"),
        others: vec![("lines", lines.to_string())],
        ..Fields::default()
    };
    json(&Level::WARN, module_path!(), SystemTime::now(), &fields)
}

/// A line with the keys that readers of such a stream expect. A field of the event with such a name gets another one, so
/// that no key comes twice.
fn json(level: &Level, target: &str, now: SystemTime, fields: &Fields) -> String {
    let level = match *level {
        Level::ERROR => "ERRO",
        Level::WARN => "WARN",
        Level::INFO => "INFO",
        Level::DEBUG => "DEBG",
        Level::TRACE => "TRCE",
    };
    let pid = std::process::id().to_string();
    let known = [
        ("msg", fields.message.as_str()),
        ("level", level),
        ("ts", &timestamp(now)),
        ("name", "bulkhead-agent"),
        ("source", "agent"),
        ("subsystem", target),
        ("pid", &pid),
        ("version", env!("CARGO_PKG_VERSION")),
    ];
    let mut line = String::new();
    for (name, value) in known {
        pair(&mut line, name, value);
    }
    for (name, value) in &fields.others {
        match known.iter().any(|(known, _)| known == name) {
            true => pair(&mut line, &format!("event.{name}"), value),
            false => pair(&mut line, name, value),
        }
    }
    line.push_str("}\n");
    line
}

fn pair(line: &mut String, name: &str, value: &str) {
    line.push(if line.is_empty() { '{' } else { ',' });
    quote(line, name);
    line.push(':');
    quote(line, value);
}

/// A time as RFC 3339 has it, in UTC.
fn timestamp(time: SystemTime) -> String {
    let time = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, seconds) = (time.as_secs() / 86_400, time.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let nanoseconds = time.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

/// The date so many days after 1 January 1970. Years are counted from March, so that the leap day is their last; 400 of
/// them have 146,097 days.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    (400 * era + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncBufReadExt;

    use super::*;

    #[test]
    fn a_short_line_has_everything_once() {
        let fields =
            Fields { message: "went wrong".into(), others: vec![("path", "/x".into())], ..Fields::default() };
        assert_eq!(short(&Level::WARN, &fields), "bulkhead-agent: WARN: went wrong path=/x\n");
    }

    #[test]
    fn a_json_line_has_the_keys_of_the_reference_and_none_twice() {
        let fields = Fields {
            message: "a \"b\"".into(),
            others: vec![("pid", "7".into()), ("path", "/x\n".into())],
            ..Fields::default()
        };
        let line = json(&Level::ERROR, "agent::x", UNIX_EPOCH, &fields);
        let pid = std::process::id();
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            line,
            format!(
                "{{\"msg\":\"a \\\"b\\\"\",\"level\":\"ERRO\",\"ts\":\"1970-01-01T00:00:00.000000000Z\",\
                 \"name\":\"bulkhead-agent\",\"source\":\"agent\",\"subsystem\":\"agent::x\",\"pid\":\"{pid}\",\
                 \"version\":\"{version}\",\"event.pid\":\"7\",\"path\":\"/x\\n\"}}\n"
            )
        );
    }

    #[test]
    fn times_are_told_as_dates() {
        for (seconds, expected) in [
            (951_782_400, "2000-02-29T00:00:00.000000001Z"),
            (951_868_799, "2000-02-29T23:59:59.000000001Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000001Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000001Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000001Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::new(seconds, 1)), expected);
        }
    }

    #[test]
    fn what_is_less_severe_is_not_logged() {
        let stream = Arc::new(Lines::default());
        let log = Log { level: Level::WARN, stream: Some(Arc::clone(&stream)) };
        tracing::subscriber::with_default(log, || {
            tracing::info!("quiet");
            tracing::warn!(container = "c", "loud");
        });
        let (kept, mut position) = (lock(&stream.kept), 0);
        let Next::Line(line) = kept.after(&mut position) else { panic!("no line") };
        assert!(
            line.starts_with("{\"msg\":\"loud\",\"level\":\"WARN\",")
                && line.ends_with("\"container\":\"c\"}\n"),
            "{line}"
        );
        assert_eq!(kept.after(&mut position), Next::Nothing);
    }

    #[test]
    fn a_line_is_cut_whatever_is_in_it() {
        for word in ["x", "ü", "\u{1}", "\"", "\n", "a\\b"] {
            let mut fields = Fields::default();
            fields.record("message", &"what happened");
            fields.record("path", &format_args!("{}", word.repeat(1 << 20)));
            fields.record("later", &"y");
            for line in [json(&Level::WARN, "x", UNIX_EPOCH, &fields), short(&Level::WARN, &fields)] {
                assert!((LONGEST / 6..LONGEST + 512).contains(&line.len()), "{word:?}: {}", line.len());
                assert!(line.contains("what happened") && line.contains('…') && line.contains("later"));
            }
        }
    }

    async fn read(connection: &mut (impl tokio::io::AsyncBufRead + Unpin), lines: usize) -> Vec<String> {
        let mut read = Vec::new();
        for _ in 0..lines {
            let mut line = String::new();
            assert!(connection.read_line(&mut line).await.unwrap() > 0, "the log has ended");
            read.push(line.trim_end().to_owned());
        }
        read
    }

    fn connect(
        lines: &Arc<Lines>,
    ) -> (tokio::task::JoinHandle<()>, tokio::io::BufReader<tokio::io::DuplexStream>) {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let lines = Arc::clone(lines);
        (tokio::spawn(async move { lines.send(ours).await }), tokio::io::BufReader::new(theirs))
    }

    #[tokio::test]
    async fn the_first_reader_gets_what_was_logged_before_it_and_a_later_one_what_nobody_got() {
        let lines = Arc::new(Lines::default());
        lines.push("one\n".into());
        lines.push("two\n".into());
        let (sending, mut reader) = connect(&lines);
        assert_eq!(read(&mut reader, 2).await, ["one", "two"]);
        lines.push("three\n".into());
        assert_eq!(read(&mut reader, 1).await, ["three"]);
        drop(reader);
        // A reader that goes is noticed without a line for it.
        sending.await.unwrap();
        lines.push("four\n".into());
        let (_sending, mut reader) = connect(&lines);
        assert_eq!(read(&mut reader, 1).await, ["four"]);
        // Any number at a time.
        let (_other_sending, mut other) = connect(&lines);
        lines.push("five\n".into());
        assert_eq!(read(&mut reader, 1).await, ["five"]);
        assert_eq!(read(&mut other, 1).await, ["five"]);
    }

    #[tokio::test]
    async fn a_slow_reader_is_told_how_much_it_missed() {
        let lines = Arc::new(Lines::default());
        for n in 0..BACKLOG + 7 {
            lines.push(format!("{n}\n"));
        }
        let (_sending, mut reader) = connect(&lines);
        let read = read(&mut reader, BACKLOG + 1).await;
        assert!(read[0].contains("\"lines\":\"7\""), "{}", read[0]);
        assert_eq!(read[1], "7");
        assert_eq!(read[BACKLOG], (BACKLOG + 6).to_string());
    }
}
