//! The agent's log: short lines on standard error, which is the console of a guest, and JSON lines on a vsock port when
//! the host asks for them.
//!
//! A subscriber of its own instead of a library's: the agent has no spans and no filters, and its size counts at each
//! boot.

use std::{
    fmt::{Debug, Write as _},
    io::Write as _,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bulkhead_protocol::ports;
use tokio::{io::AsyncWriteExt, sync::broadcast};
use tokio_vsock::{VsockAddr, VsockListener, VsockStream};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use crate::error::{During, Result};

/// So many lines wait for a slow reader of the stream, who then misses the oldest.
const BACKLOG: usize = 256;

struct Log {
    level: Level,
    stream: Option<broadcast::Sender<Arc<str>>>,
}

/// The lines of the log as they come.
pub(crate) struct Lines(broadcast::Sender<Arc<str>>);

/// Starts logging what is at least as severe as `level`. With `stream`, every line is offered to readers, too.
pub(crate) fn start(level: Level, stream: bool) -> Option<Lines> {
    let stream = stream.then(|| broadcast::Sender::new(BACKLOG));
    let lines = stream.clone().map(Lines);
    // It fails when there is a subscriber already, as in tests; the first one stays.
    let _ = tracing::subscriber::set_global_default(Log { level, stream });
    lines
}

impl Lines {
    /// Sends the lines to every connection of the host. Has to be called on the runtime.
    pub(crate) fn serve(self, port: u32) -> Result<()> {
        let address = VsockAddr::new(tokio_vsock::VMADDR_CID_ANY, port);
        let listener =
            VsockListener::bind(address).during(|| format!("listen on vsock port {port} for log readers"))?;
        tokio::spawn(async move {
            while let Ok((connection, peer)) = listener.accept().await {
                if peer.cid() == ports::HOST_CID {
                    tokio::spawn(send(connection, self.0.subscribe()));
                }
            }
        });
        Ok(())
    }
}

async fn send(mut connection: VsockStream, mut lines: broadcast::Receiver<Arc<str>>) {
    loop {
        match lines.recv().await {
            Ok(line) if AsyncWriteExt::write_all(&mut connection, line.as_bytes()).await.is_ok() => {}
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            _ => return,
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
            // Without readers nothing is sent.
            let _ = stream.send(json(event.metadata(), &fields).into());
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
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = value.to_owned(),
            name => self.others.push((name, value.to_owned())),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
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

/// The keys that readers of such a stream expect.
fn json(metadata: &Metadata<'_>, fields: &Fields) -> String {
    let level = match *metadata.level() {
        Level::ERROR => "ERRO",
        Level::WARN => "WARN",
        Level::INFO => "INFO",
        Level::DEBUG => "DEBG",
        Level::TRACE => "TRCE",
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut line = String::from("{");
    let pid = std::process::id().to_string();
    let known = [
        ("msg", fields.message.as_str()),
        ("level", level),
        ("ts", &format!("{}.{:09}", now.as_secs(), now.subsec_nanos())),
        ("name", "bulkhead-agent"),
        ("source", "agent"),
        ("subsystem", metadata.target()),
        ("pid", &pid),
        ("version", env!("CARGO_PKG_VERSION")),
    ];
    for (name, value) in
        known.into_iter().chain(fields.others.iter().map(|(name, value)| (*name, value.as_str())))
    {
        if line.len() > 1 {
            line.push(',');
        }
        quote(&mut line, name);
        line.push(':');
        quote(&mut line, value);
    }
    line.push_str("}\n");
    line
}

fn quote(line: &mut String, text: &str) {
    line.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => line.extend(['\\', character]),
            '\n' => line.push_str("\\n"),
            control if control < ' ' => {
                // Writing to a string cannot fail.
                let _ = write!(line, "\\u{:04x}", u32::from(control));
            }
            other => line.push(other),
        }
    }
    line.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_line_has_everything_once() {
        let fields = Fields { message: "went wrong".into(), others: vec![("path", "/x".into())] };
        assert_eq!(short(&Level::WARN, &fields), "bulkhead-agent: WARN: went wrong path=/x\n");
    }

    #[test]
    fn text_is_quoted_for_json() {
        let mut line = String::new();
        quote(&mut line, "a \"b\" \\ \n \u{1} ü");
        assert_eq!(line, r#""a \"b\" \\ \n \u0001 ü""#);
    }

    #[test]
    fn what_is_less_severe_is_not_logged() {
        let stream = broadcast::Sender::new(8);
        let mut lines = stream.subscribe();
        tracing::subscriber::with_default(Log { level: Level::WARN, stream: Some(stream) }, || {
            tracing::info!("quiet");
            tracing::warn!(container = "c", "loud");
        });
        let line = lines.try_recv().unwrap();
        assert!(
            line.starts_with("{\"msg\":\"loud\",\"level\":\"WARN\",")
                && line.ends_with("\"container\":\"c\"}\n"),
            "{line}"
        );
        assert!(lines.try_recv().is_err());
    }
}
