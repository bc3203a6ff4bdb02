//! A request as the value that policies call `input`: every field under its name, also those that are not set.
//!
//! It is read from the bytes that the decoded request encodes to, so that a policy sees what the agent acts on, and nothing
//! else. An unset message is null, an enum its number. Of `CopyFile` a policy sees what is to be made, not the contents.

use std::any::Any;

use bulkhead_protocol::{
    agent::CopyFileRequest,
    layout::{Field, Kind, Message as Layout, Shape},
    protobuf::Message,
};

use super::value::Value;

/// Values of an input, at most: an empty message is two bytes on the wire, and much more here.
const SIZE: usize = 200_000;

/// The bits of a file's mode that say its kind.
const KIND_MASK: u32 = 0o170_000;

/// The input of a request; an error says why there is none.
pub(super) fn of_request(name: &str, request: &impl Message) -> Result<Value, String> {
    if let Some(copy) = (request as &dyn Any).downcast_ref::<CopyFileRequest>() {
        return Ok(of_copy(copy));
    }
    let bytes = request.write_to_bytes().map_err(|error| error.to_string())?;
    of_bytes(name, &bytes)
}

/// The input of a request's bytes.
pub(super) fn of_bytes(name: &str, bytes: &[u8]) -> Result<Value, String> {
    let layout = Layout::named(name).ok_or("the message is unknown")?;
    Reader { left: SIZE }.message(layout, bytes).map_err(str::to_owned)
}

fn of_copy(request: &CopyFileRequest) -> Value {
    let kind = match request.file_mode & KIND_MASK {
        0o100_000 => "Regular",
        0o040_000 => "Directory",
        0o120_000 => "Symlink",
        _ => "Unknown",
    };
    let target =
        if kind == "Symlink" { String::from_utf8_lossy(&request.data).into_owned() } else { String::new() };
    let number = |number: i64| Value::Number(number.into());
    let fields = [
        ("path", Value::String(request.path.clone())),
        ("file_type", Value::String(kind.into())),
        ("symlink_target", Value::String(target)),
        ("file_size", number(request.file_size)),
        ("file_mode", number(request.file_mode.into())),
        ("dir_mode", number(request.dir_mode.into())),
        ("uid", number(request.uid.into())),
        ("gid", number(request.gid.into())),
        ("offset", number(request.offset)),
    ];
    Value::Object(fields.into_iter().map(|(name, value)| (name.into(), value)).collect())
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
        while !bytes.is_empty() {
            let (number, wire) = next(&mut bytes)?;
            let place = fields.iter().position(|field| u64::from(field.number) == number);
            let Some((field, (_, value))) =
                place.and_then(|place| Some((fields.get(place)?, object.get_mut(place)?)))
            else {
                continue;
            };
            self.field(field, &wire, value)?;
        }
        Ok(Value::Object(object))
    }

    fn field(&mut self, field: &'static Field, wire: &Wire<'_>, value: &mut Value) -> Read<()> {
        match (field.shape, value) {
            (Shape::Repeated(kind), Value::Array(values)) => match (kind, wire) {
                (Kind::Bool | Kind::Signed | Kind::Unsigned, Wire::Bytes(packed)) => {
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
            (Kind::Signed, Wire::Varint(number)) => Ok(Value::Number(number.cast_signed().into())),
            (Kind::Unsigned, Wire::Varint(number)) => Ok(Value::Number((*number).into())),
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
        Shape::Single(Kind::Signed | Kind::Unsigned) => Value::Number(0),
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
