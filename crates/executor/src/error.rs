//! What can go wrong between a spec and a running process.

use std::{fmt, io, path::PathBuf};

/// Where in the life of a container child a failure happened; the text is what users see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Stage {
    /// Starting the child itself.
    Spawn,
    /// The session and its keyring.
    Session,
    /// The badness score of the out-of-memory killer.
    OomScore,
    /// Making or joining the namespaces.
    Namespaces,
    /// The host name.
    Hostname,
    /// Making the root file system a mount of its own.
    Rootfs,
    /// The mounts of the spec.
    Mounts,
    /// Device nodes and the links beside them.
    Devices,
    /// The terminal and `/dev/console`.
    Terminal,
    /// Kernel parameters.
    Sysctls,
    /// Masked and read-only paths, and a read-only root.
    ProtectedPaths,
    /// Changing to the container's root.
    PivotRoot,
    /// Putting the standard streams in place.
    Streams,
    /// The working directory.
    WorkingDirectory,
    /// A hook of the container.
    Hook,
    /// Looking up users and groups by name.
    User,
    /// What the environment is filled up with.
    Environment,
    /// Resource limits of the process.
    Rlimits,
    /// User, groups and capabilities.
    Credentials,
    /// Looking the command up.
    FindCommand,
    /// Waiting for the release of the container.
    Release,
    /// Security label, system call filter and the last capabilities.
    Confinement,
    /// Executing the command.
    Exec,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Spawn => "starting the process",
            Stage::Session => "making a session",
            Stage::OomScore => "setting oom_score_adj",
            Stage::Namespaces => "entering the namespaces",
            Stage::Hostname => "setting the host name",
            Stage::Rootfs => "preparing the root file system",
            Stage::Mounts => "mounting",
            Stage::Devices => "making the devices",
            Stage::Terminal => "opening the terminal",
            Stage::Sysctls => "setting kernel parameters",
            Stage::ProtectedPaths => "protecting paths",
            Stage::PivotRoot => "changing to the container's root",
            Stage::Streams => "connecting the standard streams",
            Stage::WorkingDirectory => "changing to the working directory",
            Stage::Hook => "running a hook",
            Stage::User => "looking up the user",
            Stage::Environment => "preparing the environment",
            Stage::Rlimits => "setting resource limits",
            Stage::Credentials => "setting user, groups and capabilities",
            Stage::FindCommand => "looking up the command",
            Stage::Release => "waiting for the start",
            Stage::Confinement => "confining the process",
            Stage::Exec => "executing the command",
        })
    }
}

/// A failed executor operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec asks for something that is malformed or contradicts itself.
    #[error("invalid container configuration: {0}")]
    Invalid(String),
    /// The spec asks for something this executor does not offer.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The operation does not fit the container's state.
    #[error("container {id} is {status}: cannot {operation}")]
    WrongState {
        /// The container.
        id: String,
        /// Its state, in the OCI specification's words.
        status: &'static str,
        /// What was asked for.
        operation: &'static str,
    },
    /// The command cannot be found (exit code 127 in the callers' tables). The text is runc's:
    /// `exec: "foo": executable file not found in $PATH` or `exec: "/foo": stat /foo: no such file or directory`.
    #[error("{0}")]
    CommandNotFound(String),
    /// The command was found but cannot be executed (exit code 126): `exec: "/foo": permission denied`.
    #[error("{0}")]
    CommandNotExecutable(String),
    /// A hook failed: `createRuntime hook /usr/bin/x: exit code 3: what it said`.
    #[error("{0}")]
    Hook(String),
    /// A stage of the child failed.
    #[error("container process failed while {stage}{}: {source}", detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Child {
        /// Which stage.
        stage: Stage,
        /// On what: a path, a namespace, a limit.
        detail: Option<String>,
        /// Why.
        source: io::Error,
    },
    /// A cgroup file could not be read or written.
    #[error("cgroup file {path}: {source}")]
    Cgroup {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A system call of the parent failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: names what was attempted.
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
        move |e| Error::Io { what: what.into(), source: e.into() }
    }
}
