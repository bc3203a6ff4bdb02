//! The last lines that a guest's console and a VMM said, for error texts.
//!
//! What comes from a guest is hostile: lines and bytes are bounded, and nothing that a terminal would interpret is kept.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{io::AsyncReadExt, net::unix::pipe, task::JoinHandle};

/// Lines kept: a kernel's panic with its stack fits.
const LINES: usize = 100;
/// Bytes kept of one line.
const LINE_BYTES: usize = 400;

/// A bounded ring of lines; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    /// Appends a line, forgetting the oldest when full.
    pub(crate) fn push(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// All kept lines.
    pub(crate) fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// Reads `pipe` to its end in a task and hands every line to `line`, made harmless.
pub(crate) fn pump(
    pipe: OwnedFd,
    mut line: impl FnMut(String) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let mut pipe = pipe::Receiver::from_owned_fd(pipe)?;
    Ok(tokio::spawn(async move {
        let mut splitter = Splitter::default();
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
            splitter.feed(&buffer[..read], &mut line);
        }
        splitter.finish(&mut line);
    }))
}

/// Cuts a byte stream into lines of bounded length.
#[derive(Default)]
struct Splitter(Vec<u8>);

impl Splitter {
    fn feed(&mut self, bytes: &[u8], line: &mut impl FnMut(String)) {
        for &byte in bytes {
            match byte {
                b'\n' => self.finish(line),
                _ if self.0.len() < LINE_BYTES => self.0.push(byte),
                _ => {} // the rest of an overlong line is dropped
            }
        }
    }

    fn finish(&mut self, line: &mut impl FnMut(String)) {
        let text = harmless(&self.0);
        self.0.clear();
        if !text.trim().is_empty() {
            line(text);
        }
    }
}

/// Text without terminal sequences and control characters.
fn harmless(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            // ESC [ parameters final, or ESC and one character.
            '\u{1b}' if chars.next() == Some('[') => {
                chars.by_ref().find(|c| ('@'..='~').contains(c));
            }
            '\u{1b}' | '\r' => {}
            '\t' => clean.push(' '),
            c if c.is_control() => clean.push('\u{fffd}'),
            c => clean.push(c),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(chunks: &[&[u8]]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut splitter = Splitter::default();
        for chunk in chunks {
            splitter.feed(chunk, &mut |line| lines.push(line));
        }
        splitter.finish(&mut |line| lines.push(line));
        lines
    }

    #[test]
    fn lines_are_joined_across_reads_and_the_last_needs_no_newline() {
        assert_eq!(lines_of(&[b"one\ntw", b"o\r\n\n", b"three"]), ["one", "two", "three"]);
    }

    #[test]
    fn terminal_sequences_and_control_bytes_do_not_survive() {
        assert_eq!(
            harmless(b"\x1bc\x1b[?7l\x1b[2J[    0.0] a\tb\x07c\xff"),
            "[    0.0] a b\u{fffd}c\u{fffd}"
        );
        assert_eq!(harmless("\u{9b}31m".as_bytes()), "\u{fffd}31m");
        assert_eq!(harmless(b"end\x1b"), "end");
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let endless = vec![b'x'; 3 * LINE_BYTES];
        assert_eq!(lines_of(&[&endless, b"\nnext"]), ["x".repeat(LINE_BYTES), "next".into()]);
    }

    #[test]
    fn the_oldest_lines_are_forgotten() {
        let tail = Tail::default();
        (0..LINES + 5).for_each(|n| tail.push(n.to_string()));
        let text = tail.text();
        assert!(text.starts_with("5\n6\n"), "{text}");
        assert_eq!(text.lines().count(), LINES);
    }

    #[tokio::test]
    async fn a_pipe_is_pumped_to_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        let tail = Tail::default();
        let sink = tail.clone();
        let pump = pump(reader.into(), move |line| sink.push(line)).unwrap();
        io::Write::write_all(&mut writer, b"hello\nworld").unwrap();
        drop(writer);
        pump.await.unwrap();
        assert_eq!(tail.text(), "hello\nworld");
    }
}
