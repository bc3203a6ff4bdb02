//! `bulkhead ps`: what runs here.

use std::{
    io::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use bulkhead_sandbox::Config;
use clap::Args;
use serde::Serialize;

use crate::running::{self, Running};

/// Lists the sandboxes of this host.
#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints the list.
pub(crate) fn run(args: &Ps) -> Result<u8> {
    let config = Config::load()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let rows: Vec<Row> = running::all(&config)?.iter().map(|running| Row::new(running, now)).collect();
    let text = if args.json { serde_json::to_string_pretty(&rows)? + "\n" } else { table(&rows) };
    // Whoever reads the list may have had enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(0)
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    id: String,
    image: Option<String>,
    command: Option<String>,
    status: &'static str,
    age_seconds: u64,
    accel: Option<String>,
    owner_pid: u32,
}

impl Row {
    fn new(running: &Running, now: u64) -> Row {
        let label = |key| running.label(key).map(str::to_owned);
        Row {
            name: running.name().to_owned(),
            id: running.state.id.clone(),
            image: label(running::IMAGE),
            command: label(running::COMMAND),
            // The owner was killed; nothing runs any more, and `rm` removes what it left.
            status: if running.is_alive() { "running" } else { "stale" },
            age_seconds: now.saturating_sub(running.state.created),
            accel: running.accel(),
            owner_pid: running.state.owner.pid,
        }
    }
}

fn table(rows: &[Row]) -> String {
    let mut lines = vec![["NAME", "ID", "IMAGE", "COMMAND", "STATUS", "AGE", "ACCEL"].map(str::to_owned)];
    lines.extend(rows.iter().map(|row| {
        let or_dash = |text: &Option<String>| shown(text.as_deref().unwrap_or("-"));
        [
            row.name.clone(),
            row.id.clone(),
            or_dash(&row.image),
            or_dash(&row.command),
            row.status.to_owned(),
            age(row.age_seconds),
            or_dash(&row.accel),
        ]
    }));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..7).map(width).collect();
    let line = |line: &[String; 7]| -> String {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    lines.iter().map(line).collect()
}

/// A cell of bounded width, without anything that moves the cursor.
fn shown(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > 40 { text.chars().take(39).chain(['…']).collect() } else { text }
}

fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        assert_eq!([0, 119, 120, 7200, 172_800].map(age), ["0s", "119s", "2m", "2h", "2d"]);
    }

    #[test]
    fn columns_are_aligned_and_tame() {
        let row = Row {
            name: "a-long-name".into(),
            id: "id".into(),
            image: None,
            command: Some(format!("sh\x1b[2J\n{}", "x".repeat(99))),
            status: "stale",
            age_seconds: 5,
            accel: None,
            owner_pid: 1,
        };
        let text = table(&[row]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(!text.contains('\x1b') && lines[1].contains('…'));
        let column = |line: &str, word: &str| line[..line.find(word).unwrap()].chars().count();
        assert_eq!(column(lines[0], "STATUS"), column(lines[1], "stale"));
    }
}
