//! Messages as JSON, by the names of the proto files or their lowerCamel forms.
//!
//! The rules are those of protobuf's JSON mapping: 64-bit numbers as strings (numbers are taken, too), bytes in base64,
//! enum values by name. Unlike the mapping, an unknown name is answered with the nearest one. An `OCI` field may also be
//! `"@config.json"`: an OCI runtime configuration, translated.

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_protocol::{
    oci_json,
    protobuf::{
        MessageDyn,
        reflect::{MessageDescriptor, RuntimeFieldType, RuntimeType},
    },
};
use protobuf_json_mapping::{PrintOptions, parse_dyn_from_str, print_to_string_with_options};
use serde_json::Value;

use super::api::nearest;

/// The message that may be given as a file.
const SPEC: &str = "grpc.Spec";

/// Reads a message from text; `null` and nothing are the empty message.
pub(crate) fn read(message: &MessageDescriptor, text: &str) -> Result<Box<dyn MessageDyn>> {
    let text = if text.trim().is_empty() { "null" } else { text };
    let mut value: Value = serde_json::from_str(text).context("the request is not JSON")?;
    insert_files(message, &mut value)?;
    of_value(message, value)
}

/// Makes a message of a JSON value.
pub(crate) fn of_value(message: &MessageDescriptor, value: Value) -> Result<Box<dyn MessageDyn>> {
    if value.is_null() {
        return Ok(message.new_instance());
    }
    check_message(message, &value, "")?;
    parse_dyn_from_str(message, &value.to_string())
        .with_context(|| format!("the JSON is no {}", message.name()))
}

/// Shows a message, with the names of the proto files; with fields that have their default value if asked for.
pub(crate) fn show(message: &dyn MessageDyn, defaults: bool) -> Result<Value> {
    let options =
        PrintOptions { proto_field_name: true, always_output_default_values: defaults, ..Default::default() };
    let text = print_to_string_with_options(message, &options).context("the message has no JSON form")?;
    serde_json::from_str(&text).context("the message has no JSON form")
}

/// Checks the names.
fn check_message(message: &MessageDescriptor, value: &Value, path: &str) -> Result<()> {
    let Value::Object(fields) = value else {
        ensure!(!path.is_empty(), "a {} is a JSON object", message.name());
        // A value of the wrong kind is the parser's to refuse.
        return Ok(());
    };
    for (name, value) in fields {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let Some(field) = message.field_by_name_or_json_name(name) else {
            let fields: Vec<_> = message.fields().collect();
            match nearest(name, fields.iter().map(|field| field.name())) {
                Some(nearest) => bail!("{} has no field {path}; the nearest is {nearest}", message.name()),
                None => bail!("{} has no fields, so {path} is none", message.name()),
            }
        };
        check_field(&field.runtime_field_type(), value, &path)?;
    }
    Ok(())
}

fn check_field(kind: &RuntimeFieldType, value: &Value, path: &str) -> Result<()> {
    match (kind, value) {
        (RuntimeFieldType::Singular(RuntimeType::Message(message)), value) => {
            check_message(message, value, path)
        }
        (RuntimeFieldType::Repeated(RuntimeType::Message(message)), Value::Array(values)) => {
            let mut values = values.iter().enumerate();
            values.try_for_each(|(i, value)| check_message(message, value, &format!("{path}[{i}]")))
        }
        (RuntimeFieldType::Map(_, RuntimeType::Message(message)), Value::Object(values)) => {
            let mut values = values.iter();
            values.try_for_each(|(key, value)| check_message(message, value, &format!("{path}[{key:?}]")))
        }
        _ => Ok(()),
    }
}

/// Puts configurations in the places of their files' names. Only what the user wrote names files; a recording does not.
fn insert_files(message: &MessageDescriptor, value: &mut Value) -> Result<()> {
    let Value::Object(fields) = value else { return Ok(()) };
    for (name, value) in fields {
        let Some(field) = message.field_by_name_or_json_name(name) else { continue };
        if let RuntimeFieldType::Singular(RuntimeType::Message(message)) = field.runtime_field_type()
            && message.full_name() == SPEC
            && let Value::String(text) = value
            && let Some(file) = text.strip_prefix('@')
        {
            *value = configuration(file)?;
        }
    }
    Ok(())
}

/// An OCI runtime configuration in the form in which it travels.
fn configuration(file: &str) -> Result<Value> {
    let spec = oci_spec::runtime::Spec::load(file).with_context(|| format!("read {file}"))?;
    let spec = oci_json::spec(&spec).with_context(|| format!("translate {file}"))?;
    show(&spec, false)
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::{agent::*, protobuf::MessageFull as _};

    use super::*;

    fn create(text: &str) -> Result<CreateContainerRequest> {
        let message = read(&CreateContainerRequest::descriptor(), text)?;
        Ok(*message.downcast_box::<CreateContainerRequest>().unwrap())
    }

    #[test]
    fn both_kinds_of_names_are_taken() {
        for text in [
            r#"{"container_id": "c", "OCI": {"Process": {"Args": ["a"]}}, "storages": [{"mount_point": "/m"}]}"#,
            r#"{"containerId": "c", "OCI": {"Process": {"Args": ["a"]}}, "storages": [{"mountPoint": "/m"}]}"#,
        ] {
            let request = create(text).unwrap();
            assert_eq!(request.container_id, "c");
            assert_eq!(request.OCI.Process.Args, ["a"]);
            assert_eq!(request.storages[0].mount_point, "/m");
        }
        assert_eq!(create("null").unwrap(), CreateContainerRequest::new());
        assert_eq!(create("").unwrap(), CreateContainerRequest::new());
    }

    #[test]
    fn an_unknown_field_is_told_the_nearest() {
        let error = |text: &str| format!("{:#}", create(text).unwrap_err());
        assert!(error(r#"{"contaner_id": "c"}"#).contains("nearest is container_id"));
        assert!(
            error(r#"{"OCI": {"Process": {"args": []}}}"#).contains("OCI.Process.args; the nearest is Args")
        );
        assert!(
            error(r#"{"storages": [{}, {"drive": 1}]}"#).contains("storages[1].drive; the nearest is driver")
        );
        assert!(error("[]").contains("is a JSON object"));
        assert!(error("{").contains("not JSON"));
        assert!(error(r#"{"container_id": 1}"#).contains("CreateContainerRequest"));
        let nothing = read(&DestroySandboxRequest::descriptor(), r#"{"x": 1}"#).map(drop).unwrap_err();
        assert!(nothing.to_string().contains("has no fields"));
    }

    #[test]
    fn a_configuration_can_be_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.json");
        std::fs::write(
            &file,
            r#"{"ociVersion": "1.0.2", "hostname": "h", "mounts": [{"destination": "/x"}]}"#,
        )
        .unwrap();
        let request = create(&format!(r#"{{"OCI": "@{}"}}"#, file.display())).unwrap();
        assert_eq!((request.OCI.Hostname.as_str(), request.OCI.Mounts[0].destination.as_str()), ("h", "/x"));
        assert!(create(r#"{"OCI": "@/no/such/file"}"#).unwrap_err().to_string().contains("/no/such/file"));
    }

    #[test]
    fn a_message_is_shown_by_its_own_names() {
        let reply = WaitProcessResponse::new();
        assert_eq!(show(&reply, true).unwrap().to_string(), r#"{"status":0}"#);
        assert_eq!(show(&reply, false).unwrap().to_string(), "{}");
        let copy = CopyFileRequest { file_size: 1 << 40, data: vec![0, 255], ..Default::default() };
        let value = show(&copy, false).unwrap();
        assert_eq!(
            (value["file_size"].as_str(), value["data"].as_str()),
            (Some("1099511627776"), Some("AP8="))
        );
        let again = of_value(&CopyFileRequest::descriptor(), value).unwrap();
        assert_eq!(*again.downcast_box::<CopyFileRequest>().unwrap(), copy);
    }
}
