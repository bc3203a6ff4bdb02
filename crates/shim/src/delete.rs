//! `delete`: cleans up for a container whose server died, or that containerd gave up. Bounded to less than the five seconds
//! after which containerd kills it.
//!
//! While the pod's server lives, a member is deleted through it; the owner's server is ended, since containerd calls this
//! only when it has no use for it any more. Then what the pod left on the host is removed.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bulkhead_sandbox::{Config, Error, cleanup, load};
use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse},
    shim_async::{Client, TaskClient},
};
use nix::mount::{MntFlags, umount2};
use protobuf::{Message, MessageField};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::{
    annotations::{Role, role},
    args::Args,
    bundle, error,
    events::timestamp,
    pod::ADDRESS_LABEL,
    socket, start,
};

/// The bound on an answer of a living server.
const ANSWER: Duration = Duration::from_secs(3);
/// The bound on the end of a server that is leaving, and of one that was killed.
const END: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// What containerd is told the container ended with.
const KILLED: u32 = 128 + 9;

/// Cleans up; returns what is to be printed.
pub(crate) fn run(args: &Args) -> Result<Vec<u8>, Error> {
    let bundle = args.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    // Whatever the configuration has become: what can be cleaned up is.
    let role = bundle::annotations(&bundle)
        .ok()
        .and_then(|annotations| role(&annotations).ok())
        .unwrap_or(Role::Single);
    let group = start::group(&role, &args.id);
    let socket = server_socket(args, &bundle, group);

    let member = matches!(role, Role::Member { .. });
    let outcome = if member && socket::is_alive(&socket) {
        ask_to_delete(&args.id, &socket)
    } else {
        if !member {
            end_server(&args.id, &bundle, &socket);
        }
        let root = state_root(&bundle);
        let removed = if is_ours(&root, group, &socket) { cleanup(&root, group) } else { Ok(()) };
        removed.and_then(|()| socket::remove(&socket).map_err(|source| error::io("remove", &socket, source)))
    };
    unmount(&bundle.join("rootfs"));
    outcome?;
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    response.write_to_bytes().map_err(|error| Error::Invalid(error.to_string()))
}

/// The server's socket: as `start` wrote it down, or where it would have been made.
fn server_socket(args: &Args, bundle: &Path, group: &str) -> PathBuf {
    match std::fs::read_to_string(bundle.join(bundle::ADDRESS)) {
        Ok(address) => PathBuf::from(address.trim().strip_prefix("unix://").unwrap_or(address.trim())),
        Err(_) => socket::path(Path::new(socket::DIRECTORY), &args.address, &args.namespace, group),
    }
}

/// Where the pod kept its state: as its server wrote it down, or as it is configured now.
fn state_root(bundle: &Path) -> PathBuf {
    match std::fs::read_to_string(bundle.join(bundle::STATE_ROOT)) {
        Ok(root) => PathBuf::from(root),
        Err(_) => match Config::load() {
            Ok(config) => config.state_root,
            Err(_) => std::env::var_os("BULKHEAD_STATE")
                .map_or_else(|| PathBuf::from("/run/bulkhead"), PathBuf::from),
        },
    }
}

/// Whether a pod's state was written by the server of this socket, and not for the same id in another namespace. State
/// that cannot be read is.
fn is_ours(root: &Path, group: &str, socket: &Path) -> bool {
    load(root, group).ok().is_none_or(|state| {
        state.labels.get(ADDRESS_LABEL).is_some_and(|address| *address == socket::address(socket))
    })
}

fn ask_to_delete(id: &str, socket: &Path) -> Result<(), Error> {
    let failed = |source| error::io("delete the container through the shim at", socket, source);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::connect(socket).await.map_err(failed)?;
        let client = TaskClient::new(Client::new(stream.into()));
        let request = DeleteRequest { id: id.to_owned(), ..Default::default() };
        match client.delete(ttrpc::context::with_duration(ANSWER), &request).await {
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => Ok(()),
            Err(error) => Err(failed(std::io::Error::other(error::text(&error)))),
            Ok(_) => Ok(()),
        }
    })
}

/// Ends the server that wrote its pid into the bundle, if that process is still it. The pidfd is opened before the check,
/// so that the process checked is the one killed. A server without a socket is leaving already, and may.
fn end_server(id: &str, bundle: &Path, socket: &Path) {
    let Ok(text) = std::fs::read_to_string(bundle.join(bundle::PID)) else { return };
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let command = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    let ended = || poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&END)).is_ok_and(|ready| ready > 0);
    if !is_server(&command, id) || (!socket.exists() && ended()) {
        return;
    }
    if pidfd_send_signal(&process, Signal::KILL).is_ok() {
        ended();
    }
}

/// Whether a command line is that of the server for `id`.
fn is_server(command: &[u8], id: &str) -> bool {
    let words: Vec<_> = command.split(|byte| *byte == 0).collect();
    let program = words.first().and_then(|program| program.rsplit(|byte| *byte == b'/').next());
    program == Some(env!("CARGO_PKG_NAME").as_bytes())
        && words.windows(2).any(|pair| pair == [b"-id".as_slice(), id.as_bytes()])
}

/// Unmounts everything on a directory; most often there is nothing, since mounts end with their server.
fn unmount(directory: &Path) {
    while umount2(directory, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_server_itself_is_killed() {
        let line = |words: &[&str]| words.join("\0").into_bytes();
        assert!(is_server(
            &line(&["/opt/bin/containerd-shim-bulkhead-v2", "-namespace", "n", "-id", "a", ""]),
            "a"
        ));
        assert!(!is_server(
            &line(&["/opt/bin/containerd-shim-bulkhead-v2", "-namespace", "n", "-id", "ab"]),
            "a"
        ));
        assert!(!is_server(&line(&["/usr/bin/containerd-shim-runc-v2", "-id", "a"]), "a"));
        assert!(!is_server(b"", "a"));
    }

    #[test]
    fn the_state_is_found_where_the_server_said() {
        let directory = tempfile::tempdir().unwrap();
        bundle::write(directory.path(), bundle::STATE_ROOT, "/somewhere").unwrap();
        assert_eq!(state_root(directory.path()), Path::new("/somewhere"));
        bundle::write(directory.path(), bundle::ADDRESS, "unix:///run/x").unwrap();
        let args = Args::parse(["-id", "a", "-namespace", "n"].map(str::to_owned)).unwrap();
        assert_eq!(server_socket(&args, directory.path(), "a"), Path::new("/run/x"));
        assert!(server_socket(&args, Path::new("/nonexistent"), "a").starts_with(socket::DIRECTORY));
    }
}
