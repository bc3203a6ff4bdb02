//! The fields of every message that a request of the agent contains: what a reader of wire bytes needs, and no more.
//!
//! It stands in for protobuf's reflection, which is too large for a guest. The table is generated from `protos/`; it holds
//! offsets into one string, so that it costs a program a few kilobytes and no relocations. Names are those of the proto
//! files; a name that is a keyword of Rust has an underscore behind it (`type_`).

/// What a field contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A truth value.
    Bool,
    /// UTF-8 text.
    String,
    /// Bytes.
    Bytes,
    /// A number of 32 bits with a sign, or an enum value: a varint in two's complement.
    Int32,
    /// The same of 64 bits.
    Int64,
    /// A number of 32 bits without a sign: a varint.
    Uint32,
    /// The same of 64 bits.
    Uint64,
    /// A message, by index.
    Message(u8),
}

/// How often a field contains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Once; absent is the default.
    Single(Kind),
    /// Once or not at all.
    Optional(Kind),
    /// In a list.
    Repeated(Kind),
    /// In a list of pairs: field 1 of the entry is the key, field 2 the value.
    Map(Kind),
    /// As one of several; where the name of that choice is, and its length.
    OneOf(Kind, u16, u8),
}

/// A message.
#[derive(Debug)]
pub struct Message {
    name: u16,
    length: u8,
    first: u16,
    fields: u8,
}

/// A field of a message.
#[derive(Debug)]
pub struct Field {
    /// Its number on the wire.
    pub number: u16,
    name: u16,
    length: u8,
    /// What it contains, and how often.
    pub shape: Shape,
}

include!(concat!(env!("OUT_DIR"), "/layout_table.rs"));

fn text(start: u16, length: u8) -> &'static str {
    let start = usize::from(start);
    NAMES.get(start..start + usize::from(length)).unwrap_or_default()
}

impl Message {
    /// The message of that name, without its package.
    pub fn named(name: &str) -> Option<&'static Message> {
        MESSAGES.iter().find(|message| message.name() == name)
    }

    /// The request of a method of the agent.
    pub fn of_method(name: &str) -> Option<&'static Message> {
        let (_, index) = METHODS.iter().find(|(method, _)| *method == name)?;
        Message::at(*index)
    }

    /// The messages that are requests themselves.
    pub fn requests() -> &'static [Message] {
        MESSAGES.get(..REQUESTS).unwrap_or_default()
    }

    /// The message that a field refers to.
    pub fn at(index: u8) -> Option<&'static Message> {
        MESSAGES.get(usize::from(index))
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        text(self.name, self.length)
    }

    /// Its fields, in the order of their declaration.
    pub fn fields(&self) -> &'static [Field] {
        let first = usize::from(self.first);
        FIELDS.get(first..first + usize::from(self.fields)).unwrap_or_default()
    }
}

impl Field {
    /// Its name.
    pub fn name(&self) -> &'static str {
        text(self.name, self.length)
    }
}

impl Shape {
    /// What it contains.
    pub fn kind(self) -> Kind {
        match self {
            Shape::Single(kind)
            | Shape::Optional(kind)
            | Shape::Repeated(kind)
            | Shape::Map(kind)
            | Shape::OneOf(kind, ..) => kind,
        }
    }

    /// The name of the choice that a field belongs to.
    pub fn choice(self) -> Option<&'static str> {
        match self {
            Shape::OneOf(_, start, length) => Some(text(start, length)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use protobuf::{MessageFull, reflect::MessageDescriptor};

    use super::*;

    fn check(descriptor: &MessageDescriptor) {
        let message = Message::named(descriptor.name()).unwrap_or_else(|| panic!("{}", descriptor.name()));
        let names = |numbered: &mut Vec<(u32, String)>| numbered.sort();
        let mut ours: Vec<(u32, String)> =
            message.fields().iter().map(|field| (u32::from(field.number), field.name().to_owned())).collect();
        let mut theirs: Vec<(u32, String)> = descriptor
            .fields()
            .map(|field| {
                let name = if field.name() == "type" { "type_" } else { field.name() };
                (u32::try_from(field.number()).unwrap(), name.to_owned())
            })
            .collect();
        names(&mut ours);
        names(&mut theirs);
        assert_eq!(ours, theirs, "{}", descriptor.name());
    }

    #[test]
    fn every_request_is_in_the_table_with_its_fields() {
        let file = crate::agent::file_descriptor();
        let methods = file.services().flat_map(|service| {
            let of_method = |method: protobuf::reflect::MethodDescriptor| {
                let name = method.proto().name().to_owned();
                assert_eq!(Message::of_method(&name).unwrap().name(), method.input_type().name());
                method.input_type()
            };
            service.methods().map(of_method).collect::<Vec<MessageDescriptor>>()
        });
        let mut count = 0;
        for message in methods {
            check(&message);
            count += 1;
        }
        assert_eq!(count, 42);
        // ReadStdout and ReadStderr take the same.
        assert_eq!(Message::requests().len(), 41);
        let names: Vec<&str> = Message::requests().iter().map(Message::name).collect();
        assert!(names.contains(&"ReadStreamRequest") && !names.contains(&"Spec"), "{names:?}");
        for message in [
            crate::oci::Spec::descriptor(),
            crate::oci::Process::descriptor(),
            crate::oci::LinuxSyscall::descriptor(),
            crate::types::IPAddress::descriptor(),
            crate::agent::FSGroup::descriptor(),
        ] {
            check(&message);
        }
    }

    #[test]
    fn shapes_are_those_of_the_files() {
        let field = |message: &str, name: &str| {
            let message = Message::named(message).unwrap();
            message.fields().iter().find(|field| field.name() == name).unwrap().shape
        };
        assert_eq!(field("Storage", "options"), Shape::Repeated(Kind::String));
        assert_eq!(field("CopyFileRequest", "offset"), Shape::Single(Kind::Int64));
        assert_eq!(field("MemAgentMemcgConfig", "swap"), Shape::Optional(Kind::Bool));
        assert_eq!(field("LinuxSyscall", "errnoret").choice(), Some("ErrnoRet"));
        assert!(matches!(field("Spec", "Annotations"), Shape::Map(Kind::Message(_))));
        let Shape::Single(Kind::Message(process)) = field("Spec", "Process") else { panic!() };
        assert_eq!(Message::at(process).unwrap().name(), "Process");
    }
}
