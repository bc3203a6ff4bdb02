//! What this runtime says of itself.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

/// The runtime's name, from which containerd makes the name of this program.
const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// For `-v`.
pub(crate) fn version() -> String {
    format!("{}:\n  Version:  {}\n", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
}

/// For `-info`: containerd's `RuntimeInfo`.
pub(crate) fn info() -> Vec<u8> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    let info =
        RuntimeInfo { name: RUNTIME.to_owned(), version: MessageField::some(version), ..Default::default() };
    info.write_to_bytes().expect("a message without required fields always encodes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_info_is_readable() {
        let info = RuntimeInfo::parse_from_bytes(&info()).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), (RUNTIME, env!("CARGO_PKG_VERSION")));
        assert!(version().contains(env!("CARGO_PKG_VERSION")));
    }
}
