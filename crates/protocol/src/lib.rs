//! The wire between a host and a guest agent, and only the wire: no I/O of its own.
//!
//! The messages and the ttrpc services are generated at build time from `protos/`; their names and numbers are those of
//! the Kata Containers agent API 4.1, so that either end can be replaced by a Kata peer. What both ends must agree on
//! besides the messages (vsock ports, guest paths, kernel command line keys) is in [`ports`], error codes in [`status`].

pub mod ports;
pub mod status;

#[cfg(feature = "layout")]
pub mod layout;
#[cfg(feature = "oci")]
pub mod oci_json;

macro_rules! generated {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[allow(
            missing_docs,
            unreachable_pub,
            unsafe_code,
            unused,
            non_snake_case,
            non_camel_case_types,
            non_upper_case_globals,
            clippy::all,
            clippy::unwrap_used,
            clippy::cast_possible_truncation,
            clippy::allow_attributes_without_reason,
            reason = "generated code"
        )]
        pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".rs"));
        }
    };
}

generated!(
    /// Network and ownership types.
    types
);
generated!(
    /// The OCI runtime configuration as protobuf.
    oci
);
generated!(
    /// Volume statistics.
    csi
);
generated!(
    /// Messages of the agent service.
    agent
);
generated!(
    /// Messages of the health service.
    health
);
generated!(
    /// Messages of the confidential data hub.
    confidential_data_hub
);
generated!(
    /// `AgentService`: the server trait, `create_agent_service` and the client.
    agent_ttrpc
);
generated!(
    /// `Health`: the server trait, `create_health` and the client.
    health_ttrpc
);

generated!(
    /// The confidential data hub's services and clients.
    confidential_data_hub_ttrpc
);

pub use protobuf;
pub use protobuf::well_known_types::empty::Empty;
