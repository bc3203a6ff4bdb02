//! The table behind the module `layout`: every message that a request of the agent contains, and its fields.

use std::{collections::BTreeMap, fmt::Write as _};

use protobuf::descriptor::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

/// The messages found so far, in the order of their indices.
struct Table<'a> {
    known: BTreeMap<String, &'a DescriptorProto>,
    order: Vec<String>,
    names: String,
}

/// The table as Rust, for the requests of the services in this file.
pub(crate) fn table(directory: &str, file: &str) -> String {
    let parsed = protobuf_parse::Parser::new()
        .pure()
        .include(directory)
        .input(format!("{directory}/{file}.proto"))
        .parse_and_typecheck()
        .expect("the .proto files are valid");
    let files = &parsed.file_descriptors;
    let known = files.iter().flat_map(messages).collect();
    let mut table = Table { known, order: Vec::new(), names: String::new() };
    let own = files.iter().find(|descriptor| descriptor.name().ends_with(&format!("{file}.proto")));
    let mut methods = String::new();
    for method in own.expect("the file itself").service.iter().flat_map(|service| &service.method) {
        let index = table.index(method.input_type());
        let _ = writeln!(methods, "    ({:?}, {index}),", method.name());
    }
    format!("{}static METHODS: &[(&str, u8)] = &[\n{methods}];\n", table.print())
}

/// Messages by full name, with a leading dot; also those within messages, which map entries are.
fn messages(file: &FileDescriptorProto) -> Vec<(String, &DescriptorProto)> {
    let package = if file.package().is_empty() { String::new() } else { format!(".{}", file.package()) };
    let mut found = Vec::new();
    for message in &file.message_type {
        let name = format!("{package}.{}", message.name());
        found.extend(message.nested_type.iter().map(|nested| (format!("{name}.{}", nested.name()), nested)));
        found.push((name, message));
    }
    found
}

impl Table<'_> {
    /// The index of a message, which is as good as in the table.
    fn index(&mut self, name: &str) -> usize {
        self.order.iter().position(|known| known == name).unwrap_or_else(|| {
            self.order.push(name.to_owned());
            self.order.len() - 1
        })
    }

    /// Where a name is among the names.
    fn name(&mut self, name: &str) -> usize {
        self.names.find(name).unwrap_or_else(|| {
            self.names.push_str(name);
            self.names.len() - name.len()
        })
    }

    fn print(&mut self) -> String {
        let (mut fields, mut messages, mut next, mut count) = (String::new(), String::new(), 0, 0);
        let requests = self.order.len();
        while let Some(name) = self.order.get(next).cloned() {
            let message = self.known[&name];
            let own = name.rsplit('.').next().unwrap_or_default();
            let (at, first) = (self.name(own), count);
            for field in &message.field {
                let (name, shape) = (rust_name(field.name()), self.shape(message, field));
                let (number, at, length) = (field.number(), self.name(&name), name.len());
                let _ = writeln!(
                    fields,
                    "    Field {{ number: {number}, name: {at}, length: {length}, shape: {shape} }},"
                );
                count += 1;
            }
            let _ = writeln!(
                messages,
                "    Message {{ name: {at}, length: {}, first: {first}, fields: {} }},",
                own.len(),
                count - first
            );
            next += 1;
        }
        format!(
            "static NAMES: &str = {:?};\nstatic FIELDS: [Field; {count}] = [\n{fields}];\n\
             static MESSAGES: [Message; {next}] = [\n{messages}];\nconst REQUESTS: usize = {requests};\n",
            self.names
        )
    }

    /// What a field contains, and how often.
    fn shape(&mut self, message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
        let kind = match field.type_() {
            Type::TYPE_BOOL => "Kind::Bool".to_owned(),
            Type::TYPE_STRING => "Kind::String".to_owned(),
            Type::TYPE_BYTES => "Kind::Bytes".to_owned(),
            Type::TYPE_INT32 | Type::TYPE_ENUM => "Kind::Int32".to_owned(),
            Type::TYPE_INT64 => "Kind::Int64".to_owned(),
            Type::TYPE_UINT32 => "Kind::Uint32".to_owned(),
            Type::TYPE_UINT64 => "Kind::Uint64".to_owned(),
            Type::TYPE_MESSAGE => format!("Kind::Message({})", self.index(field.type_name())),
            other => panic!("{}: {other:?} is unknown to the table and to who reads it", field.name()),
        };
        let is_map = message.nested_type.iter().any(|nested| {
            nested.options.map_entry() && field.type_name().ends_with(&format!(".{}", nested.name()))
        });
        if is_map {
            format!("Shape::Map({kind})")
        } else if field.label() == Label::LABEL_REPEATED {
            format!("Shape::Repeated({kind})")
        } else if field.proto3_optional() {
            format!("Shape::Optional({kind})")
        } else if field.has_oneof_index() {
            let index = usize::try_from(field.oneof_index()).expect("an index");
            let members = message.field.iter().filter(|other| other.oneof_index == field.oneof_index).count();
            assert_eq!(members, 1, "{}: readers of the table know choices of one field only", field.name());
            let name = message.oneof_decl[index].name();
            format!("Shape::OneOf({kind}, {}, {})", self.name(name), name.len())
        } else {
            format!("Shape::Single({kind})")
        }
    }
}

/// The field's name in Rust, which is also the one in policies.
fn rust_name(name: &str) -> String {
    if name == "type" { format!("{name}_") } else { name.to_owned() }
}
