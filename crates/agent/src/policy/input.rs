//! A request as the value that policies call `input`: every field under its name, also those that are not set.
//!
//! It is read from the bytes that came. Bytes that two readers could understand in two ways (a field twice, a key twice, a
//! number too large for its field) are refused, so that a policy sees what the agent acts on. An unset message is null, an enum its number. Of `CopyFile` a policy sees what is to be made, not the contents.

use bulkhead_protocol::layout::{Field, Kind, Message as Layout, Shape};

use super::value::Value;

/// Values of an input, at most: an empty message is two bytes on the wire, and much more here.
const SIZE: usize = 200_000;

/// Entries of one map, at most.
const ENTRIES: usize = 4096;

/// The bits of a file's mode that say its kind.
const KIND_MASK: i128 = 0o170_000;
/// The request that policies see in a form of its own.
const COPY: &str = "CopyFileRequest";

/// The input of a request's bytes; an error says why there is none.
pub(super) fn of_bytes(name: &str, bytes: &[u8]) -> Result<Value, String> {
    let layout = Layout::named(name).ok_or("the message is unknown")?;
    let value = Reader { left: SIZE }.message(layout, bytes).map_err(str::to_owned)?;
    Ok(if name == COPY { of_copy(value) } else { value })
}

/// What a copy makes, in the place of its mode and its contents.
fn of_copy(request: Value) -> Value {
    let Value::Object(mut fields) = request else { return request };
    let field = |name: &str| fields.iter().find_map(|(field, value)| (**field == *name).then_some(value));
    let kind = match field("file_mode") {
        Some(Value::Number(mode)) => match mode & KIND_MASK {
            0o100_000 => "Regular",
            0o040_000 => "Directory",
            0o120_000 => "Symlink",
            _ => "Unknown",
        },
        _ => "Unknown",
    };
    let target = match field("data") {
        Some(Value::Bytes(data)) if kind == "Symlink" => String::from_utf8_lossy(data).into_owned(),
        _ => String::new(),
    };
    fields.retain(|(name, _)| **name != *"data");
    fields.push(("file_type".into(), Value::String(kind.into())));
    fields.push(("symlink_target".into(), Value::String(target)));
    Value::Object(fields)
}

/// What is wrong with bytes that are no message.
const BROKEN: &str = "the request cannot be read";

type Read<T> = Result<T, &'static str>;

struct Reader {
    left: usize,
}

/// A value on the wire.
enum Wire<'b> {
    Varint(u64),
    Bytes(&'b [u8]),
    Other,
}

impl Reader {
    fn message(&mut self, layout: &'static Layout, mut bytes: &[u8]) -> Read<Value> {
        let fields = layout.fields();
        self.grow(1 + fields.len())?;
        let mut object: Vec<_> =
            fields.iter().map(|field| (name(field).into(), absent(field.shape))).collect();
        let mut seen = vec![false; fields.len()];
        while !bytes.is_empty() {
            let (number, wire) = next(&mut bytes)?;
            let place = fields.iter().position(|field| u64::from(field.number) == number);
            let Some((field, (_, value), seen)) = place
                .and_then(|place| Some((fields.get(place)?, object.get_mut(place)?, seen.get_mut(place)?)))
            else {
                continue;
            };
            if std::mem::replace(seen, !matches!(field.shape, Shape::Repeated(_) | Shape::Map(_))) {
                return Err("the request has a field twice");
            }
            self.field(field, &wire, value)?;
        }
        Ok(Value::Object(object))
    }

    fn field(&mut self, field: &'static Field, wire: &Wire<'_>, value: &mut Value) -> Read<()> {
        match (field.shape, value) {
            (Shape::Repeated(kind), Value::Array(values)) => match (kind, wire) {
                (
                    Kind::Bool | Kind::Int32 | Kind::Int64 | Kind::Uint32 | Kind::Uint64,
                    Wire::Bytes(packed),
                ) => {
                    let mut packed = *packed;
                    while !packed.is_empty() {
                        let number = Wire::Varint(varint(&mut packed)?);
                        values.push(self.value(kind, &number)?);
                    }
                    Ok(())
                }
                _ => {
                    values.push(self.value(kind, wire)?);
                    Ok(())
                }
            },
            (Shape::Map(kind), Value::Object(entries)) => {
                let Value::Object(entry) = self.value(kind, wire)? else { return Err(BROKEN) };
                let mut entry = entry.into_iter().map(|(_, value)| value);
                let (Some(Value::String(key)), Some(value)) = (entry.next(), entry.next()) else {
                    return Err(BROKEN);
                };
                // Looking for a key among all the others takes time by the square of their number.
                if entries.len() >= ENTRIES {
                    return Err("the request has too many entries for a policy");
                }
                if entries.iter().any(|(known, _)| **known == *key) {
                    return Err("the request has a key twice");
                }
                entries.push((key.into(), value));
                Ok(())
            }
            (Shape::OneOf(kind, ..), value) => {
                let chosen = self.value(kind, wire)?;
                *value = Value::Object(vec![(field.name().into(), chosen)]);
                Ok(())
            }
            (shape, value) => {
                *value = self.value(shape.kind(), wire)?;
                Ok(())
            }
        }
    }

    fn value(&mut self, kind: Kind, wire: &Wire<'_>) -> Read<Value> {
        self.grow(1)?;
        match (kind, wire) {
            (Kind::Bool, Wire::Varint(number)) => Ok(Value::Bool(*number != 0)),
            (Kind::Int32, Wire::Varint(number)) => i32::try_from(number.cast_signed())
                .map(|number| Value::Number(number.into()))
                .map_err(|_| BROKEN),
            (Kind::Int64, Wire::Varint(number)) => Ok(Value::Number(number.cast_signed().into())),
            (Kind::Uint32, Wire::Varint(number)) => {
                u32::try_from(*number).map(|number| Value::Number(number.into())).map_err(|_| BROKEN)
            }
            (Kind::Uint64, Wire::Varint(number)) => Ok(Value::Number((*number).into())),
            (Kind::String, Wire::Bytes(bytes)) => {
                std::str::from_utf8(bytes).map(|text| Value::String(text.to_owned())).map_err(|_| BROKEN)
            }
            (Kind::Bytes, Wire::Bytes(bytes)) => Ok(Value::Bytes(bytes.to_vec())),
            (Kind::Message(index), Wire::Bytes(bytes)) => {
                self.message(Layout::at(index).ok_or(BROKEN)?, bytes)
            }
            _ => Err(BROKEN),
        }
    }

    fn grow(&mut self, values: usize) -> Read<()> {
        self.left = self.left.checked_sub(values).ok_or("the request has too many values for a policy")?;
        Ok(())
    }
}

/// The name under which a field is found: a choice has its own.
fn name(field: &Field) -> &'static str {
    field.shape.choice().unwrap_or_else(|| field.name())
}

/// What a field is that is not on the wire.
fn absent(shape: Shape) -> Value {
    match shape {
        Shape::Optional(_) | Shape::OneOf(..) | Shape::Single(Kind::Message(_)) => Value::Null,
        Shape::Repeated(_) => Value::Array(Vec::new()),
        Shape::Map(_) => Value::Object(Vec::new()),
        Shape::Single(Kind::Bool) => Value::Bool(false),
        Shape::Single(Kind::String) => Value::String(String::new()),
        Shape::Single(Kind::Bytes) => Value::Bytes(Vec::new()),
        Shape::Single(Kind::Int32 | Kind::Int64 | Kind::Uint32 | Kind::Uint64) => Value::Number(0),
    }
}

/// A field's number and value.
fn next<'b>(bytes: &mut &'b [u8]) -> Read<(u64, Wire<'b>)> {
    let tag = varint(bytes)?;
    let wire = match tag & 7 {
        0 => Wire::Varint(varint(bytes)?),
        1 => take(bytes, 8).map(|_| Wire::Other)?,
        2 => {
            let length = usize::try_from(varint(bytes)?).map_err(|_| BROKEN)?;
            Wire::Bytes(take(bytes, length)?)
        }
        5 => take(bytes, 4).map(|_| Wire::Other)?,
        _ => return Err(BROKEN),
    };
    Ok((tag >> 3, wire))
}

fn take<'b>(bytes: &mut &'b [u8], length: usize) -> Read<&'b [u8]> {
    let (taken, rest) = bytes.split_at_checked(length).ok_or(BROKEN)?;
    *bytes = rest;
    Ok(taken)
}

fn varint(bytes: &mut &[u8]) -> Read<u64> {
    let mut number = 0;
    for shift in (0..70).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(BROKEN)?;
        *bytes = rest;
        if shift < 64 {
            number |= u64::from(byte & 0x7f) << shift;
        }
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(BROKEN)
}
