//! What a replay came to, against its recording: a table of times, and each difference.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use serde_json::Value;

use super::{
    api,
    trace::{self, Entry, Status},
};

/// Differences that are shown in full.
const SHOWN: usize = 20;
/// Characters of a reply that are shown.
const EXCERPT: usize = 200;

/// What a call came to in a replay.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// The reply's bytes, or the status.
    pub(crate) answer: Result<Vec<u8>, Status>,
    /// How long it took.
    pub(crate) took: Duration,
}

/// A row of the table: the times of a method, and its differences.
#[derive(Default)]
struct Row {
    recorded: Vec<u64>,
    replayed: Vec<u64>,
    differences: usize,
}

/// The result of a replay.
#[derive(Default)]
pub(crate) struct Report {
    rows: BTreeMap<String, Row>,
    differences: Vec<String>,
}

/// Compares each outcome with its entry. Calls that had got no answer have none to compare.
pub(crate) fn compare(entries: &[Entry], outcomes: &[Option<Outcome>], ignored: &[String]) -> Report {
    let methods = api::methods();
    let mut report = Report::default();
    for (entry, outcome) in entries.iter().zip(outcomes) {
        let method = trace::method(&methods, &entry.method);
        let name = method.map_or(entry.method.as_str(), |method| &method.name);
        let row = report.rows.entry(name.to_owned()).or_default();
        let Some(outcome) = outcome.as_ref().filter(|_| !entry.is_unanswered()) else { continue };
        row.recorded.push(entry.duration_us);
        row.replayed.push(u64::try_from(outcome.took.as_micros()).unwrap_or(u64::MAX));
        let recorded = match (&entry.status, &entry.reply) {
            (Some(status), _) => Err(status.clone()),
            (None, reply) => Ok(reply.clone().unwrap_or_default()),
        };
        let output = method.map(|method| &method.output);
        let replayed = outcome.answer.clone().map(|bytes| trace::body(output, &bytes));
        let (recorded, replayed) = (stripped(recorded, ignored), stripped(replayed, ignored));
        if recorded != replayed {
            row.differences += 1;
            let (recorded, replayed) = (shown(&recorded), shown(&replayed));
            report.differences.push(format!(
                "{name} at {:.6} s, connection {}: recorded {recorded}, replayed {replayed}",
                Duration::from_micros(entry.start_us).as_secs_f64(),
                entry.connection
            ));
        }
    }
    report
}

/// An answer without what is not compared.
fn stripped(answer: Result<Value, Status>, ignored: &[String]) -> Result<Value, Status> {
    match answer {
        Ok(mut value) => {
            strip(&mut value, ignored);
            Ok(value)
        }
        Err(mut status) => {
            if ignored.iter().any(|field| field == "status") {
                status.message.clear();
            }
            Err(status)
        }
    }
}

fn strip(value: &mut Value, ignored: &[String]) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !ignored.contains(name));
            fields.values_mut().for_each(|value| strip(value, ignored));
        }
        Value::Array(values) => values.iter_mut().for_each(|value| strip(value, ignored)),
        _ => {}
    }
}

fn shown(answer: &Result<Value, Status>) -> String {
    let text = match answer {
        Ok(value) => value.to_string(),
        Err(status) => format!("status {} {:?}", status.code, status.message),
    };
    match text.char_indices().nth(EXCERPT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

impl Report {
    /// Whether anything was not as recorded.
    pub(crate) fn differs(&self) -> bool {
        !self.differences.is_empty()
    }

    /// The table, and the differences.
    pub(crate) fn text(&self) -> String {
        let heading =
            ["METHOD", "COUNT", "RECORDED", "P99", "REPLAYED", "P99", "DIFFERENCES"].map(str::to_owned);
        let mut lines = vec![heading];
        for (name, row) in &self.rows {
            let at = |times: &[u64], quantile| percentile(times, quantile).map_or("-".into(), milliseconds);
            lines.push([
                name.clone(),
                row.recorded.len().to_string(),
                at(&row.recorded, 50),
                at(&row.recorded, 99),
                at(&row.replayed, 50),
                at(&row.replayed, 99),
                row.differences.to_string(),
            ]);
        }
        let mut text = table(&lines);
        for difference in self.differences.iter().take(SHOWN) {
            let _ = writeln!(text, "{difference}");
        }
        if self.differences.len() > SHOWN {
            let _ = writeln!(text, "and {} more", self.differences.len() - SHOWN);
        }
        text
    }
}

/// The nearest-rank percentile.
fn percentile(times: &[u64], percent: usize) -> Option<u64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied()
}

fn milliseconds(micros: u64) -> String {
    format!("{}.{:03}ms", micros / 1000, micros % 1000)
}

/// Columns: the first to the left, figures to the right.
fn table<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for line in lines {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ = match column {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(method: &str, reply: Value) -> Entry {
        let method = format!("grpc.AgentService/{method}");
        Entry { method, duration_us: 1500, request: json!({}), reply: Some(reply), ..Default::default() }
    }

    fn replied(method: &str, reply: &Value) -> Option<Outcome> {
        let output = &api::find(method).unwrap().output;
        let answer = Ok(trace::bytes(Some(output), reply).unwrap());
        Some(Outcome { answer, took: Duration::from_micros(2500) })
    }

    #[test]
    fn what_differs_is_told() {
        let wait = json!({"status": 3});
        let entries = [entry("WaitProcess", wait.clone()), entry("GetMetrics", json!({"metrics": "1"}))];
        let outcomes = [replied("WaitProcess", &wait), replied("GetMetrics", &json!({"metrics": "2"}))];
        let report = compare(&entries, &outcomes, &[]);
        assert!(report.differs());
        let text = report.text();
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["GetMetrics", "1", "1.500ms", "1.500ms", "2.500ms", "2.500ms", "1"]);
        assert_eq!(rows[2], ["WaitProcess", "1", "1.500ms", "1.500ms", "2.500ms", "2.500ms", "0"]);
        assert!(text.contains(r#"recorded {"metrics":"1"}, replayed {"metrics":"2"}"#), "{text}");
        assert!(!compare(&entries, &outcomes, &["metrics".to_owned()]).differs());
    }

    #[test]
    fn a_status_is_not_a_reply_and_texts_can_be_ignored() {
        let status = |code, message: &str| Status { code, message: message.into() };
        let mut recorded = entry("WaitProcess", Value::Null);
        (recorded.reply, recorded.status) = (None, Some(status(5, "a")));
        let outcome = |answer| [Some(Outcome { answer, took: Duration::ZERO })];
        let entries = [recorded];
        assert!(!compare(&entries, &outcome(Err(status(5, "a"))), &[]).differs());
        assert!(compare(&entries, &outcome(Err(status(5, "b"))), &[]).differs());
        assert!(!compare(&entries, &outcome(Err(status(5, "b"))), &["status".to_owned()]).differs());
        assert!(compare(&entries, &outcome(Err(status(3, "a"))), &["status".to_owned()]).differs());
        assert!(compare(&entries, &outcome(Ok(Vec::new())), &["status".to_owned()]).differs());
    }

    #[test]
    fn percentiles_are_measured_times() {
        let times: Vec<u64> = (1..=200).rev().collect();
        assert_eq!((percentile(&times, 50), percentile(&times, 99)), (Some(100), Some(198)));
        assert_eq!((percentile(&[7], 99), percentile(&[], 50)), (Some(7), None));
    }
}
