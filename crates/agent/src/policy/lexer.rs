//! A policy's text as tokens, one at a time: a text of many megabytes must not become many more of tokens.

use std::fmt;

/// Bytes of a line, at most.
const LINE_LIMIT: usize = 64 << 10;
/// Digits of a number, at most: what fits into any field of a request, and then some.
const DIGITS: usize = 30;

/// Two characters that belong together, before single ones.
const SYMBOLS: [&str; 27] = [
    ":=", "==", "!=", "<=", ">=", "=", "<", ">", "{", "}", "[", "]", "(", ")", ",", ";", ":", ".", "|", "&",
    "+", "-", "*", "/", "%", "@", "!",
];

/// What a policy is refused for, and where.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    /// The line, from 1.
    pub(super) line: usize,
    /// The character in it, from 1.
    pub(super) column: usize,
    /// What is wrong.
    pub(super) what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "policy, line {}, column {}: {}", self.line, self.column, self.what)
    }
}

/// A token.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token<'t> {
    /// A name or a keyword.
    Name(&'t str),
    /// A string.
    Text(String),
    /// A number.
    Number(i128),
    /// One of the [`SYMBOLS`].
    Symbol(&'static str),
    /// The end.
    End,
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Token::Name(name) => write!(f, "`{}`", name.chars().take(64).collect::<String>()),
            Token::Text(_) => f.write_str("a string"),
            Token::Number(number) => write!(f, "`{number}`"),
            Token::Symbol(symbol) => write!(f, "`{symbol}`"),
            Token::End => f.write_str("the end of the policy"),
        }
    }
}

/// A token, and where it is.
#[derive(Clone, Debug)]
pub(super) struct Placed<'t> {
    /// The token.
    pub(super) token: Token<'t>,
    /// Its line.
    pub(super) line: usize,
    /// Its column.
    pub(super) column: usize,
    /// Whether nothing but space is before it in its line.
    pub(super) first: bool,
}

impl Placed<'_> {
    /// What is wrong here.
    pub(super) fn fault(&self, what: impl Into<String>) -> Fault {
        Fault { line: self.line, column: self.column, what: what.into() }
    }
}

/// The rest of a text.
pub(super) struct Lexer<'t> {
    rest: &'t str,
    line: usize,
    column: usize,
    first: bool,
}

impl<'t> Lexer<'t> {
    /// Begins; a line that is too long is refused here.
    pub(super) fn new(text: &'t str) -> Result<Lexer<'t>, Fault> {
        let long = text.split('\n').position(|line| line.len() > LINE_LIMIT);
        if let Some(line) = long {
            let what = format!("the line is longer than {LINE_LIMIT} bytes");
            return Err(Fault { line: line + 1, column: 1, what });
        }
        Ok(Lexer { rest: text, line: 1, column: 1, first: true })
    }

    /// The next token.
    pub(super) fn next(&mut self) -> Result<Placed<'t>, Fault> {
        self.skip();
        let (line, column) = (self.line, self.column);
        let first = std::mem::replace(&mut self.first, false);
        let token = match self.rest.chars().next() {
            None => Token::End,
            Some('"') => Token::Text(self.text()?),
            Some('`') => Token::Text(self.raw()?),
            Some(c) if c.is_ascii_digit() => self.number()?,
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                let end = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
                Token::Name(self.take(self.rest.find(end).unwrap_or(self.rest.len())))
            }
            Some(c) => match SYMBOLS.into_iter().find(|symbol| self.rest.starts_with(symbol)) {
                Some(symbol) => {
                    self.take(symbol.len());
                    Token::Symbol(symbol)
                }
                None => return Err(self.fault(format!("{c:?} means nothing here"))),
            },
        };
        Ok(Placed { token, line, column, first })
    }

    fn fault(&self, what: impl Into<String>) -> Fault {
        Fault { line: self.line, column: self.column, what: what.into() }
    }

    /// Takes bytes, which end at the end of a character, and counts them.
    fn take(&mut self, bytes: usize) -> &'t str {
        let (taken, rest) = self.rest.split_at_checked(bytes).unwrap_or((self.rest, ""));
        for c in taken.chars() {
            if c == '\n' {
                (self.line, self.column, self.first) = (self.line + 1, 1, true);
            } else {
                self.column += 1;
            }
        }
        self.rest = rest;
        taken
    }

    /// Space and comments.
    fn skip(&mut self) {
        loop {
            let space = self.rest.len() - self.rest.trim_start_matches([' ', '\t', '\r', '\n']).len();
            self.take(space);
            if !self.rest.starts_with('#') {
                return;
            }
            self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
        }
    }

    fn number(&mut self) -> Result<Token<'t>, Fault> {
        let start = self.fault("");
        let digits = self.take(self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len()));
        let fault = |what: &str| Fault { what: what.into(), ..start.clone() };
        let mut after = self.rest.chars();
        let next = (after.next(), after.next());
        if matches!(next, (Some('e' | 'E'), _)) || matches!(next, (Some('.'), Some('0'..='9'))) {
            return Err(fault("a number that is not whole is not supported"));
        }
        if matches!(next.0, Some(c) if c.is_alphanumeric() || c == '_') {
            return Err(fault("a number ends in letters"));
        }
        if digits.len() > 1 && digits.starts_with('0') || digits.len() > DIGITS {
            return Err(fault("a number has leading zeros or is too large"));
        }
        digits.parse().map(Token::Number).map_err(|_| fault("a number is too large"))
    }

    /// A string without escapes.
    fn raw(&mut self) -> Result<String, Fault> {
        let start = self.fault("a string has no end");
        self.take(1);
        let end = self.rest.find('`').ok_or(start)?;
        let text = self.take(end).to_owned();
        self.take(1);
        // A string over several lines does not begin a line after itself.
        self.first = false;
        Ok(text)
    }

    /// A string with escapes, on one line.
    fn text(&mut self) -> Result<String, Fault> {
        let start = self.fault("a string has no end in its line");
        self.take(1);
        let mut text = String::new();
        loop {
            let plain = self.rest.find(['"', '\\', '\n']).ok_or_else(|| start.clone())?;
            text.push_str(self.take(plain));
            match self.rest.chars().next() {
                Some('"') => {
                    self.take(1);
                    return Ok(text);
                }
                Some('\\') => text.push(self.escape()?),
                _ => return Err(start),
            }
        }
    }

    fn escape(&mut self) -> Result<char, Fault> {
        let unknown = self.fault("an escape in a string is not supported");
        self.take(1);
        let c = self.rest.chars().next().ok_or_else(|| unknown.clone())?;
        let meant = match c {
            '"' | '\\' | '/' => c,
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'u' => {
                let digits =
                    self.rest.get(1..5).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
                let digits = digits.ok_or_else(|| unknown.clone())?;
                let code = u32::from_str_radix(digits, 16).map_err(|_| unknown.clone())?;
                self.take(4);
                char::from_u32(code).ok_or(unknown)?
            }
            _ => return Err(unknown),
        };
        self.take(c.len_utf8());
        Ok(meant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Result<Vec<Token<'_>>, Fault> {
        let mut lexer = Lexer::new(text)?;
        let mut tokens = Vec::new();
        loop {
            match lexer.next()?.token {
                Token::End => return Ok(tokens),
                token => tokens.push(token),
            }
        }
    }

    #[test]
    fn a_text_falls_into_tokens() {
        let text = "a_1 := \"x\\n\\u00e9\\\"\" # comment {\n`r\\aw` >= 12[0]";
        assert_eq!(
            tokens(text).unwrap(),
            [
                Token::Name("a_1"),
                Token::Symbol(":="),
                Token::Text("x\né\"".into()),
                Token::Text("r\\aw".into()),
                Token::Symbol(">="),
                Token::Number(12),
                Token::Symbol("["),
                Token::Number(0),
                Token::Symbol("]"),
            ]
        );
    }

    #[test]
    fn faults_say_where() {
        for (text, line, column, what) in [
            ("a\n  \"x\ny\"", 2, 3, "no end"),
            ("a\n`x\n", 2, 1, "no end"),
            ("é 1.5", 1, 1, "means nothing"),
            ("x é", 1, 3, "means nothing"),
            ("a 1.5", 1, 3, "not whole"),
            ("1e3", 1, 1, "not whole"),
            ("007", 1, 1, "leading zeros"),
            ("\"\\x\"", 1, 2, "escape"),
            ("\"\\ud800\"", 1, 2, "escape"),
            ("\"\\", 1, 2, "escape"),
            ("\"\\u12", 1, 2, "escape"),
            ("a\0b", 1, 2, "means nothing"),
            (&"9".repeat(40), 1, 1, "too large"),
            (&format!("\n{}", " ".repeat(LINE_LIMIT + 1)), 2, 1, "longer than"),
        ] {
            let fault = tokens(text).unwrap_err();
            assert_eq!((fault.line, fault.column), (line, column), "{text:?}: {fault}");
            assert!(fault.what.contains(what), "{text:?}: {fault}");
        }
    }
}
