//! Takes requests until the sandbox ends, and sees that the last answer gets out.

use std::{fs, io, os::unix::fs::FileTypeExt, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use bulkhead_protocol::ports;
use tokio::signal::unix::{SignalKind, signal};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockStream};
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    boot::{self, Guest, Times},
    config::Config,
    console,
    dispatch::strict,
    error::{During, Error, Result},
    log::Lines,
    metrics::Metrics,
    passfd,
    policy::Policy,
    port::HostPort,
    reaper,
    sandbox::Sandbox,
    service::services,
    trace::Tracer,
};

/// Where requests come from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Address {
    /// Some machine's port; any machine's for a listener.
    Vsock {
        /// The machine.
        cid: u32,
        /// The port.
        port: u32,
    },
    /// A socket in the file system, or with `@` in the abstract namespace.
    Unix(String),
}

/// Serves until the sandbox has been destroyed or the process is told to end. `listening` is called once requests are
/// taken, which somebody may be waiting for: whatever can come later comes then.
pub(crate) async fn serve(
    config: Config,
    guest: Arc<Guest>,
    times: Times,
    log: Option<Arc<Lines>>,
    listening: impl FnOnce(),
) -> Result<()> {
    let address = Address::parse(&config.server)?;
    // Before anybody can connect, and then end the agent.
    let mut terminate = signal(SignalKind::terminate()).during(|| "watch for SIGTERM".into())?;
    let tracer = Tracer::start(&config)?;
    let policy = Arc::new(first_policy(&config.policy_file, guest.init)?);
    let sandbox = Sandbox::new(guest, config);
    let services =
        services(Arc::clone(&sandbox), Metrics::new(times.clone()), tracer.clone(), Arc::clone(&policy));
    let mut server =
        Server::new().add_listener(address.listen()?).register_service(strict(services, &policy));
    reaper::adopt_orphans().during(|| "become the reaper of orphans".into())?;
    let children = signal(SignalKind::child()).during(|| "watch for ended children".into())?;
    let reaper = Arc::clone(&sandbox.reaper);
    crate::sync::spawn(async move { reaper.run(children).await });
    server.start().await.map_err(io::Error::other).during(|| format!("serve {address}"))?;
    let since = times.listening.get_or_init(boot::uptime);
    listening();
    tracing::info!(%address, started = ?times.started, listening = ?since, "taking requests");
    open_ports(&sandbox, log);
    tokio::select! {
        () = sandbox.ended() => {}
        _ = terminate.recv() => sandbox.destroy().await,
    }
    server.shutdown().await.map_err(io::Error::other).during(|| "stop the server".into())?;
    tracer.flush().await;
    address.flush().await;
    Ok(())
}

/// The policy that is in force from the start. The default file is that of a guest's image; elsewhere it is somebody else's.
fn first_policy(file: &Path, init: bool) -> Result<Policy> {
    if init || !file.as_os_str().is_empty() { Policy::load(file) } else { Ok(Policy::default()) }
}

/// Opens what the host asked for besides. A port that cannot be opened must not cost the guest its server.
fn open_ports(sandbox: &Arc<Sandbox>, log: Option<Arc<Lines>>) {
    let config = &sandbox.config;
    let opened = [
        log.map(|lines| lines.serve(config.log_port)),
        config.debug_console.then(|| console::open(config.debug_console_port, Arc::clone(&sandbox.reaper))),
        (config.stream_port != 0).then(|| passfd::serve(config.stream_port, Arc::clone(&sandbox.passed))),
    ];
    for failure in opened.into_iter().flatten().filter_map(Result::err) {
        tracing::error!("{failure}");
    }
}

impl Address {
    /// Reads an address.
    pub(crate) fn parse(text: &str) -> Result<Address> {
        let unknown = || {
            Error::Invalid(format!(
                "cannot listen on {text:?}: use vsock://<cid or -1>:<port> or unix://<path>"
            ))
        };
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.is_empty() { Err(unknown()) } else { Ok(Address::Unix(path.to_owned())) };
        }
        let (cid, port) =
            text.strip_prefix("vsock://").and_then(|rest| rest.split_once(':')).ok_or_else(unknown)?;
        let cid = if cid == "-1" { VMADDR_CID_ANY } else { cid.parse().map_err(|_| unknown())? };
        Ok(Address::Vsock { cid, port: port.parse().map_err(|_| unknown())? })
    }

    fn listen(&self) -> Result<Listener> {
        let what = || format!("listen on {self}");
        match self {
            Address::Vsock { cid, port } => {
                let port = HostPort::listen(*cid, *port).during(what)?;
                Ok(Listener::new(futures_util::stream::unfold(port, |port| async {
                    Some((port.accept().await.map(|(connection, _)| connection), port))
                })))
            }
            Address::Unix(path) => {
                if !path.starts_with('@') {
                    remove_stale_socket(Path::new(path)).during(what)?;
                }
                let listener = Listener::bind_unix(path).during(what)?;
                if !path.starts_with('@') {
                    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).during(what)?;
                }
                Ok(listener)
            }
        }
    }

    /// Waits until the host has taken everything that was sent to it. A vsock write only queues; the device takes packets
    /// in order, so once it has answered the request for a further connection, in whatever way, the queue before is empty.
    async fn flush(&self) {
        if let Address::Vsock { .. } = self {
            // It answers with a refusal, and the kernel bounds the wait.
            let _ = VsockStream::connect(VsockAddr::new(ports::HOST_CID, ports::LOG)).await;
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Vsock { cid: VMADDR_CID_ANY, port } => write!(f, "vsock://-1:{port}"),
            Address::Vsock { cid, port } => write!(f, "vsock://{cid}:{port}"),
            Address::Unix(path) => write!(f, "unix://{path}"),
        }
    }
}

/// A socket that an earlier agent left behind keeps a new one from its path; anything else there stays.
fn remove_stale_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        for text in ["vsock://-1:1024", "vsock://3:99", "unix:///run/a.sock", "unix://@abstract"] {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "vsock://1024", "vsock://x:1", "vsock://-1:x", "unix://", "tcp://127.0.0.1:1"] {
            assert!(Address::parse(text).is_err(), "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let address = Address::Unix(path.to_str().unwrap().into());
        drop(address.listen().unwrap());
        assert!(path.exists());
        address.listen().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(Address::Unix(file.to_str().unwrap().into()).listen().is_err());
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }
}
