//! Values as the sources have them, and the forms that settings take them in.

use std::{borrow::Cow, time::Duration};

use tracing::Level;

use crate::server::Address;

/// A value as its source has it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// A name alone, without a value.
    Bare,
    /// Text of a source that has no types: the kernel's line, the environment.
    Word(String),
    /// A string of a file.
    Text(String),
    /// An integer of a file.
    Integer(i64),
    /// A boolean of a file.
    Boolean(bool),
    /// A table of seconds and nanoseconds in a file.
    Span(Duration),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Bare => f.write_str("no value"),
            Value::Word(text) | Value::Text(text) => write!(f, "{}", shown(text)),
            Value::Integer(number) => write!(f, "{number}"),
            Value::Boolean(truth) => write!(f, "{truth}"),
            Value::Span(span) => write!(f, "{span:?}"),
        }
    }
}

/// Foreign text for a message: on one line, and not too long.
pub(super) fn shown(text: &str) -> Cow<'_, str> {
    const LIMIT: usize = 64;
    if text.chars().count() <= LIMIT && !text.chars().any(char::is_control) {
        return text.into();
    }
    let cut: String = text.chars().take(LIMIT).collect();
    format!("{}{}", cut.escape_default(), if cut.len() < text.len() { "..." } else { "" }).into()
}

/// A switch: a bare name is on, and so is a number but 0.
pub(super) fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bare => Some(true),
        Value::Boolean(truth) => Some(*truth),
        Value::Word(word) => match word.as_str() {
            "true" => Some(true),
            "false" => Some(false),
            number => number.parse::<i64>().ok().map(|number| number != 0),
        },
        _ => None,
    }
}

/// A whole number from `least` up to `most`.
pub(super) fn whole(value: &Value, least: i64, most: i64) -> Option<i64> {
    let number = match value {
        Value::Integer(number) => Some(*number),
        Value::Word(word) => word.parse().ok(),
        _ => None,
    };
    number.filter(|number| (least..=most).contains(number))
}

/// A vsock port, 0 for none.
pub(super) fn port(value: &Value) -> Option<u32> {
    whole(value, 0, i32::MAX.into()).and_then(|port| u32::try_from(port).ok())
}

/// A number of bytes.
pub(super) fn bytes(value: &Value) -> Option<usize> {
    whole(value, 0, i32::MAX.into()).and_then(|bytes| usize::try_from(bytes).ok())
}

/// A time above 0: whole seconds, or a table.
pub(super) fn seconds(value: &Value) -> Option<Duration> {
    match value {
        Value::Span(span) => Some(*span).filter(|span| !span.is_zero()),
        other => whole(other, 1, i64::MAX).and_then(|n| u64::try_from(n).ok()).map(Duration::from_secs),
    }
}

/// Any text.
pub(super) fn text(value: &Value) -> Option<&str> {
    match value {
        Value::Word(text) | Value::Text(text) => {
            Some(text).filter(|text| !text.contains('\0')).map(String::as_str)
        }
        _ => None,
    }
}

/// One of some words.
pub(super) fn choice<'a>(value: &'a Value, words: &[&str]) -> Option<&'a str> {
    text(value).filter(|text| words.contains(text))
}

/// A URL, or nothing.
pub(super) fn url(value: &Value) -> Option<&str> {
    text(value).filter(|text| {
        text.is_empty()
            || text.split_once("://").is_some_and(|(scheme, rest)| {
                !scheme.is_empty()
                    && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric())
                    && !rest.is_empty()
            })
    })
}

/// Where to listen, or to connect to.
pub(super) fn address(value: &Value) -> Option<String> {
    text(value).filter(|text| Address::parse(text).is_ok()).map(str::to_owned)
}

/// How severe. The names of two systems are known.
pub(super) fn level(value: &Value) -> Option<Level> {
    Some(match text(value)? {
        "fatal" | "panic" | "critical" | "error" => Level::ERROR,
        "warn" | "warning" => Level::WARN,
        "info" => Level::INFO,
        "debug" => Level::DEBUG,
        "trace" => Level::TRACE,
        _ => return None,
    })
}

/// How many letters have to be added, dropped or replaced to make one word of the other.
pub(super) fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    // Names are short; what is longer than any is not near to one.
    for (n, letter) in one.bytes().take(64).enumerate() {
        let mut diagonal = n;
        let mut left = n + 1;
        for (cell, candidate) in row.iter_mut().skip(1).zip(other.bytes()) {
            let cheapest = (diagonal + usize::from(letter != candidate)).min(left + 1).min(*cell + 1);
            diagonal = std::mem::replace(cell, cheapest);
            left = cheapest;
        }
        if let Some(first) = row.first_mut() {
            *first = n + 1;
        }
    }
    row.last().map_or(usize::MAX, |distance| distance + one.len().saturating_sub(64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(word: &str) -> Value {
        Value::Word(word.into())
    }

    #[test]
    fn words_are_read_by_their_form() {
        for (text, expected) in [
            ("true", Some(true)),
            ("false", Some(false)),
            ("1", Some(true)),
            ("0", Some(false)),
            ("yes", None),
            ("", None),
        ] {
            assert_eq!(flag(&word(text)), expected, "{text:?}");
        }
        assert_eq!(flag(&Value::Bare), Some(true));
        assert_eq!(flag(&Value::Integer(1)), None, "a file has booleans");
        for (text, expected) in
            [("1025", Some(1025)), ("0", Some(0)), ("-1", None), ("2147483648", None), ("1 ", None)]
        {
            assert_eq!(port(&word(text)), expected, "{text:?}");
        }
        assert_eq!(port(&Value::Text("1".into())), None, "a number of a file is no string");
        assert_eq!(seconds(&word("0")), None);
        assert_eq!(seconds(&word("7")), Some(Duration::from_secs(7)));
        assert_eq!(seconds(&Value::Span(Duration::ZERO)), None);
        assert_eq!(seconds(&Value::Span(Duration::from_millis(1500))), Some(Duration::from_millis(1500)));
        assert_eq!(level(&word("panic")), Some(Level::ERROR));
        assert_eq!(level(&word("loud")), None);
        assert!(
            url(&word("http://proxy:80")).is_some()
                && url(&word("")).is_some()
                && url(&word("proxy")).is_none()
        );
        assert_eq!(text(&word("a\0b")), None);
    }

    #[test]
    fn nearness_counts_letters() {
        for (one, other, expected) in [
            ("", "", 0),
            ("abc", "abc", 0),
            ("abc", "abd", 1),
            ("abc", "ab", 1),
            ("ab", "abc", 1),
            ("kitten", "sitting", 3),
            ("", "abc", 3),
        ] {
            assert_eq!(distance(one, other), expected, "{one} {other}");
        }
        assert!(distance(&"x".repeat(1 << 20), "log") > 1 << 19);
    }

    #[test]
    fn foreign_text_is_shown_on_one_short_line() {
        assert_eq!(shown("plain ü"), "plain ü");
        assert_eq!(shown("a\nb"), "a\\nb");
        assert!(shown(&"x".repeat(5000)).len() < 80);
    }
}
