//! A policy that has been understood: rules, their bodies, their terms. Names are gone: variables and rules are numbers.

use super::value::Value;

/// All rules of one name.
#[derive(Debug, Default)]
pub(super) struct Rule {
    /// Its name.
    pub(super) name: String,
    /// `default name := value`.
    pub(super) default: Option<Value>,
    /// Any of these makes it defined.
    pub(super) definitions: Vec<Definition>,
    /// The rules that the bodies refer to, and the line of each reference.
    pub(super) uses: Vec<(usize, usize)>,
}

/// `name := value if { ... }`; without a body always.
#[derive(Debug)]
pub(super) struct Definition {
    /// What the rule is then.
    pub(super) value: Value,
    /// When.
    pub(super) body: Vec<Statement>,
    /// How many variables the body has.
    pub(super) variables: usize,
}

/// A condition in a body; all have to hold.
#[derive(Debug)]
pub(super) enum Statement {
    /// The term is defined, and not false.
    Holds(Term),
    /// The terms compare so.
    Compare(Term, Comparison, Term),
    /// The value is an element of the collection.
    In(Term, Term),
    /// The condition does not hold, or is undefined.
    Not(Box<Statement>),
    /// `variable := term`
    Assign(usize, Term),
    /// `some key, value in collection`
    Some {
        /// The variable for the key.
        key: Option<usize>,
        /// The variable for the element.
        value: usize,
        /// Where from.
        collection: Term,
    },
    /// `every key, value in collection { ... }`
    Every {
        /// The variable for the key.
        key: Option<usize>,
        /// The variable for the element.
        value: usize,
        /// Where from.
        collection: Term,
        /// What holds for each.
        body: Vec<Statement>,
    },
}

/// How two terms compare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    Unequal,
    /// `<`
    Less,
    /// `<=`
    AtMost,
    /// `>`
    Greater,
    /// `>=`
    AtLeast,
}

/// What has a value, several values in turn, or none.
#[derive(Debug)]
pub(super) enum Term {
    /// A constant.
    Constant(Value),
    /// An array of terms.
    Array(Vec<Term>),
    /// A set of terms.
    Set(Vec<Term>),
    /// `head.a["b"][i]`
    Reference(Head, Vec<Key>),
    /// A function of the language.
    Call(Function, Vec<Term>),
}

/// Where a reference begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Head {
    /// The request.
    Input,
    /// A variable that is bound.
    Variable(usize),
    /// A rule.
    Rule(usize),
}

/// A step of a reference.
#[derive(Debug)]
pub(super) enum Key {
    /// The element under this key.
    Of(Term),
    /// Each element; the variable becomes its key.
    Each(usize),
}

/// The functions of the language that are there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Function {
    /// `startswith(text, prefix)`
    StartsWith,
    /// `endswith(text, suffix)`
    EndsWith,
    /// `contains(text, part)`
    Contains,
    /// `count(collection)`
    Count,
    /// `lower(text)`
    Lower,
}

impl Function {
    /// The function of that name, and how many arguments it takes.
    pub(super) fn named(name: &str) -> Option<(Function, usize)> {
        Some(match name {
            "startswith" => (Function::StartsWith, 2),
            "endswith" => (Function::EndsWith, 2),
            "contains" => (Function::Contains, 2),
            "count" => (Function::Count, 1),
            "lower" => (Function::Lower, 1),
            _ => return None,
        })
    }
}
