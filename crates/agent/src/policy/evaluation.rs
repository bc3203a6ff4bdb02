//! Whether a rule holds for a request.
//!
//! A body holds when its variables can be bound so that every statement holds: the statements are taken in their order, and
//! where one can hold in several ways, each is tried. What is undefined does not hold. The work is counted, and its end is
//! an error, not an answer.

use std::{borrow::Cow, cmp::Ordering, rc::Rc};

use super::{
    parser,
    syntax::{Comparison, Function, Head, Key, Rule, Statement, Term},
    value::Value,
};

/// How much work a request may be: about ten milliseconds.
const STEPS: u64 = 100_000;
/// How deep the rules, bodies and terms of a decision nest.
const DEPTH: usize = 200;

/// Why there is no decision.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub(super) enum Trouble {
    /// Too much work.
    #[error("its evaluation takes more than {STEPS} steps")]
    Steps,
    /// Too much nesting.
    #[error("its evaluation nests deeper than {DEPTH}")]
    Depth,
    /// The same rule has two values.
    #[error("a rule of it has two different values")]
    Conflict,
}

/// A value that is the policy's, the request's, or computed.
#[derive(Clone)]
enum Known<'p> {
    Borrowed(&'p Value),
    Computed(Rc<Value>),
}

impl<'p> Known<'p> {
    fn of(value: Value) -> Known<'p> {
        Known::Computed(Rc::new(value))
    }

    fn value(&self) -> &Value {
        match self {
            Known::Borrowed(value) => value,
            Known::Computed(value) => value,
        }
    }

    /// A part of it.
    fn part(&self, find: impl for<'v> Fn(&'v Value) -> Option<Cow<'v, Value>>) -> Option<Known<'p>> {
        match self {
            Known::Borrowed(value) => find(value).map(|found| match found {
                Cow::Borrowed(part) => Known::Borrowed(part),
                Cow::Owned(part) => Known::of(part),
            }),
            Known::Computed(value) => find(value).map(|part| Known::of(part.into_owned())),
        }
    }
}

/// The variables of a body.
type Bindings<'p> = Vec<Option<Known<'p>>>;

/// A decision in the making.
pub(super) struct Evaluation<'p> {
    rules: &'p [Rule],
    input: &'p Value,
    steps: u64,
    depth: usize,
    /// What rules turned out to be.
    found: Vec<Option<Option<&'p Value>>>,
}

impl<'p> Evaluation<'p> {
    /// Begins.
    pub(super) fn new(rules: &'p [Rule], input: &'p Value) -> Evaluation<'p> {
        Evaluation { rules, input, steps: 0, depth: 0, found: vec![None; rules.len()] }
    }

    /// The value of a rule, or nothing when it is undefined.
    pub(super) fn rule(&mut self, index: usize) -> Result<Option<&'p Value>, Trouble> {
        if let Some(Some(found)) = self.found.get(index) {
            return Ok(*found);
        }
        let Some(rule) = self.rules.get(index) else { return Ok(None) };
        let mut value: Option<&'p Value> = None;
        for definition in &rule.definitions {
            if !self.deeper(|this| this.holds(&definition.body, vec![None; definition.variables]))? {
                continue;
            }
            if value.is_some_and(|value| *value != definition.value) {
                return Err(Trouble::Conflict);
            }
            value = Some(&definition.value);
        }
        let value = value.or(rule.default.as_ref());
        if let Some(found) = self.found.get_mut(index) {
            *found = Some(value);
        }
        Ok(value)
    }

    fn step(&mut self, weight: u64) -> Result<(), Trouble> {
        self.steps = self.steps.saturating_add(weight);
        if self.steps > STEPS { Err(Trouble::Steps) } else { Ok(()) }
    }

    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, Trouble>) -> Result<T, Trouble> {
        if self.depth == DEPTH {
            return Err(Trouble::Depth);
        }
        self.depth += 1;
        let result = work(self);
        self.depth -= 1;
        result
    }

    /// Whether all statements can hold together.
    fn holds(&mut self, body: &'p [Statement], mut bindings: Bindings<'p>) -> Result<bool, Trouble> {
        for (place, statement) in body.iter().enumerate() {
            let mut ways = self.statement(statement, &bindings)?;
            match (ways.pop(), ways.is_empty()) {
                (None, _) => return Ok(false),
                (Some(only), true) => bindings = only,
                (Some(last), false) => {
                    let rest = body.get(place + 1..).unwrap_or_default();
                    ways.push(last);
                    for way in ways {
                        if self.deeper(|this| this.holds(rest, way))? {
                            return Ok(true);
                        }
                    }
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The ways in which a statement holds.
    fn statement(
        &mut self,
        statement: &'p Statement,
        bindings: &Bindings<'p>,
    ) -> Result<Vec<Bindings<'p>>, Trouble> {
        self.step(1)?;
        let one_if = |holds: bool| if holds { vec![bindings.clone()] } else { Vec::new() };
        match statement {
            Statement::Holds(term) => {
                let ways = self.term(term, bindings)?.into_iter();
                Ok(ways
                    .filter(|(known, _)| *known.value() != Value::Bool(false))
                    .map(|(_, way)| way)
                    .collect())
            }
            Statement::Compare(left, comparison, right) => {
                self.pairs(left, right, bindings, |this, left, right| {
                    this.step(left.weight().saturating_add(right.weight()))?;
                    Ok(comparison.holds(left.cmp(right)))
                })
            }
            Statement::In(value, collection) => self.pairs(value, collection, bindings, Self::is_in),
            Statement::Not(statement) => {
                let ways = self.deeper(|this| this.statement(statement, bindings))?;
                Ok(one_if(ways.is_empty()))
            }
            Statement::Assign(variable, term) => {
                let ways = self.term(term, bindings)?.into_iter();
                Ok(ways.map(|(known, way)| bound(way, Some(*variable), known)).collect())
            }
            Statement::Some { key, value, collection } => {
                let mut ways = Vec::new();
                for (known, way) in self.term(collection, bindings)? {
                    self.each(&known, |_, name, element| {
                        let way = bound(bound(way.clone(), Some(*value), element), *key, name);
                        ways.push(way);
                        Ok(true)
                    })?;
                }
                Ok(ways)
            }
            Statement::Every { key, value, collection, body } => {
                let Some((known, way)) = self.term(collection, bindings)?.pop() else {
                    return Ok(Vec::new());
                };
                if known.value().count().is_none() || matches!(known.value(), Value::String(_)) {
                    return Ok(Vec::new());
                }
                let all = self.each(&known, |this, name, element| {
                    let way = bound(bound(way.clone(), Some(*value), element), *key, name);
                    this.deeper(|this| this.holds(body, way))
                })?;
                Ok(one_if(all))
            }
        }
    }

    /// The ways in which two terms are related.
    fn pairs(
        &mut self,
        left: &'p Term,
        right: &'p Term,
        bindings: &Bindings<'p>,
        related: impl Fn(&mut Self, &Value, &Value) -> Result<bool, Trouble>,
    ) -> Result<Vec<Bindings<'p>>, Trouble> {
        let mut ways = Vec::new();
        for (left, way) in self.term(left, bindings)? {
            for (right, way) in self.term(right, &way)? {
                if related(self, left.value(), right.value())? {
                    ways.push(way);
                }
            }
        }
        Ok(ways)
    }

    fn is_in(&mut self, value: &Value, collection: &Value) -> Result<bool, Trouble> {
        for place in 0..collection.pairs() {
            let Some((_, element)) = collection.pair(place) else { break };
            self.step(value.weight().saturating_add(element.weight()))?;
            if *value == *element {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Visits keys and elements while that gives true; whether it always did.
    fn each(
        &mut self,
        known: &Known<'p>,
        mut visit: impl FnMut(&mut Self, Known<'p>, Known<'p>) -> Result<bool, Trouble>,
    ) -> Result<bool, Trouble> {
        for place in 0..known.value().pairs() {
            let Some((key, _)) = known.value().pair(place) else { break };
            let Some(element) = known.part(|value| value.pair(place).map(|(_, element)| element)) else {
                break;
            };
            let copied = if let Known::Computed(element) = &element { element.weight() } else { 1 };
            self.step(copied.saturating_add(key.weight()))?;
            if !visit(self, Known::of(key), element)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The values of a term, each with the variables that it is the value for.
    fn term(
        &mut self,
        term: &'p Term,
        bindings: &Bindings<'p>,
    ) -> Result<Vec<(Known<'p>, Bindings<'p>)>, Trouble> {
        self.step(1 + u64::try_from(bindings.len() / 4).unwrap_or(u64::MAX))?;
        self.deeper(|this| match term {
            Term::Constant(value) => Ok(vec![(Known::Borrowed(value), bindings.clone())]),
            Term::Array(terms) => this.collection(terms, bindings, Value::Array),
            Term::Set(terms) => this.collection(terms, bindings, parser::set),
            Term::Call(function, terms) => {
                let mut results = Vec::new();
                for (arguments, way) in this.terms(terms, bindings)? {
                    this.step(
                        arguments.iter().fold(1, |sum, known| sum.saturating_add(known.value().weight())),
                    )?;
                    let values: Vec<&Value> = arguments.iter().map(Known::value).collect();
                    results.extend(function.apply(&values).map(|value| (Known::of(value), way)));
                }
                Ok(results)
            }
            Term::Reference(head, keys) => {
                let known = match head {
                    Head::Input => Some(Known::Borrowed(this.input)),
                    Head::Variable(variable) => bindings.get(*variable).cloned().flatten(),
                    Head::Rule(rule) => this.rule(*rule)?.map(Known::Borrowed),
                };
                let mut reached: Vec<_> = known.into_iter().map(|known| (known, bindings.clone())).collect();
                for key in keys {
                    let mut next = Vec::new();
                    for (known, way) in reached {
                        this.advance(&known, key, way, &mut next)?;
                    }
                    reached = next;
                }
                Ok(reached)
            }
        })
    }

    /// One step of a reference.
    fn advance(
        &mut self,
        known: &Known<'p>,
        key: &'p Key,
        way: Bindings<'p>,
        next: &mut Vec<(Known<'p>, Bindings<'p>)>,
    ) -> Result<(), Trouble> {
        match key {
            Key::Of(Term::Constant(key)) => self.descend(known, key, way, next),
            Key::Of(term) => {
                for (key, way) in self.term(term, &way)? {
                    self.descend(known, key.value(), way, next)?;
                }
                Ok(())
            }
            Key::Each(variable) => {
                let each = self.each(known, |this, name, element| {
                    this.step(u64::try_from(way.len() / 4).unwrap_or(u64::MAX))?;
                    next.push((element, bound(way.clone(), Some(*variable), name)));
                    Ok(true)
                });
                each.map(drop)
            }
        }
    }

    fn descend(
        &mut self,
        known: &Known<'p>,
        key: &Value,
        way: Bindings<'p>,
        next: &mut Vec<(Known<'p>, Bindings<'p>)>,
    ) -> Result<(), Trouble> {
        let searched = match known.value() {
            Value::Object(fields) => fields.len() / 8,
            Value::Set(values) => values.len(),
            _ => 0,
        };
        let Some(part) = known.part(|value| value.get(key)) else { return self.step(1) };
        let copied = if let Known::Computed(part) = &part { part.weight() } else { 0 };
        self.step(u64::try_from(searched).unwrap_or(u64::MAX).saturating_add(copied))?;
        next.push((part, way));
        Ok(())
    }

    fn collection(
        &mut self,
        terms: &'p [Term],
        bindings: &Bindings<'p>,
        make: fn(Vec<Value>) -> Value,
    ) -> Result<Vec<(Known<'p>, Bindings<'p>)>, Trouble> {
        let mut results = Vec::new();
        for (elements, way) in self.terms(terms, bindings)? {
            let mut values = Vec::with_capacity(elements.len());
            for element in elements {
                self.step(element.value().weight())?;
                values.push(element.value().clone());
            }
            results.push((Known::of(make(values)), way));
        }
        Ok(results)
    }

    /// The values of several terms together.
    fn terms(
        &mut self,
        terms: &'p [Term],
        bindings: &Bindings<'p>,
    ) -> Result<Vec<(Vec<Known<'p>>, Bindings<'p>)>, Trouble> {
        let mut results = vec![(Vec::new(), bindings.clone())];
        for term in terms {
            let mut longer = Vec::new();
            for (known, way) in results {
                for (value, way) in self.term(term, &way)? {
                    self.step(u64::try_from(known.len()).unwrap_or(u64::MAX))?;
                    let mut known = known.clone();
                    known.push(value);
                    longer.push((known, way));
                }
            }
            results = longer;
        }
        Ok(results)
    }
}

/// The bindings with a variable more.
fn bound<'p>(mut bindings: Bindings<'p>, variable: Option<usize>, known: Known<'p>) -> Bindings<'p> {
    if let Some(place) = variable.and_then(|variable| bindings.get_mut(variable)) {
        *place = Some(known);
    }
    bindings
}

impl Comparison {
    fn holds(self, order: Ordering) -> bool {
        match self {
            Comparison::Equal => order.is_eq(),
            Comparison::Unequal => order.is_ne(),
            Comparison::Less => order.is_lt(),
            Comparison::AtMost => order.is_le(),
            Comparison::Greater => order.is_gt(),
            Comparison::AtLeast => order.is_ge(),
        }
    }
}

impl Function {
    /// What it gives; nothing for arguments of the wrong kind.
    fn apply(self, arguments: &[&Value]) -> Option<Value> {
        match (self, arguments) {
            (Function::StartsWith, [Value::String(text), Value::String(part)]) => {
                Some(Value::Bool(text.starts_with(part.as_str())))
            }
            (Function::EndsWith, [Value::String(text), Value::String(part)]) => {
                Some(Value::Bool(text.ends_with(part.as_str())))
            }
            (Function::Contains, [Value::String(text), Value::String(part)]) => {
                Some(Value::Bool(text.contains(part.as_str())))
            }
            (Function::Lower, [Value::String(text)]) => Some(Value::String(text.to_lowercase())),
            (Function::Count, [value]) => {
                value.count().and_then(|count| i128::try_from(count).ok()).map(Value::Number)
            }
            _ => None,
        }
    }
}
