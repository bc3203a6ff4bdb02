//! JSON as far as the agent writes it.

use std::fmt::Write;

/// Appends a string with its quotes.
pub(crate) fn quote(json: &mut String, text: &str) {
    json.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => json.extend(['\\', character]),
            '\n' => json.push_str("\\n"),
            control if control < ' ' => {
                // Writing to a string cannot fail.
                let _ = write!(json, "\\u{:04x}", u32::from(control));
            }
            other => json.push(other),
        }
    }
    json.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_quoted() {
        let mut json = String::new();
        quote(&mut json, "a \"b\" \\ \n \u{1} \t ü");
        assert_eq!(json, r#""a \"b\" \\ \n \u0001 \u0009 ü""#);
    }
}
