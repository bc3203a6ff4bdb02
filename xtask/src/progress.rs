//! Shows what is being done: a spinner and the time on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Announces what follows, for steps that print their own progress.
pub(crate) fn heading(text: &str) {
    let (bold, plain) = if std::io::stderr().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    eprintln!("{bold}==> {text}{plain}");
}

/// Does a step that prints nothing itself, with a spinner meanwhile.
pub(crate) fn step<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = spinner(text);
    let result = work();
    bar.finish_and_clear();
    let (mark, time) = (if result.is_ok() { "✓" } else { "✗" }, seconds(started.elapsed()));
    eprintln!("  {mark} {text} ({time})");
    result
}

fn spinner(text: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        eprintln!("  … {text}");
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner().with_message(text.to_owned());
    if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
