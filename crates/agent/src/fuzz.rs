//! One function for each decoder and each resolver of paths of the agent: it may refuse any bytes, and must not do anything
//! else with them. Most are next to what they try, in a module `fuzz`; docs/fuzzing.md says how they are run and extended.

use std::collections::BTreeSet;

use bulkhead_protocol::{
    agent,
    layout::Message as Layout,
    protobuf::{Message, reflect::MessageDescriptor},
};

use crate::{
    config, copy, device, json, metrics, modules, network, oom, policy, process, storage, trace, tree, volume,
};

#[cfg(test)]
#[path = "../../../fuzz/shared/corpus.rs"]
mod corpus;
#[path = "../../../fuzz/shared/world.rs"]
mod world;

pub(crate) use world::World;

/// A decoder under test.
pub type Target = fn(&[u8]);

/// Every function here, by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("config_file", config_file),
    ("copy_file", copy_file),
    ("device_request", device_request),
    ("json_text", json_text),
    ("kernel_line", kernel_line),
    ("kernel_module", kernel_module),
    ("mount_point", mount_point),
    ("netlink", netlink),
    ("network_request", network_request),
    ("pcidevice_env", pcidevice_env),
    ("policy_input", policy_input),
    ("policy_text", policy_text),
    ("proc_files", proc_files),
    ("request", request),
    ("storage_request", storage_request),
    ("trace_context", trace_context),
    ("tree_path", tree_path),
    ("uevent", uevent),
];

fn text(data: &[u8], target: fn(&str)) {
    if let Ok(text) = std::str::from_utf8(data) {
        target(text);
    }
}

/// A policy, held against every request.
pub fn policy_text(data: &[u8]) {
    text(data, policy::fuzz_text);
}

/// A request's bytes as the input of a policy; the first byte says which request.
pub fn policy_input(data: &[u8]) {
    policy::fuzz_input(data);
}

/// An envelope, and the request in it: what can be read is the same when it is written and read again.
pub fn request(data: &[u8]) {
    let Ok(envelope) = ttrpc::Request::parse_from_bytes(data) else { return };
    let Some(name) = Layout::of_method(&envelope.method).map(Layout::name) else { return };
    let file = agent::file_descriptor();
    let Some(layout) = file.message_by_package_relative_name(name) else { return };
    policy::fuzz_request(name, &envelope.payload);
    again(&layout, &envelope.payload);
}

fn again(layout: &MessageDescriptor, bytes: &[u8]) {
    let Ok(message) = layout.parse_from_bytes(bytes) else { return };
    let bytes = message.write_to_bytes_dyn().expect("what was read can be written");
    let again = layout.parse_from_bytes(&bytes).expect("what was written can be read");
    assert!(layout.eq(&*message, &*again), "{message:?} became {again:?}");
}

/// Devices of a request: PCI paths and addresses, SCSI addresses, options of VFIO.
pub fn device_request(data: &[u8]) {
    text(data, device::fuzz::request);
}

/// `PCIDEVICE_*`: the first line is the addresses of host and guest, each other a variable.
pub fn pcidevice_env(data: &[u8]) {
    text(data, device::fuzz::env);
}

/// A message of the kernel about a device.
pub fn uevent(data: &[u8]) {
    device::fuzz::uevent(data);
}

/// Storages of a request, one a line: driver, source, file system, mount point and options between tabs.
pub fn storage_request(data: &[u8]) {
    text(data, storage::fuzz::request);
}

/// Mount points in a tree with links: nothing beside it is reached.
pub fn mount_point(data: &[u8]) {
    text(data, storage::fuzz::mount_point);
}

/// The kernel's command line, and behind the first line break the file that it may name.
pub fn kernel_line(data: &[u8]) {
    config::fuzz::kernel_line(data);
}

/// A configuration file.
pub fn config_file(data: &[u8]) {
    config::fuzz::file(data);
}

/// What the kernel says of links, addresses and routes.
pub fn netlink(data: &[u8]) {
    network::fuzz::netlink(data);
}

/// Interfaces, routes and neighbours of requests; the first byte says which.
pub fn network_request(data: &[u8]) {
    network::fuzz::request(data);
}

/// A packed kernel module, and the index of modules.
pub fn kernel_module(data: &[u8]) {
    modules::fuzz(data);
}

/// Files of /proc, of cgroups, and lists of mounts.
pub fn proc_files(data: &[u8]) {
    text(data, |text| {
        metrics::fuzz(text);
        process::fuzz(text);
        oom::fuzz(text);
        volume::fuzz(text);
    });
}

/// Text in JSON is read as it was.
pub fn json_text(data: &[u8]) {
    text(data, |text| {
        let mut quoted = String::new();
        json::quote(&mut quoted, text);
        assert_eq!(serde_json::from_str::<String>(&quoted).ok().as_deref(), Some(text));
    });
}

/// The trace of a request; the span is JSON.
pub fn trace_context(data: &[u8]) {
    text(data, trace::fuzz);
}

/// A sequence of copies into a tree with links, one a line: kind, offset, size, path, contents between tabs.
pub fn copy_file(data: &[u8]) {
    text(data, copy::fuzz);
}

/// Paths below a directory, one a line, in a tree with links.
pub fn tree_path(data: &[u8]) {
    text(data, tree::fuzz);
}

/// The words between tabs, as many as are wanted.
pub(crate) fn words<const N: usize>(line: &str) -> [&str; N] {
    let mut words = line.splitn(N, '\t');
    std::array::from_fn(|_| words.next().unwrap_or_default())
}

/// Different lines, so few that a run stays short.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut seen = BTreeSet::new();
    text.split('\n').filter(move |line| seen.insert(*line)).take(32)
}

#[cfg(test)]
mod tests {
    use super::{TARGETS, corpus};

    #[test]
    fn the_corpus_breaks_nothing() {
        corpus::feed(TARGETS);
    }

    #[test]
    fn what_is_like_the_corpus_breaks_nothing() {
        corpus::change(TARGETS);
    }
}
