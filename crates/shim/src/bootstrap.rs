//! What containerd says to `start` on standard input, and what it wants to hear on standard output.
//!
//! | containerd | input | output understood |
//! |---|---|---|
//! | 1.6 | `Any` with the runtime's options, or nothing | the bare address |
//! | 1.7 to 2.2 | the same | the bare address, or JSON |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult` |
//!
//! So the answer is protobuf to who asked in protobuf, and the bare address to everybody else. Nothing in the environment
//! tells the versions apart, and an `Any` also decodes as `BootstrapParams`: those count only if they name the very
//! container and namespace of the command line.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;

/// The version of the task service announced to a containerd that asks in protobuf.
const TASK_VERSION: i32 = 3;

/// What containerd said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bootstrap {
    /// The answer is to be protobuf.
    protobuf: bool,
    /// Where events go, if it was said here and not in the environment.
    pub(crate) ttrpc_address: Option<String>,
    /// Where the socket is to be made, if not in the usual place.
    pub(crate) socket_directory: Option<PathBuf>,
    /// Log at debug level.
    pub(crate) debug: bool,
}

impl Bootstrap {
    /// Understands standard input.
    pub(crate) fn read(input: &[u8], id: &str, namespace: &str) -> Bootstrap {
        let Ok(params) = BootstrapParams::parse_from_bytes(input) else { return Bootstrap::default() };
        if params.instance_id != id || params.namespace != namespace {
            return Bootstrap::default();
        }
        Bootstrap {
            protobuf: true,
            ttrpc_address: Some(params.containerd_ttrpc_address).filter(|address| !address.is_empty()),
            socket_directory: params.socket_dir.filter(|directory| !directory.is_empty()).map(PathBuf::from),
            // Levels below INFO (0) are more verbose.
            debug: params.log_level.value() < 0,
        }
    }

    /// The answer: where the server listens.
    pub(crate) fn answer(&self, address: &str) -> Vec<u8> {
        if !self.protobuf {
            return address.as_bytes().to_vec();
        }
        let result = BootstrapResult {
            version: TASK_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            metadata: HashMap::new(),
            ..Default::default()
        };
        result.write_to_bytes().expect("a message without required fields always encodes")
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::LogLevel;
    use protobuf::well_known_types::any::Any;

    use super::*;

    const ADDRESS: &str = "unix:///run/containerd/s/x";

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".into(),
            namespace: "k8s.io".into(),
            log_level: LogLevel::LOG_LEVEL_DEBUG.into(),
            containerd_ttrpc_address: "/run/c.ttrpc".into(),
            socket_dir: Some("/run/d".into()),
            ..Default::default()
        }
    }

    #[test]
    fn nothing_and_options_get_the_bare_address() {
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: vec![10, 3, b'a', b'b', b'c'],
            ..Default::default()
        };
        for input in [vec![], options.write_to_bytes().unwrap(), b"\xff\xff\xff garbage".to_vec()] {
            let bootstrap = Bootstrap::read(&input, "c1", "k8s.io");
            assert_eq!(bootstrap, Bootstrap::default());
            assert_eq!(bootstrap.answer(ADDRESS), ADDRESS.as_bytes());
        }
    }

    #[test]
    fn params_get_a_result() {
        let bootstrap = Bootstrap::read(&params().write_to_bytes().unwrap(), "c1", "k8s.io");
        assert_eq!(bootstrap.ttrpc_address.as_deref(), Some("/run/c.ttrpc"));
        assert_eq!(bootstrap.socket_directory, Some(PathBuf::from("/run/d")));
        assert!(bootstrap.debug);
        let result = BootstrapResult::parse_from_bytes(&bootstrap.answer(ADDRESS)).unwrap();
        assert_eq!(
            (result.version, result.address.as_str(), result.protocol.as_str()),
            (3, ADDRESS, "ttrpc")
        );
    }

    #[test]
    fn params_for_somebody_else_are_a_coincidence() {
        let input = params().write_to_bytes().unwrap();
        for (id, namespace) in [("c2", "k8s.io"), ("c1", "default")] {
            assert_eq!(Bootstrap::read(&input, id, namespace), Bootstrap::default());
        }
    }
}
