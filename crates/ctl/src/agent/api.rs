//! The methods of the agent API, from the descriptors of its messages.

use anyhow::{Result, bail};
use bulkhead_protocol::{agent, health, protobuf::reflect::MessageDescriptor};

/// A method, and the messages it takes and gives.
#[derive(Clone)]
pub(crate) struct Method {
    /// Its service, with the package: `grpc.AgentService`.
    pub(crate) service: String,
    /// Its name: `CreateContainer`.
    pub(crate) name: String,
    /// The request's message.
    pub(crate) input: MessageDescriptor,
    /// The reply's message.
    pub(crate) output: MessageDescriptor,
}

impl Method {
    /// The full name: `grpc.AgentService/CreateContainer`.
    pub(crate) fn path(&self) -> String {
        format!("{}/{}", self.service, self.name)
    }

    fn answers_to(&self, name: &str) -> bool {
        let service = self.service.rsplit('.').next().unwrap_or_default();
        name == self.name || name == format!("{service}.{}", self.name) || name == self.path()
    }
}

/// Every method of both services.
pub(crate) fn methods() -> Vec<Method> {
    [agent::file_descriptor(), health::file_descriptor()].into_iter().flat_map(of_file).collect()
}

fn of_file(file: &bulkhead_protocol::protobuf::reflect::FileDescriptor) -> Vec<Method> {
    let service = |service: bulkhead_protocol::protobuf::reflect::ServiceDescriptor| {
        let path = format!("{}.{}", file.package(), service.proto().name());
        let method = |method: bulkhead_protocol::protobuf::reflect::MethodDescriptor| Method {
            service: path.clone(),
            name: method.proto().name().to_owned(),
            input: method.input_type(),
            output: method.output_type(),
        };
        service.methods().map(method).collect::<Vec<Method>>()
    };
    file.services().flat_map(service).collect()
}

/// The method of that name: `CreateContainer`, `Health.Check` or `grpc.AgentService/CreateContainer`.
pub(crate) fn find(name: &str) -> Result<Method> {
    let methods = methods();
    if let Some(method) = methods.iter().find(|method| method.answers_to(name)) {
        return Ok(method.clone());
    }
    let last = name.rsplit(['.', '/']).next().unwrap_or_default();
    let nearest = nearest(last, methods.iter().map(|method| method.name.as_str())).unwrap_or_default();
    bail!(
        "the agent API has no method {name}; the nearest is {nearest}, and `bulkhead agent call --list` lists all"
    )
}

/// The candidate that is the fewest edits away.
pub(crate) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates.min_by_key(|candidate| edits(&word.to_lowercase(), &candidate.to_lowercase()))
}

/// How many characters have to be added, removed or replaced.
fn edits(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, character) in one.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, with) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(character != *with);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_there_under_each_of_its_names() {
        let methods = methods();
        assert_eq!(methods.len(), 44);
        let create = find("CreateContainer").unwrap();
        assert_eq!(
            (create.path().as_str(), create.input.name()),
            ("grpc.AgentService/CreateContainer", "CreateContainerRequest")
        );
        assert_eq!(find("grpc.AgentService/CreateContainer").unwrap().path(), create.path());
        assert_eq!(find("Health.Check").unwrap().output.name(), "HealthCheckResponse");
        assert_eq!(find("UpdateInterface").unwrap().output.full_name(), "types.Interface");
        for method in methods {
            assert_eq!(find(&method.path()).unwrap().name, method.name);
        }
    }

    #[test]
    fn a_slip_is_told_the_nearest() {
        for (slip, meant) in
            [("CreateContainr", "CreateContainer"), ("Health.Chek", "Check"), ("waitprocess", "WaitProcess")]
        {
            let error = find(slip).err().unwrap().to_string();
            assert!(error.contains(&format!("nearest is {meant},")), "{error}");
        }
        assert_eq!(edits("kitten", "sitting"), 3);
    }
}
