//! The trace that a request belongs to, as its sender tells it: W3C Trace Context in the metadata of the request.

use std::collections::HashMap;

/// The span that a request was sent in.
#[derive(Debug, PartialEq)]
pub(super) struct Parent {
    /// The trace.
    pub(super) trace: u128,
    /// The span; 0 when the request is the first of its trace.
    pub(super) span: u64,
    /// Whether the trace is recorded.
    pub(super) sampled: bool,
    /// Notes of the systems that the trace came through, the latest first.
    pub(super) state: Vec<(String, String)>,
}

/// So many notes are passed on, as the standard has it.
const NOTES: usize = 32;

impl Parent {
    /// The parent that the metadata names, or a trace of its own.
    pub(super) fn of(metadata: &HashMap<String, Vec<String>>) -> Parent {
        // Several values of one key are one list.
        let value = |key: &str| metadata.get(key).map(|values| values.join(","));
        match value("traceparent").as_deref().and_then(parse) {
            Some((trace, span, sampled)) => {
                let state = value("tracestate").map(|notes| state(&notes)).unwrap_or_default();
                Parent { trace, span, sampled, state }
            }
            None => {
                let trace = (u128::from(super::random()) << 64) | u128::from(super::random());
                Parent { trace, span: 0, sampled: true, state: Vec::new() }
            }
        }
    }
}

/// `version-trace-span-flags` in lower-case hexadecimal digits. A later version may have more behind it.
fn parse(text: &str) -> Option<(u128, u64, bool)> {
    let mut fields = text.trim().split('-');
    let mut field = |digits: usize| {
        fields.next().filter(|field| {
            field.len() == digits && field.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        })
    };
    let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
    if version == "ff" || (version == "00" && fields.next().is_some()) {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0)?;
    let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    Some((trace, span, flags & 1 != 0))
}

/// Notes that are none are left out.
fn state(notes: &str) -> Vec<(String, String)> {
    notes
        .split(',')
        .filter_map(|note| note.trim().split_once('='))
        .filter(|(key, value)| !key.is_empty() && key.len() <= 256 && value.len() <= 256)
        .take(NOTES)
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn a_parent_is_read_as_the_standard_has_it() {
        let ids = (0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c, 0xb7ad_6b71_6920_3331);
        for (text, sampled) in [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("00-{TRACE}-{SPAN}-00"), false),
            (format!("cc-{TRACE}-{SPAN}-03-what-comes-later"), true),
        ] {
            assert_eq!(parse(&text), Some((ids.0, ids.1, sampled)), "{text}");
        }
        for text in [
            String::new(),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-01-x"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01"),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
            "ü".repeat(55),
        ] {
            assert_eq!(parse(&text), None, "{text}");
        }
    }

    #[test]
    fn metadata_is_joined_and_a_wrong_parent_begins_a_trace() {
        let metadata = |entries: &[(&str, &[&str])]| {
            entries
                .iter()
                .map(|(key, values)| {
                    ((*key).to_owned(), values.iter().map(|value| (*value).to_owned()).collect())
                })
                .collect::<HashMap<String, Vec<String>>>()
        };
        let parent = format!("00-{TRACE}-{SPAN}-01");
        let told =
            Parent::of(&metadata(&[("traceparent", &[&parent]), ("tracestate", &["a=1,b=2", "c=3, =x,y"])]));
        let note = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(told.state, [note("a", "1"), note("b", "2"), note("c", "3")]);
        let own = Parent::of(&metadata(&[("traceparent", &["nonsense"]), ("tracestate", &["a=1"])]));
        assert!(own.sampled && own.span == 0 && own.trace != 0 && own.state.is_empty());
        assert_ne!(Parent::of(&metadata(&[])).trace, own.trace);
    }
}
