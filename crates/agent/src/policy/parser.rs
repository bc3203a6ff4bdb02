//! From a policy's text to its rules. What is not understood is refused with its place, never passed over.
//!
//! ```text
//! policy     = "package agent_policy" { import | "default" name (":="|"=") constant | rule }
//! rule       = name [(":="|"=") constant] ["if" (block | statement) | block]
//! block      = "{" statement { (";" | new line) statement } "}"
//! statement  = "some" name {"," name} | "some" [name ","] name "in" term | "every" [name ","] name "in" term block
//!            | name ":=" term | ["not"] term [("=="|"!="|"<"|"<="|">"|">="|"in") term]
//! term       = constant | "[" terms "]" | "{" terms "}" | function "(" terms ")" | (name) { "." name | "[" term "]" }
//! ```
//! The language would reorder a body until every variable has a value; here a variable has to be bound above its use, or
//! where it stands alone between brackets.

mod term;

use std::collections::BTreeMap;

use super::{
    lexer::{Fault, Lexer, Placed, Token},
    syntax::{Comparison, Definition, Rule, Statement, Term},
    value::Value,
};

pub(super) use term::set;

/// The package of every policy.
const PACKAGE: &str = "agent_policy";
/// How deep terms and blocks nest.
const DEPTH: usize = 32;
/// Variables of a body.
const VARIABLES: usize = 64;
/// Bytes of an import's path: more than any that is known.
const IMPORT: usize = 64;
/// Rules, statements and terms altogether.
const SIZE: usize = 250_000;
/// Words that are no names.
const KEYWORDS: [&str; 16] = [
    "as", "contains", "data", "default", "else", "every", "false", "if", "import", "in", "input", "not",
    "null", "package", "some", "true",
];

/// Reads a policy.
pub(super) fn parse(text: &str) -> Result<Vec<Rule>, Fault> {
    let names = rule_names(text)?;
    let mut lexer = Lexer::new(text)?;
    let (now, next) = (lexer.next()?, lexer.next()?);
    let rules = names.keys().map(|name| Rule { name: (*name).to_owned(), ..Rule::default() }).collect();
    let names = names.into_keys().enumerate().map(|(index, name)| (name, index)).collect();
    let scope = Scope::default();
    let mut parser = Parser { lexer, now, next, names, rules, scope, uses: Vec::new(), depth: 0, size: 0 };
    parser.policy()?;
    Ok(parser.rules)
}

/// The names that rules begin with: known before any body is read, since a body may refer to a rule below it.
fn rule_names(text: &str) -> Result<BTreeMap<&str, ()>, Fault> {
    let mut lexer = Lexer::new(text)?;
    let (mut names, mut open, mut default) = (BTreeMap::new(), 0_usize, false);
    loop {
        let placed = lexer.next()?;
        match placed.token {
            Token::End => return Ok(names),
            Token::Symbol("{" | "[" | "(") => open += 1,
            Token::Symbol("}" | "]" | ")") => open = open.saturating_sub(1),
            Token::Name("default") if open == 0 && placed.first => default = true,
            Token::Name(name) if open == 0 && (placed.first || default) => {
                default = false;
                if !KEYWORDS.contains(&name) {
                    names.insert(name, ());
                }
            }
            _ => {}
        }
    }
}

/// The variables of a body.
#[derive(Default)]
struct Scope<'t> {
    /// Each with its number, and whether it has a value here.
    variables: Vec<(&'t str, usize, bool)>,
    /// How many there have been.
    count: usize,
    /// Within `not` and the collection of `every`, where a variable cannot get its value.
    closed: bool,
}

struct Parser<'t> {
    lexer: Lexer<'t>,
    now: Placed<'t>,
    next: Placed<'t>,
    names: BTreeMap<&'t str, usize>,
    rules: Vec<Rule>,
    scope: Scope<'t>,
    uses: Vec<(usize, usize)>,
    depth: usize,
    size: usize,
}

impl<'t> Parser<'t> {
    /// Goes on to the next token; gives the one that was.
    fn take(&mut self) -> Result<Placed<'t>, Fault> {
        let next = self.lexer.next()?;
        Ok(std::mem::replace(&mut self.now, std::mem::replace(&mut self.next, next)))
    }

    /// Whether the token is this symbol.
    fn is(&self, symbol: &str) -> bool {
        matches!(self.now.token, Token::Symbol(here) if here == symbol)
    }

    /// Whether the token is this word.
    fn is_word(&self, word: &str) -> bool {
        self.now.token == Token::Name(word)
    }

    fn expect(&mut self, symbol: &str) -> Result<(), Fault> {
        if !self.is(symbol) {
            return Err(self.now.fault(format!("`{symbol}` is expected, not {}", self.now.token)));
        }
        self.take().map(drop)
    }

    fn name(&mut self) -> Result<&'t str, Fault> {
        match self.now.token {
            Token::Name(name) => self.take().map(|_| name),
            _ => Err(self.now.fault(format!("a name is expected, not {}", self.now.token))),
        }
    }

    fn unsupported<T>(&self, what: &str) -> Result<T, Fault> {
        Err(self.now.fault(format!("{what} is not supported")))
    }

    /// Counts what is made of the text.
    fn grow(&mut self) -> Result<(), Fault> {
        self.size += 1;
        if self.size > SIZE {
            return Err(self.now.fault(format!("the policy has more than {SIZE} terms")));
        }
        Ok(())
    }

    /// Reads something that may contain itself.
    fn deeper<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<T, Fault> {
        if self.depth == DEPTH {
            return Err(self.now.fault(format!("this nests deeper than {DEPTH}")));
        }
        self.depth += 1;
        let result = read(self);
        self.depth -= 1;
        result
    }

    fn policy(&mut self) -> Result<(), Fault> {
        if !self.is_word("package") {
            return Err(self.now.fault(format!("`package {PACKAGE}` is expected, not {}", self.now.token)));
        }
        self.take()?;
        if !self.is_word(PACKAGE) || self.next.token == Token::Symbol(".") {
            return Err(self.now.fault(format!("the package is not `{PACKAGE}`")));
        }
        self.take()?;
        while self.now.token != Token::End {
            if !self.now.first {
                return Err(self.now.fault(format!("{} does not begin a line", self.now.token)));
            }
            self.grow()?;
            match self.now.token {
                Token::Name("import") => self.import()?,
                Token::Name("default") => self.default()?,
                Token::Name(_) => self.rule()?,
                _ => return Err(self.now.fault(format!("a rule is expected, not {}", self.now.token))),
            }
        }
        Ok(())
    }

    /// The imports that change nothing here.
    fn import(&mut self) -> Result<(), Fault> {
        let start = self.take()?;
        let mut path = self.name()?.to_owned();
        while self.is(".") && !self.now.first && path.len() <= IMPORT {
            self.grow()?;
            self.take()?;
            path.push('.');
            path.push_str(self.name()?);
        }
        if path.len() > IMPORT {
            return Err(start.fault(format!("the path of an import is longer than {IMPORT} bytes")));
        }
        let harmless = ["rego.v1", "future.keywords"].contains(&path.as_str())
            || ["if", "in", "every", "contains"].iter().any(|word| path == format!("future.keywords.{word}"));
        if harmless && !self.is_word("as") {
            return Ok(());
        }
        Err(start.fault(format!("the import of `{path}` is not supported")))
    }

    fn default(&mut self) -> Result<(), Fault> {
        self.take()?;
        let place = self.now.clone();
        let index = self.rule_name()?;
        if !self.is(":=") && !self.is("=") {
            return Err(self.now.fault(format!("`:=` is expected, not {}", self.now.token)));
        }
        self.take()?;
        let value = self.constant()?;
        match self.rules.get_mut(index) {
            Some(rule) if rule.default.is_none() => {
                rule.default = Some(value);
                Ok(())
            }
            _ => Err(place.fault("the rule has two defaults")),
        }
    }

    /// The number of the rule that begins here.
    fn rule_name(&mut self) -> Result<usize, Fault> {
        let place = self.now.clone();
        let name = self.name()?;
        let index = self.names.get(name).copied();
        index.ok_or_else(|| place.fault(format!("{} is no name for a rule", place.token)))
    }

    fn rule(&mut self) -> Result<(), Fault> {
        let index = self.rule_name()?;
        (self.scope, self.uses) = (Scope::default(), Vec::new());
        let mut value = Value::Bool(true);
        let mut unconditional = false;
        match self.now.token {
            Token::Symbol("(") => return self.unsupported("a function"),
            Token::Symbol("[" | ".") => return self.unsupported("a rule with a key"),
            Token::Name("contains") => return self.unsupported("a rule that collects a set"),
            Token::Symbol(":=" | "=") => {
                self.take()?;
                value = self.constant()?;
                unconditional = true;
            }
            _ => {}
        }
        let mut body = Vec::new();
        if self.is_word("if") {
            self.take()?;
            body = if self.is("{") { self.block()? } else { self.statement()?.into_iter().collect() };
        } else if self.is("{") && !self.now.first {
            body = self.block()?;
        } else if !unconditional {
            return Err(self.now.fault(format!("`:=`, `if` or `{{` is expected, not {}", self.now.token)));
        }
        match self.now.token {
            Token::Name("else") => return self.unsupported("`else`"),
            Token::Symbol("{") => return self.unsupported("a second body"),
            _ => {}
        }
        let (variables, uses) = (self.scope.count, std::mem::take(&mut self.uses));
        if let Some(rule) = self.rules.get_mut(index) {
            rule.definitions.push(Definition { value, body, variables });
            rule.uses.extend(uses);
        }
        Ok(())
    }

    fn constant(&mut self) -> Result<Value, Fault> {
        let place = self.now.clone();
        match self.term()? {
            Term::Constant(value) => Ok(value),
            _ => Err(place.fault("a value that has to be computed is not supported here")),
        }
    }

    fn block(&mut self) -> Result<Vec<Statement>, Fault> {
        self.expect("{")?;
        let mut statements = Vec::new();
        let mut empty = true;
        while !self.is("}") {
            empty = false;
            let statement = self.deeper(Self::statement)?;
            statements.extend(statement);
            match self.now.token {
                Token::Symbol("}") => {}
                Token::Symbol(";") => drop(self.take()?),
                Token::End => return Err(self.now.fault("a body has no end")),
                _ if self.now.first => {}
                _ => return self.unsupported(&format!("{} after a condition", self.now.token)),
            }
        }
        if empty {
            return Err(self.now.fault("a body is empty"));
        }
        self.take()?;
        Ok(statements)
    }

    /// A condition; none of a mere declaration.
    fn statement(&mut self) -> Result<Option<Statement>, Fault> {
        self.grow()?;
        match self.now.token {
            Token::Name("some") => self.some(),
            Token::Name("every") => self.every().map(Some),
            Token::Name("not") => {
                self.take()?;
                let negated = self.closed(Self::condition)?;
                Ok(Some(Statement::Not(Box::new(negated))))
            }
            Token::Name(name) if self.next.token == Token::Symbol(":=") => {
                let place = self.take()?;
                self.take()?;
                let term = self.term()?;
                Ok(Some(Statement::Assign(self.bind(name, &place)?, term)))
            }
            _ => self.condition().map(Some),
        }
    }

    /// Reads where no variable gets a value.
    fn closed<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<T, Fault> {
        let before = std::mem::replace(&mut self.scope.closed, true);
        let result = read(self);
        self.scope.closed = before;
        result
    }

    fn condition(&mut self) -> Result<Statement, Fault> {
        let left = self.term()?;
        let comparison = match self.now.token {
            Token::Name("in") => {
                self.take()?;
                return Ok(Statement::In(left, self.term()?));
            }
            Token::Symbol("==") => Comparison::Equal,
            Token::Symbol("!=") => Comparison::Unequal,
            Token::Symbol("<") => Comparison::Less,
            Token::Symbol("<=") => Comparison::AtMost,
            Token::Symbol(">") => Comparison::Greater,
            Token::Symbol(">=") => Comparison::AtLeast,
            Token::Symbol("=") => return self.unsupported("`=`, unlike `==` and `:=`,"),
            _ => return Ok(Statement::Holds(left)),
        };
        self.take()?;
        Ok(Statement::Compare(left, comparison, self.term()?))
    }

    /// `some i, j` declares; `some [key,] value in collection` iterates.
    fn some(&mut self) -> Result<Option<Statement>, Fault> {
        let start = self.take()?;
        let names = self.names_of_variables()?;
        if !self.is_word("in") {
            for (name, place) in names {
                self.declare(name, &place, false)?;
            }
            return Ok(None);
        }
        self.take()?;
        let collection = self.term()?;
        let (key, value) = self.pair(names, &start)?;
        Ok(Some(Statement::Some { key, value, collection }))
    }

    fn every(&mut self) -> Result<Statement, Fault> {
        let start = self.take()?;
        let names = self.names_of_variables()?;
        if !self.is_word("in") {
            return Err(self.now.fault(format!("`in` is expected, not {}", self.now.token)));
        }
        self.take()?;
        let collection = self.closed(Self::term)?;
        let outer = self.scope.variables.len();
        // What the body binds ends with it, and it may bind even within what is closed.
        let closed = std::mem::replace(&mut self.scope.closed, false);
        let (key, value) = self.pair(names, &start)?;
        let body = self.block()?;
        self.scope.closed = closed;
        self.scope.variables.truncate(outer);
        Ok(Statement::Every { key, value, collection, body })
    }

    fn names_of_variables(&mut self) -> Result<Vec<(&'t str, Placed<'t>)>, Fault> {
        let mut names = Vec::new();
        loop {
            let place = self.now.clone();
            self.grow()?;
            names.push((self.name()?, place));
            if !self.is(",") {
                return Ok(names);
            }
            if names.len() == VARIABLES {
                return Err(self.now.fault(format!("a body has more than {VARIABLES} variables")));
            }
            self.take()?;
        }
    }

    /// The variables of `[key,] value in`.
    fn pair(
        &mut self,
        names: Vec<(&'t str, Placed<'t>)>,
        start: &Placed<'t>,
    ) -> Result<(Option<usize>, usize), Fault> {
        match names.as_slice() {
            [(value, place)] => Ok((None, self.bind(value, place)?)),
            [(key, key_place), (value, place)] => {
                Ok((Some(self.bind(key, key_place)?), self.bind(value, place)?))
            }
            _ => Err(start.fault("more than two names before `in` are not supported")),
        }
    }

    /// A variable that has a value from here on.
    fn bind(&mut self, name: &'t str, place: &Placed<'t>) -> Result<usize, Fault> {
        if let Some((_, number, bound @ false)) =
            self.scope.variables.iter_mut().find(|known| known.0 == name)
        {
            *bound = true;
            return Ok(*number);
        }
        self.declare(name, place, true)
    }

    fn declare(&mut self, name: &'t str, place: &Placed<'t>, bound: bool) -> Result<usize, Fault> {
        if KEYWORDS.contains(&name) {
            return Err(place.fault(format!("`{name}` is no name for a variable")));
        }
        if name != "_" && self.scope.variables.iter().any(|known| known.0 == name) {
            return Err(place.fault(format!("the variable {} is there already", place.token)));
        }
        if self.scope.count == VARIABLES {
            return Err(place.fault(format!("a body has more than {VARIABLES} variables")));
        }
        let number = self.scope.count;
        self.scope.count += 1;
        if name != "_" {
            self.scope.variables.push((name, number, bound));
        }
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> (usize, usize, String) {
        let fault = parse(&format!("package agent_policy\n{text}")).map(drop).expect_err(text);
        (fault.line - 1, fault.column, fault.what)
    }

    #[test]
    fn what_is_not_supported_is_refused_at_its_place() {
        for (text, line, column, what) in [
            ("f(x) := 1", 1, 2, "a function is not"),
            ("A contains x if { x := 1 }", 1, 3, "collects a set"),
            ("A[x] { x := 1 }", 1, 2, "with a key"),
            ("A := {\"a\": 1}", 1, 10, "an object"),
            ("A := {}", 1, 6, "an object"),
            ("A if { x := [y | y := 1] }", 1, 14, "no rule, and no variable"),
            ("A if { x := [1 | true] }", 1, 16, "comprehension"),
            ("A := 1 + 2", 1, 8, "does not begin a line"),
            ("A if { input.a + 1 == 2 }", 1, 16, "`+` after a condition is not"),
            ("A if { input.a = 2 }", 1, 16, "`=`, unlike"),
            ("A if { data.x }", 1, 8, "`data` here is not"),
            ("A if { regex.match(\"a\", input.b) }", 1, 8, "`regex` is no rule"),
            ("A if { sprintf(\"a\", []) }", 1, 8, "function `sprintf`"),
            ("A if { print(1) }", 1, 8, "function `print`"),
            ("A if { input.a with input as 1 }", 1, 16, "`with` after"),
            ("A if { true } else := false", 1, 15, "`else`"),
            ("A { true } { false }", 1, 12, "second body"),
            ("A if { not input.a[_] == 1 }", 1, 20, "without a value before"),
            ("A if { not input.a[i] == 1 }", 1, 20, "without a value before"),
            ("A if {\n some i\n i == 1 }", 3, 2, "has no value yet"),
            ("A if { i == 1 }", 1, 8, "`i` is no rule"),
            ("A if { }", 1, 8, "empty"),
            ("A if { true", 1, 12, "no end"),
            ("A", 1, 2, "is expected"),
            ("A := input.x", 1, 6, "has to be computed"),
            ("default A := B", 1, 14, "no rule"),
            ("default A := true\ndefault A := false", 2, 9, "two defaults"),
            ("import data.x", 1, 1, "import of `data.x`"),
            ("import rego.v1 as x", 1, 1, "import"),
            ("default import := 1", 1, 9, "no name for a rule"),
            ("A if { input.a == 1.5 }", 1, 19, "not whole"),
            ("A if { x := 1; x := 2 }", 1, 16, "there already"),
            ("A if { every a, b, c in input { true } }", 1, 8, "more than two"),
            ("A if { startswith(\"a\") }", 1, 8, "takes 2 arguments"),
            ("A if { every x in input.a[_] { x } }", 1, 27, "without a value before"),
            ("1 := 2", 1, 1, "a rule is expected"),
            ("A if { (1) == 1 }", 1, 8, "a value is expected"),
            ("A := true B := false", 1, 11, "does not begin a line"),
        ] {
            let (at_line, at_column, is) = fault(text);
            assert!(is.contains(what), "{text}: {is}");
            assert_eq!((at_line, at_column), (line, column), "{text}: {is}");
        }
        for text in ["", "package other", "package agent_policy.x", "A := true", "package"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_body_is_lines_or_semicolons() {
        let text = "package agent_policy\nimport rego.v1\nimport future.keywords.if\n
            A if { input.a; input.b == 1\n not input.c\n some i\n input.d[i] ==\n input.e[i]\n }
            B { startswith(input.a, \"x\") } # old\n
            C if input.a in [1, -2, {3, 4}]\n\tdefault C = false";
        let rules = parse(text).unwrap();
        let shape = |name: &str| {
            let rule = rules.iter().find(|rule| rule.name == name).unwrap();
            (rule.default.is_some(), rule.definitions[0].body.len(), rule.definitions[0].variables)
        };
        assert_eq!((shape("A"), shape("B"), shape("C")), ((false, 4, 1), (false, 1, 0), (true, 1, 0)));
    }

    #[test]
    fn hostile_texts_are_refused() {
        let nested =
            |open: &str, close: &str| format!("A := {}1{}", open.repeat(100_000), close.repeat(100_000));
        assert!(fault(&nested("[\n", "]\n")).2.contains("deeper than"));
        let blocks: String = (0..1000).map(|i| format!("every x{i} in input {{\n")).collect();
        assert!(fault(&format!("A if {{ {blocks}")).2.contains("deeper than"));
        let many = "A := true\n".repeat(SIZE);
        assert!(fault(&many).2.contains("more than"));
        let variables: String = (0..100).map(|i| format!("x{i} := 1\n")).collect();
        assert!(fault(&format!("A if {{ {variables} }}")).2.contains("more than 64 variables"));
        for text in ["\0", "A\0 := true", "A := \"\0", "}}}}", "A if { [[[ }", "A := \u{202e}"] {
            fault(text);
        }
    }
}
