//! A configuration file: TOML, as far as settings need it.
//!
//! That is strings on one line, integers, booleans, and tables of `secs` and `nanos` for a time, in line or under a header
//! of their own. Whatever else TOML has is refused with its line: a parser for all of it is as large as the agent's
//! smaller half, and no setting could take it.

use std::{collections::BTreeSet, fs::File, io, io::Read, path::Path, time::Duration};

use super::{
    Config, Report,
    value::{Value, shown},
};

/// The most that is read of a file.
pub(super) const LIMIT: u64 = 1 << 20;

/// A file's settings in its order.
pub(super) type Settings = Vec<(String, Value)>;

/// Reads a file whole.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_to_limit(File::open(path)?, LIMIT)
}

/// Reads a file that must not be larger than `limit`.
pub(crate) fn read_to_limit(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {limit} bytes")));
    }
    Ok(content)
}

/// Reads and parses a file; an error says which file and which line.
pub(super) fn load(path: &str, read: impl Fn(&str) -> io::Result<Vec<u8>>) -> Result<Settings, String> {
    let name = shown(path);
    let content =
        read(path).map_err(|error| format!("cannot read the configuration file {name:?}: {error}"))?;
    let text = String::from_utf8(content)
        .map_err(|_| format!("the configuration file {name:?} is not UTF-8 text"))?;
    parse(&text).map_err(|(line, problem)| format!("the configuration file {name:?}, line {line}: {problem}"))
}

impl Config {
    /// Takes the settings of a file.
    pub(super) fn take_file(&mut self, settings: Settings, report: &mut Report) {
        for (key, value) in settings {
            self.apply(&key, &value, |setting| setting.key, report);
        }
    }
}

/// The settings of a text, or what is wrong in which line.
fn parse(text: &str) -> Result<Settings, (usize, String)> {
    let mut settings = Settings::new();
    let mut keys = BTreeSet::new();
    let mut table: Option<Table> = None;
    let mut last = 0;
    for (number, line) in (1..).zip(text.lines()) {
        last = number;
        let at = |problem: String| (number, problem);
        let mut rest = Cursor(line);
        if rest.at_end() {
            continue;
        }
        if rest.take('[') {
            settings.extend(table.take().map(Table::close).transpose().map_err(at)?);
            let key = rest.key().map_err(at)?;
            rest.expect(']').and_then(|()| rest.end()).map_err(at)?;
            once(&mut keys, &key).map_err(at)?;
            table = Some(Table { key, ..Table::default() });
            continue;
        }
        let (key, value) = rest.pair().and_then(|pair| rest.end().map(|()| pair)).map_err(at)?;
        match &mut table {
            Some(table) => table.add(&key, &value).map_err(at)?,
            None => {
                once(&mut keys, &key).map_err(at)?;
                settings.push((key, value));
            }
        }
    }
    settings.extend(table.map(Table::close).transpose().map_err(|problem| (last, problem))?);
    Ok(settings)
}

fn once(keys: &mut BTreeSet<String>, key: &str) -> Result<(), String> {
    if keys.insert(key.to_owned()) { Ok(()) } else { Err(format!("{} is set a second time", shown(key))) }
}

/// A table, which can only be a time.
#[derive(Default)]
struct Table {
    key: String,
    seconds: Option<u64>,
    nanoseconds: Option<u32>,
}

impl Table {
    fn add(&mut self, key: &str, value: &Value) -> Result<(), String> {
        let Value::Integer(number) = value else { return Err(format!("{} is not an integer", shown(key))) };
        let wrong = || format!("{number} is out of range for {key}");
        let again = match key {
            "secs" => self.seconds.replace(u64::try_from(*number).map_err(|_| wrong())?).is_some(),
            "nanos" => {
                let nanoseconds =
                    u32::try_from(*number).ok().filter(|n| *n < 1_000_000_000).ok_or_else(wrong)?;
                self.nanoseconds.replace(nanoseconds).is_some()
            }
            _ => return Err(format!("a table can only have secs and nanos, not {}", shown(key))),
        };
        if again { Err(format!("{key} is set a second time")) } else { Ok(()) }
    }

    fn close(self) -> Result<(String, Value), String> {
        let seconds = self.seconds.ok_or("a table needs secs")?;
        Ok((self.key, Value::Span(Duration::new(seconds, self.nanoseconds.unwrap_or(0)))))
    }
}

/// What is left of a line.
struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn skip_blanks(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t']);
    }

    /// Whether nothing but a comment is left.
    fn at_end(&mut self) -> bool {
        self.skip_blanks();
        self.0.is_empty() || self.0.starts_with('#')
    }

    fn end(&mut self) -> Result<(), String> {
        if self.at_end() { Ok(()) } else { Err(format!("{:?} is not expected here", shown(self.0))) }
    }

    fn take(&mut self, letter: char) -> bool {
        self.skip_blanks();
        let rest = self.0.strip_prefix(letter);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn expect(&mut self, letter: char) -> Result<(), String> {
        if self.take(letter) {
            Ok(())
        } else {
            Err(format!("{letter:?} is expected before {:?}", shown(self.0)))
        }
    }

    /// Takes the letters up to the first that does not fit.
    fn word(&mut self, fits: fn(char) -> bool) -> &'a str {
        let end = self.0.find(|letter| !fits(letter)).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        word
    }

    fn pair(&mut self) -> Result<(String, Value), String> {
        let key = self.key()?;
        self.expect('=')?;
        Ok((key, self.value()?))
    }

    fn key(&mut self) -> Result<String, String> {
        self.skip_blanks();
        if let Some(key) = self.string()? {
            return Ok(key);
        }
        match self.word(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-')) {
            "" => Err(format!("a name is expected before {:?}", shown(self.0))),
            key => Ok(key.to_owned()),
        }
    }

    fn value(&mut self) -> Result<Value, String> {
        self.skip_blanks();
        if let Some(text) = self.string()? {
            return Ok(Value::Text(text));
        }
        if self.take('{') {
            return self.table();
        }
        let rest = self.0;
        match self
            .word(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '+' | '.' | ':'))
        {
            "true" => Ok(Value::Boolean(true)),
            "false" => Ok(Value::Boolean(false)),
            word => integer(word).map(Value::Integer).ok_or_else(|| {
                format!(
                    "{:?} is not a string on one line, an integer, true or false, or a table",
                    shown(rest)
                )
            }),
        }
    }

    /// A table in line, behind its brace.
    fn table(&mut self) -> Result<Value, String> {
        let mut table = Table::default();
        loop {
            let (key, value) = self.pair()?;
            table.add(&key, &value)?;
            if !self.take(',') {
                break;
            }
        }
        self.expect('}')?;
        table.close().map(|(_, value)| value)
    }

    /// A string, if there is one here.
    fn string(&mut self) -> Result<Option<String>, String> {
        if self.0.starts_with("\"\"\"") || self.0.starts_with("'''") {
            return Err("strings of several lines are not supported".into());
        }
        let open = || "a string has no end".to_owned();
        if let Some(rest) = self.0.strip_prefix('\'') {
            let (text, rest) = rest.split_once('\'').ok_or_else(open)?;
            self.0 = rest;
            return Ok(Some(text.to_owned()));
        }
        let Some(rest) = self.0.strip_prefix('"') else { return Ok(None) };
        let mut letters = rest.chars();
        let mut text = String::new();
        loop {
            match letters.next().ok_or_else(open)? {
                '"' => break,
                '\\' => text.push(escape(&mut letters)?),
                letter => text.push(letter),
            }
        }
        self.0 = letters.as_str();
        Ok(Some(text))
    }
}

/// The letter that stands behind a backslash.
fn escape(letters: &mut std::str::Chars<'_>) -> Result<char, String> {
    let kind = letters.next();
    let digits = match kind {
        Some('b') => return Ok('\u{8}'),
        Some('t') => return Ok('\t'),
        Some('n') => return Ok('\n'),
        Some('f') => return Ok('\u{c}'),
        Some('r') => return Ok('\r'),
        Some(letter @ ('"' | '\\')) => return Ok(letter),
        Some('u') => 4,
        Some('U') => 8,
        _ => return Err("a string has an unknown escape".into()),
    };
    let number = letters.by_ref().take(digits).collect::<String>();
    Some(&number)
        .filter(|number| number.len() == digits && number.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|number| u32::from_str_radix(number, 16).ok())
        .and_then(char::from_u32)
        .ok_or_else(|| {
            format!("\\{}{} is not a character", if digits == 4 { 'u' } else { 'U' }, shown(&number))
        })
}

/// An integer: decimal with a sign, or hexadecimal, octal, binary; underscores stand between digits.
fn integer(word: &str) -> Option<i64> {
    let (digits, radix) = [("0x", 16), ("0o", 8), ("0b", 2)]
        .into_iter()
        .find_map(|(prefix, radix)| Some((word.strip_prefix(prefix)?, radix)))
        .unwrap_or((word, 10));
    let unsigned = if radix == 10 { digits.trim_start_matches(['+', '-']) } else { digits };
    let plain = digits.len() - unsigned.len() <= 1
        && unsigned
            .split('_')
            .all(|part| !part.is_empty() && part.chars().all(|digit| digit.is_digit(radix)))
        && (radix != 10 || unsigned == "0" || !unsigned.starts_with('0'));
    i64::from_str_radix(&digits.replace('_', ""), radix).ok().filter(|_| plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_value_is_read() {
        let text = r#"
            # settings
            server_addr = "unix:///run/\"a\"\t\u00fc" # where
            'log_level' = 'de\bug'
            "log_vport" = 1_025
            container_pipe_size=0x10
            tracing = true
            hotplug_timeout = { secs = 5, nanos = 500 }
            n = -0
            [cdi_timeout]
            nanos = 1
            secs = 2
            [image_pull_timeout] # at the end
            secs = 3
        "#;
        let expected = [
            ("server_addr", Value::Text("unix:///run/\"a\"\tü".into())),
            ("log_level", Value::Text("de\\bug".into())),
            ("log_vport", Value::Integer(1025)),
            ("container_pipe_size", Value::Integer(16)),
            ("tracing", Value::Boolean(true)),
            ("hotplug_timeout", Value::Span(Duration::new(5, 500))),
            ("n", Value::Integer(0)),
            ("cdi_timeout", Value::Span(Duration::new(2, 1))),
            ("image_pull_timeout", Value::Span(Duration::new(3, 0))),
        ];
        assert_eq!(parse(text).unwrap(), expected.map(|(key, value)| (key.to_owned(), value)));
        assert_eq!(parse("a = 1\r\nb = 2\r\n").unwrap().len(), 2);
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn whatever_else_there_is_is_refused_with_its_line() {
        for line in [
            "a",
            "a =",
            "= 1",
            "a = 1 2",
            "a = 1.5",
            "a = 1979-05-27",
            "a = [1]",
            "a = \"open",
            "a = 'open",
            "a = \"\\q\"",
            "a = \"\\ud800\"",
            "a = \"\\u12\"",
            "a = \"\"\"x\"\"\"",
            "a = 01",
            "a = 1__0",
            "a = _1",
            "a = +-1",
            "a = 0x-1",
            "a = 9223372036854775808",
            "a = yes",
            "a = {}",
            "a = { secs = 1",
            "a = { secs = -1 }",
            "a = { secs = 1, secs = 2 }",
            "a = { secs = 1, nanos = 1000000000 }",
            "a = { secs = true }",
            "a = { x = 1 }",
            "a.b = 1",
            "[a",
            "[[a]]",
            "[a]\nx = 1",
            "ok = 2",
            "a = 1 # \u{0}\nb c",
            "ü = 1",
            "{",
            "\u{0}",
        ] {
            let text = format!("ok = 1\n{line}\n");
            let (number, problem) = parse(&text).expect_err(line);
            assert!((2..=3).contains(&number) && !problem.is_empty(), "{line:?}: {number} {problem}");
        }
        assert!(parse("[a]\n").unwrap_err().1.contains("secs"));
    }

    #[test]
    fn a_file_is_named_in_its_error_and_its_size_is_bounded() {
        let load = |content: &[u8]| super::load("/f", |_| Ok(content.to_vec()));
        assert!(load(b"x = \n").unwrap_err().contains("\"/f\", line 1"));
        assert!(load(b"\xff").unwrap_err().contains("UTF-8"));
        assert!(super::load("/f", |_| Err(io::ErrorKind::NotFound.into())).unwrap_err().contains("\"/f\""));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b'#'; 1 + usize::try_from(LIMIT).unwrap()]).unwrap();
        assert!(read(file.path()).is_err());
        assert!(load(&vec![b'['; 1 << 20]).is_err());
    }

    #[test]
    fn a_file_sets_by_its_own_names_and_types() {
        let mut config = Config::default();
        let mut report = Report::default();
        let settings =
            parse("hotplug_timeout = 7\ntracing = \"yes\"\nlog_vport = \"1\"\nhotplug_timout = 1\npolicy_file = '/p'").unwrap();
        config.take_file(settings, &mut report);
        let expected =
            Config { hotplug_timeout: Duration::from_secs(7), policy_file: "/p".into(), ..Config::default() };
        assert_eq!(config, expected);
        assert_eq!(report.wrong.len(), 2, "{report:?}");
        assert!(report.unheeded[0].contains("is hotplug_timeout meant?"), "{report:?}");
    }
}
