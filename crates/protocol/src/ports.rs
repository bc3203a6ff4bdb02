//! What host and guest agree on besides the messages: ports, paths and kernel command line keys.

/// vsock port of the agent's ttrpc server.
pub const AGENT: u32 = 1024;
/// vsock port of the agent's log stream, one JSON object a line.
pub const LOG: u32 = 1025;
/// vsock port of the debug console, open only when asked for.
pub const DEBUG_CONSOLE: u32 = 1026;
/// vsock port of the agent's listener for connections that become standard streams, open only when asked for.
pub const STREAMS: u32 = 1027;
/// vsock port of the host that takes the agent's spans.
pub const TRACE: u32 = 10240;
/// The host's well-known vsock context id.
pub const HOST_CID: u32 = 2;

/// Tag of the shared file system.
pub const SHARE_TAG: &str = "kataShared";
/// Where the guest mounts the shared file system; `<host share>/<x>` is `GUEST_SHARE/<x>` in the guest.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared/containers";
/// Where the agent keeps its own state, one directory a container.
pub const GUEST_STATE: &str = "/run/kata-containers";
/// The sandbox's shared memory, the source of each container's `/dev/shm`.
pub const GUEST_SHM: &str = "/run/kata-containers/sandbox/shm";
/// Default size of the sandbox's shared memory, in bytes.
pub const SHM_BYTES: u64 = 64 << 20;

/// A file copied by `CopyFile` travels in pieces of at most this many bytes.
pub const COPY_CHUNK: usize = 1 << 20;
/// Standard streams travel in pieces of at most this many bytes.
pub const STDIO_CHUNK: usize = 32 << 10;
