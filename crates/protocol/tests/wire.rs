//! The generated protocol against the table of the Kata agent API 4.1: every service, message, field and enum, by name,
//! number, type and label, in both directions. Numbers from 1000 up are our own additions and are passed over.

use std::collections::{BTreeMap, BTreeSet};

use protobuf::descriptor::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    field_descriptor_proto::{Label, Type},
};
use serde_json::Value;

/// The first field number that is ours.
const OWN_FIELDS: i32 = 1000;

type Field = (i64, String, String, String);

#[derive(Default, Debug, PartialEq)]
struct Package {
    services: BTreeMap<String, Vec<(String, String, String)>>,
    messages: BTreeMap<String, BTreeSet<Field>>,
    enums: BTreeMap<String, BTreeMap<String, i64>>,
}

fn relative(package: &str, name: &str) -> String {
    let name = name.trim_start_matches('.');
    name.strip_prefix(&format!("{package}.")).unwrap_or(name).to_owned()
}

fn scalar(kind: Type) -> String {
    format!("{kind:?}").trim_start_matches("TYPE_").to_lowercase()
}

fn field_type(package: &str, field: &FieldDescriptorProto) -> String {
    match field.type_() {
        Type::TYPE_ENUM => format!("enum {}", relative(package, field.type_name())),
        Type::TYPE_MESSAGE => relative(package, field.type_name()),
        other => scalar(other),
    }
}

fn field_row(package: &str, message: &DescriptorProto, field: &FieldDescriptorProto) -> Field {
    let entry = message.nested_type.iter().find(|nested| {
        nested.options.map_entry() && field.type_name().ends_with(&format!(".{}", nested.name()))
    });
    let (kind, label) = if let Some(entry) = entry {
        let [key, value] = &entry.field[..] else { panic!("a map entry has two fields") };
        (format!("map<{},{}>", field_type(package, key), field_type(package, value)), "map".to_owned())
    } else if field.proto3_optional() {
        (field_type(package, field), "optional".to_owned())
    } else if field.has_oneof_index() {
        let index = usize::try_from(field.oneof_index()).expect("an index");
        (field_type(package, field), format!("oneof {}", message.oneof_decl[index].name()))
    } else if field.label() == Label::LABEL_REPEATED {
        (field_type(package, field), "repeated".to_owned())
    } else {
        (field_type(package, field), String::new())
    };
    (field.number().into(), field.name().to_owned(), kind, label)
}

fn values(declared: &EnumDescriptorProto) -> BTreeMap<String, i64> {
    declared.value.iter().map(|value| (value.name().to_owned(), value.number().into())).collect()
}

fn add(package: &mut Package, file: &FileDescriptorProto) {
    for message in &file.message_type {
        let fields = message.field.iter().filter(|field| field.number() < OWN_FIELDS);
        let rows = fields.map(|field| field_row(file.package(), message, field)).collect();
        package.messages.insert(message.name().to_owned(), rows);
        for nested in &message.enum_type {
            package.enums.insert(format!("{}.{}", message.name(), nested.name()), values(nested));
        }
    }
    for declared in &file.enum_type {
        package.enums.insert(declared.name().to_owned(), values(declared));
    }
    for service in &file.service {
        let methods = service.method.iter().map(|method| {
            let name = |full: &str| relative(file.package(), full);
            (method.name().to_owned(), name(method.input_type()), name(method.output_type()))
        });
        package.services.insert(service.name().to_owned(), methods.collect());
    }
}

fn declared() -> BTreeMap<String, Package> {
    let protos = concat!(env!("CARGO_MANIFEST_DIR"), "/protos");
    let inputs = ["types", "oci", "csi", "agent", "health", "confidential_data_hub"];
    let parsed = protobuf_parse::Parser::new()
        .pure()
        .include(protos)
        .inputs(inputs.map(|name| format!("{protos}/{name}.proto")))
        .parse_and_typecheck()
        .expect("the .proto files are valid");
    let mut packages: BTreeMap<String, Package> = BTreeMap::new();
    for file in parsed.file_descriptors.iter().filter(|file| file.package() != "google.protobuf") {
        add(packages.entry(file.package().to_owned()).or_default(), file);
    }
    packages
}

fn text(value: &Value) -> String {
    value.as_str().expect("a string").to_owned()
}

fn expected() -> BTreeMap<String, Package> {
    let table: BTreeMap<String, Value> =
        serde_json::from_str(include_str!("../test_data/wire.json")).expect("the table is JSON");
    let package = |value: &Value| Package {
        services: entries(&value["services"], |methods| {
            let row = |method: &Value| (text(&method[0]), text(&method[1]), text(&method[2]));
            methods.as_array().expect("methods").iter().map(row).collect()
        }),
        messages: entries(&value["messages"], |fields| {
            let row = |field: &Value| {
                (field[0].as_i64().expect("a number"), text(&field[1]), text(&field[2]), text(&field[3]))
            };
            fields.as_array().expect("fields").iter().map(row).collect()
        }),
        enums: entries(&value["enums"], |numbers| {
            entries(numbers, |number| number.as_i64().expect("a number"))
        }),
    };
    table.iter().map(|(name, value)| (name.clone(), package(value))).collect()
}

fn entries<T>(value: &Value, convert: impl Fn(&Value) -> T) -> BTreeMap<String, T> {
    value.as_object().expect("an object").iter().map(|(name, value)| (name.clone(), convert(value))).collect()
}

#[test]
fn every_name_and_number_is_the_published_one() {
    let (declared, expected) = (declared(), expected());
    assert_eq!(declared.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, package) in &expected {
        let ours = &declared[name];
        assert_eq!(ours.services, package.services, "services of {name}");
        assert_eq!(ours.enums, package.enums, "enums of {name}");
        for (message, fields) in &package.messages {
            assert_eq!(ours.messages.get(message), Some(fields), "{name}.{message}");
        }
        let unknown: Vec<_> =
            ours.messages.keys().filter(|name| !package.messages.contains_key(*name)).collect();
        assert!(unknown.is_empty(), "messages of {name} that nobody else knows: {unknown:?}");
    }
}

#[test]
fn the_agent_has_44_methods() {
    let expected = expected();
    let count: usize = expected["grpc"].services.values().map(Vec::len).sum();
    assert_eq!(count, 44);
}
