//! Terms: constants, collections, calls, references.

use super::{
    super::{
        lexer::{Fault, Token},
        syntax::{Function, Head, Key, Term},
        value::Value,
    },
    KEYWORDS, Parser,
};

impl<'t> Parser<'t> {
    pub(super) fn term(&mut self) -> Result<Term, Fault> {
        self.grow()?;
        self.deeper(Self::term_here)
    }

    fn term_here(&mut self) -> Result<Term, Fault> {
        let constant = |value| Ok(Term::Constant(value));
        match self.now.token.clone() {
            Token::Text(text) => {
                self.take()?;
                constant(Value::String(text))
            }
            Token::Number(number) => {
                self.take()?;
                constant(Value::Number(number))
            }
            Token::Symbol("-") => match self.next.token {
                Token::Number(number) => {
                    self.take()?;
                    self.take()?;
                    constant(Value::Number(-number))
                }
                _ => self.unsupported("`-`"),
            },
            Token::Symbol("[") => {
                let terms = self.terms("]")?;
                Ok(folded(terms, Value::Array, Term::Array))
            }
            Token::Symbol("{") => {
                if self.next.token == Token::Symbol("}") {
                    return self.unsupported("an object");
                }
                let terms = self.terms("}")?;
                Ok(folded(terms, set, Term::Set))
            }
            Token::Name(word @ ("true" | "false")) => {
                self.take()?;
                constant(Value::Bool(word == "true"))
            }
            Token::Name("null") => {
                self.take()?;
                constant(Value::Null)
            }
            Token::Name(name) if self.next.token == Token::Symbol("(") => self.call(name),
            Token::Name(name) => self.reference(name),
            token => Err(self.now.fault(format!("a value is expected, not {token}"))),
        }
    }

    /// Terms between brackets.
    fn terms(&mut self, end: &str) -> Result<Vec<Term>, Fault> {
        self.take()?;
        let mut terms = Vec::new();
        while !self.is(end) {
            terms.push(self.term()?);
            match self.now.token {
                Token::Symbol(",") => drop(self.take()?),
                Token::Symbol("|") => return self.unsupported("a comprehension"),
                Token::Symbol(":") => return self.unsupported("an object"),
                Token::Symbol(symbol) if symbol == end => {}
                _ => return Err(self.now.fault(format!("`{end}` is expected, not {}", self.now.token))),
            }
        }
        self.take()?;
        Ok(terms)
    }

    fn call(&mut self, name: &str) -> Result<Term, Fault> {
        let Some((function, arity)) = Function::named(name) else {
            return self.unsupported(&format!("the function {}", self.now.token));
        };
        let place = self.take()?;
        let arguments = self.terms(")")?;
        if arguments.len() != arity {
            return Err(place.fault(format!("{name} takes {arity} arguments, not {}", arguments.len())));
        }
        Ok(Term::Call(function, arguments))
    }

    fn reference(&mut self, name: &'t str) -> Result<Term, Fault> {
        let head = self.head(name)?;
        self.take()?;
        let mut keys = Vec::new();
        while !self.now.first {
            if self.is(".") {
                self.take()?;
                keys.push(Key::Of(Term::Constant(Value::String(self.name()?.to_owned()))));
            } else if self.is("[") {
                self.take()?;
                keys.push(self.key()?);
                self.expect("]")?;
            } else {
                break;
            }
            self.grow()?;
        }
        Ok(Term::Reference(head, keys))
    }

    /// What a reference begins with.
    fn head(&mut self, name: &'t str) -> Result<Head, Fault> {
        if name == "input" {
            return Ok(Head::Input);
        }
        if KEYWORDS.contains(&name) {
            return self.unsupported(&format!("`{name}` here"));
        }
        match self.scope.variables.iter().find(|known| known.0 == name) {
            Some((_, number, true)) => return Ok(Head::Variable(*number)),
            Some(_) => return Err(self.now.fault(format!("the variable `{name}` has no value yet"))),
            None => {}
        }
        match self.names.get(name) {
            Some(rule) => {
                self.uses.push((*rule, self.now.line));
                Ok(Head::Rule(*rule))
            }
            None => {
                Err(self.now.fault(format!("{} is no rule, and no variable with a value", self.now.token)))
            }
        }
    }

    /// What is between the brackets of a reference: a name without a value there takes each key in turn.
    fn key(&mut self) -> Result<Key, Fault> {
        let alone = self.next.token == Token::Symbol("]");
        if let (Token::Name(name), true) = (&self.now.token, alone) {
            let name = *name;
            let bound = self.scope.variables.iter().find(|known| known.0 == name).map(|known| known.2);
            let known = bound.unwrap_or_else(|| self.names.contains_key(name) || KEYWORDS.contains(&name));
            if !known {
                if self.scope.closed {
                    return self
                        .unsupported(&format!("the variable {} without a value before", self.now.token));
                }
                let place = self.take()?;
                return Ok(Key::Each(self.bind(name, &place)?));
            }
        }
        Ok(Key::Of(self.term()?))
    }
}

/// A collection of constants is one.
fn folded(terms: Vec<Term>, constant: fn(Vec<Value>) -> Value, computed: fn(Vec<Term>) -> Term) -> Term {
    if !terms.iter().all(|term| matches!(term, Term::Constant(_))) {
        return computed(terms);
    }
    let values = terms.into_iter().filter_map(|term| match term {
        Term::Constant(value) => Some(value),
        _ => None,
    });
    Term::Constant(constant(values.collect()))
}

/// A set has nothing twice.
pub(in crate::policy) fn set(mut values: Vec<Value>) -> Value {
    values.sort();
    values.dedup();
    Value::Set(values)
}
