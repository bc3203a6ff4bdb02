//! The server: task service v2 and v3 on the listener that `start` hands over as standard input, until the last container
//! is gone and containerd says so.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener as StdListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bulkhead_sandbox::Error;
use containerd_shim_protos::shim_async::create_task;
use futures_util::{Stream, stream};
use nix::unistd;
use tokio::{
    net::{UnixListener, UnixStream},
    runtime,
    signal::unix::{SignalKind, signal},
    time,
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{args::Args, events::Events, forward::Forwarder, log, pod::Pod, task_api::TaskService};

/// The generated code knows the service as version 3; version 2 differs in its name alone.
const SERVICES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];
/// The bound on sending the last answers and events.
const FAREWELL: Duration = Duration::from_secs(5);
/// A pause after a failed accept (no descriptors left), which would fail again at once.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

fn failed(what: &str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what: what.to_owned(), source }
}

/// Serves until containerd is done with the pod.
pub(crate) fn run(args: &Args) -> Result<(), Error> {
    let listener = detach(args)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        // Blocking calls are rare and short; an idle thread is memory.
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(1))
        .thread_stack_size(256 << 10)
        .build()
        .map_err(failed("start the server"))?;
    let outcome = runtime.block_on(serve(args, listener));
    // A blocking call that hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// Leaves the session of the helper that started this process, takes the listener from standard input, and turns the
/// standard streams to the log: a panic's text must not be lost.
fn detach(args: &Args) -> Result<StdListener, Error> {
    // Fails only for the leader of a group, which has a session of its own choosing.
    let _ = unistd::setsid();
    let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(failed("take the listener"))?;
    let listener = StdListener::from(stdin);
    listener
        .local_addr()
        .map_err(failed("standard input is not a listening socket; this program is started by containerd"))?;
    let null = std::fs::File::open("/dev/null").map_err(failed("open /dev/null"))?;
    unistd::dup2_stdin(&null).map_err(|errno| failed("redirect standard input")(errno.into()))?;
    if let Ok(fifo) = log::open(args.bundle.as_deref().unwrap_or(Path::new("."))) {
        let redirected = unistd::dup2_stdout(&fifo).and_then(|()| unistd::dup2_stderr(&fifo));
        redirected.map_err(|errno| failed("redirect output to the log")(errno.into()))?;
        log::init(fifo, args.debug);
    }
    Ok(listener)
}

async fn serve(args: &Args, listener: StdListener) -> Result<(), Error> {
    ignore_termination()?;
    let (events, items) = Events::queue(&args.namespace);
    let containerd = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    tokio::spawn(Forwarder::new(&containerd).run(items));
    let pod = Pod::new(socket_path(&listener)?, events.clone());

    let mut server = Server::new().add_listener(Listener::new(same_user(listener)?));
    let service = Arc::new(TaskService::new(pod.clone()));
    for name in SERVICES {
        let methods = create_task(service.clone()).into_values().map(|service| (name.to_owned(), service));
        server = server.register_service(methods.collect());
    }
    server.start().await.map_err(|error| failed("serve")(io::Error::other(error)))?;
    tracing::info!(id = args.id, namespace = args.namespace, "serving");

    pod.quit().await;
    pod.close().await;
    let _ = time::timeout(FAREWELL, events.flush()).await;
    // Writes the answers that are under way, the one to Shutdown among them.
    let _ = time::timeout(FAREWELL, server.shutdown()).await;
    tracing::info!(id = args.id, "done");
    Ok(())
}

/// When the host goes down, everything is sent SIGTERM, and what it would end is still needed to stop the pod in order.
/// Caught and not ignored, since an ignored signal would be ignored by the VMM too.
fn ignore_termination() -> Result<(), Error> {
    for (kind, name) in [(SignalKind::terminate(), "SIGTERM"), (SignalKind::interrupt(), "SIGINT")] {
        let mut signals = signal(kind).map_err(failed("catch signals"))?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                tracing::info!(name, "ignored: the pod ends when containerd ends it");
            }
        });
    }
    Ok(())
}

fn socket_path(listener: &StdListener) -> Result<PathBuf, Error> {
    let address = listener.local_addr().map_err(failed("ask for the socket's path"))?;
    Ok(address.as_pathname().unwrap_or(Path::new("")).to_owned())
}

/// Connections by processes of this user; whoever is somebody else is turned away.
fn same_user(
    listener: StdListener,
) -> Result<impl Stream<Item = io::Result<UnixStream>> + Send + 'static, Error> {
    listener.set_nonblocking(true).map_err(failed("prepare the listener"))?;
    let listener = UnixListener::from_std(listener).map_err(failed("prepare the listener"))?;
    Ok(stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == unistd::geteuid().as_raw() => {
                        return Some((Ok(stream), listener));
                    }
                    Ok(peer) => tracing::warn!(uid = peer.uid(), "connection of another user refused"),
                    Err(error) => tracing::warn!(%error, "connection of an unknown user refused"),
                },
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }))
}

/// The listener as the standard input of the server to be.
pub(crate) fn hand_over(listener: StdListener) -> std::process::Stdio {
    OwnedFd::from(listener).into()
}
