//! The values that a policy compares: those of JSON, whole numbers only, and sets.

use std::{borrow::Cow, cmp::Ordering};

/// A value. The order of the kinds is Rego's.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// What an unset message is.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Number(i128),
    /// Text.
    String(String),
    /// An array of numbers, as bytes of a request are.
    Bytes(Vec<u8>),
    /// A list.
    Array(Vec<Value>),
    /// A message, or a map.
    Object(Vec<(Cow<'static, str>, Value)>),
    /// A set: no order, nothing twice.
    Set(Vec<Value>),
}

impl Value {
    /// How many elements or characters it has, if it can be counted.
    pub(super) fn count(&self) -> Option<usize> {
        match self {
            Value::String(text) => Some(text.chars().count()),
            Value::Bytes(bytes) => Some(bytes.len()),
            Value::Array(values) | Value::Set(values) => Some(values.len()),
            Value::Object(fields) => Some(fields.len()),
            Value::Null | Value::Bool(_) | Value::Number(_) => None,
        }
    }

    /// The element under this key. A set's elements are their own keys.
    pub(super) fn get(&self, key: &Value) -> Option<Cow<'_, Value>> {
        match (self, key) {
            (Value::Object(fields), Value::String(key)) => {
                fields.iter().find(|(name, _)| name == key).map(|(_, value)| Cow::Borrowed(value))
            }
            (Value::Array(values), Value::Number(index)) => {
                values.get(usize::try_from(*index).ok()?).map(Cow::Borrowed)
            }
            (Value::Bytes(bytes), Value::Number(index)) => {
                let byte = bytes.get(usize::try_from(*index).ok()?)?;
                Some(Cow::Owned(Value::Number(i128::from(*byte))))
            }
            (Value::Set(values), key) => values.iter().find(|value| *value == key).map(Cow::Borrowed),
            _ => None,
        }
    }

    /// How many pairs of key and element it has.
    pub(super) fn pairs(&self) -> usize {
        if let Value::String(_) = self { 0 } else { self.count().unwrap_or_default() }
    }

    /// The pair at this place.
    pub(super) fn pair(&self, place: usize) -> Option<(Value, Cow<'_, Value>)> {
        let index = || Value::Number(i128::try_from(place).unwrap_or(i128::MAX));
        match self {
            Value::Array(values) => Some((index(), Cow::Borrowed(values.get(place)?))),
            Value::Bytes(bytes) => Some((index(), Cow::Owned(Value::Number(i128::from(*bytes.get(place)?))))),
            Value::Set(values) => {
                let value = values.get(place)?;
                Some((value.clone(), Cow::Borrowed(value)))
            }
            Value::Object(fields) => {
                let (name, value) = fields.get(place)?;
                Some((Value::String(name.clone().into_owned()), Cow::Borrowed(value)))
            }
            _ => None,
        }
    }

    /// How much work it is to look at all of it.
    pub(super) fn weight(&self) -> u64 {
        let length = |length: usize| 1 + u64::try_from(length / 64).unwrap_or(u64::MAX);
        match self {
            Value::Null | Value::Bool(_) | Value::Number(_) => 1,
            Value::String(text) => length(text.len()),
            Value::Bytes(bytes) => length(bytes.len()),
            Value::Array(values) | Value::Set(values) => {
                values.iter().fold(1, |sum: u64, value| sum.saturating_add(value.weight()))
            }
            Value::Object(fields) => {
                fields.iter().fold(1, |sum: u64, (_, value)| sum.saturating_add(1 + value.weight()))
            }
        }
    }

    fn rank(&self) -> u8 {
        match self {
            Value::Null => 0,
            Value::Bool(_) => 1,
            Value::Number(_) => 2,
            Value::String(_) => 3,
            Value::Bytes(_) | Value::Array(_) => 4,
            Value::Object(_) => 5,
            Value::Set(_) => 6,
        }
    }

    /// The elements in the order in which collections are compared.
    fn sorted(&self) -> Vec<(Value, Cow<'_, Value>)> {
        let mut pairs: Vec<_> = (0..self.pairs()).map_while(|place| self.pair(place)).collect();
        if let Value::Object(_) | Value::Set(_) = self {
            pairs.sort_by(|(one, _), (other, _)| one.cmp(other));
        }
        pairs
    }
}

impl Ord for Value {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Value::Bool(one), Value::Bool(other)) => one.cmp(other),
            (Value::Number(one), Value::Number(other)) => one.cmp(other),
            (Value::String(one), Value::String(other)) => one.cmp(other),
            (Value::Bytes(one), Value::Bytes(other)) => one.cmp(other),
            (Value::Array(one), Value::Array(other)) => one.cmp(other),
            (one, other) if one.rank() != other.rank() => one.rank().cmp(&other.rank()),
            (one, other) => one.sorted().cmp(&other.sorted()),
        }
    }
}

impl PartialOrd for Value {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Value {}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(numbers: &[i128]) -> Vec<Value> {
        numbers.iter().map(|number| Value::Number(*number)).collect()
    }

    #[test]
    fn the_order_is_that_of_the_language() {
        let text = |text: &str| Value::String(text.into());
        let ascending = [
            Value::Null,
            Value::Bool(false),
            Value::Bool(true),
            Value::Number(-1),
            Value::Number(u64::MAX.into()),
            text("a"),
            text("b"),
            Value::Array(numbers(&[1])),
            Value::Array(numbers(&[1, 0])),
            Value::Object(vec![("a".into(), Value::Null)]),
            Value::Set(numbers(&[1])),
        ];
        assert!(ascending.is_sorted_by(|one, other| one < other));
    }

    #[test]
    fn sets_and_objects_have_no_order_and_bytes_are_numbers() {
        assert_eq!(Value::Set(numbers(&[1, 2])), Value::Set(numbers(&[2, 1])));
        assert_eq!(Value::Bytes(vec![1, 2]), Value::Array(numbers(&[1, 2])));
        assert_ne!(Value::Bytes(vec![1, 2]), Value::Array(numbers(&[2, 1])));
        let object =
            |names: [&'static str; 2]| Value::Object(names.map(|name| (name.into(), Value::Null)).to_vec());
        assert_eq!(object(["a", "b"]), object(["b", "a"]));
        assert_eq!(Value::Bytes(vec![7]).get(&Value::Number(0)).unwrap().into_owned(), Value::Number(7));
        assert_eq!(Value::Bytes(vec![7]).get(&Value::Number(-1)), None);
    }
}
