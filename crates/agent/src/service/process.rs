//! The processes of a container: exec, signals, exits, standard streams.

use std::sync::Arc;

use bulkhead_executor::UserNames;
use bulkhead_protocol::{
    Empty,
    agent::{
        CloseStdinRequest, ExecProcessRequest, ReadStreamRequest, ReadStreamResponse, SignalProcessRequest,
        StringUser, TtyWinResizeRequest, WaitProcessRequest, WaitProcessResponse, WriteStreamRequest,
        WriteStreamResponse,
    },
};

use super::Service;
use crate::{
    container::Found,
    error::{During, Error, Result},
    passfd,
    process::Process,
    sync::to_the_end,
};

/// Runs a further process; answers once its command is being executed.
pub(super) async fn exec(service: &Service, request: ExecProcessRequest) -> Result<Empty> {
    let container = service.sandbox.container(&request.container_id)?;
    let ports = [request.stdin_port, request.stdout_port, request.stderr_port];
    let streams = service.sandbox.passed.take(ports).await?;
    let mut process =
        request.process.into_option().ok_or_else(|| Error::Invalid("the request has no process".into()))?;
    service.sandbox.devices.rewrite(container.id(), &mut process.Env);
    let (reaper, pipe_size) = (Arc::clone(&service.sandbox.reaper), service.sandbox.config.pipe_size);
    let (exec_id, user) = (request.exec_id, user_names(request.string_user.into_option()));
    to_the_end(async move {
        container.exec(&exec_id, process, user, pipe_size, &reaper).await?;
        passfd::attach(streams, &container, &exec_id).await
    })
    .await?;
    Ok(Empty::new())
}

/// The users and groups that a request names.
pub(crate) fn user_names(user: Option<StringUser>) -> UserNames {
    let user = user.unwrap_or_default();
    UserNames { user: user.uid, group: user.gid, additional_groups: user.additionalGids }
}

/// Sends a signal: without an exec id SIGKILL goes to the whole container and everything else to its init.
pub(super) async fn signal(service: &Service, request: SignalProcessRequest) -> Result<Empty> {
    let container = service.sandbox.container(&request.container_id)?;
    let number = || i32::try_from(request.signal).ok().filter(|signal| (1..=64).contains(signal));
    let signal = number().ok_or_else(|| Error::Invalid(format!("{} is not a signal", request.signal)))?;
    if request.exec_id.is_empty() && signal == libc::SIGKILL {
        container.kill_all().await?;
        return Ok(Empty::new());
    }
    container.signal(&request.exec_id, signal)?;
    Ok(Empty::new())
}

/// Waits for an exit. The code stays known until the container is removed.
pub(super) async fn wait(service: &Service, request: WaitProcessRequest) -> Result<WaitProcessResponse> {
    let status = match find(service, &request.container_id, &request.exec_id).await? {
        Found::Live(process) => process.wait().await,
        Found::Exited(code) => code,
    };
    Ok(WaitProcessResponse { status, ..Default::default() })
}

/// Writes all of the data; no data is the end of the input.
pub(super) async fn write_stdin(
    service: &Service,
    request: WriteStreamRequest,
) -> Result<WriteStreamResponse> {
    let what = || format!("write to process {:?} of container {:?}", request.exec_id, request.container_id);
    let Found::Live(process) = find(service, &request.container_id, &request.exec_id).await? else {
        return Err(Error::State(format!("{}: it has exited", what())));
    };
    let exit = process.exit();
    if request.data.is_empty() {
        process.streams.stdin.close(exit).await;
    } else if let Err(error) = process.streams.stdin.write(&request.data, exit).await {
        return match error.kind() {
            std::io::ErrorKind::BrokenPipe => Err(Error::State(format!("{}: {error}", what()))),
            _ => Err(error).during(what),
        };
    }
    // A message is at most 4 MiB.
    let len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
    Ok(WriteStreamResponse { len, ..Default::default() })
}

/// Ends the input; again is no error.
pub(super) async fn close_stdin(service: &Service, request: CloseStdinRequest) -> Result<Empty> {
    if let Found::Live(process) = find(service, &request.container_id, &request.exec_id).await? {
        process.streams.stdin.close(process.exit()).await;
    }
    Ok(Empty::new())
}

/// Reads standard output, or a terminal; no data is its end.
pub(super) async fn read_stdout(service: &Service, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
    read(service, request, |process| &process.streams.stdout).await
}

/// Reads standard error; no data is its end.
pub(super) async fn read_stderr(service: &Service, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
    read(service, request, |process| &process.streams.stderr).await
}

async fn read(
    service: &Service,
    request: ReadStreamRequest,
    stream: impl Fn(&Process) -> &crate::stream::Output + Send,
) -> Result<ReadStreamResponse> {
    if request.len == 0 {
        return Err(Error::Invalid("a read of 0 bytes would look like the end of the stream".into()));
    }
    let container = service.sandbox.container(&request.container_id)?;
    let Found::Live(process) = container.find(&request.exec_id).await? else {
        return Ok(ReadStreamResponse::new());
    };
    let limit = usize::try_from(request.len).unwrap_or(usize::MAX);
    let data = stream(&process).read(limit, process.exit()).await.during(|| {
        format!("read from process {:?} of container {:?}", request.exec_id, request.container_id)
    })?;
    if data.is_empty() {
        container.drained(&request.exec_id);
    }
    Ok(ReadStreamResponse { data, ..Default::default() })
}

/// Sets the size of a terminal.
pub(super) async fn resize(service: &Service, request: TtyWinResizeRequest) -> Result<Empty> {
    let what = || {
        format!(
            "resize the terminal of process {:?} of container {:?}",
            request.exec_id, request.container_id
        )
    };
    let size = |n: u32| u16::try_from(n).map_err(|_| Error::Invalid(format!("{}: {n} is too large", what())));
    let (rows, columns) = (size(request.row)?, size(request.column)?);
    let resized = match find(service, &request.container_id, &request.exec_id).await? {
        Found::Live(process) => process.streams.resize(rows, columns),
        Found::Exited(_) => None,
    };
    resized.ok_or_else(|| Error::State(format!("{}: it has none", what())))?.during(what)?;
    Ok(Empty::new())
}

async fn find(service: &Service, container: &str, exec_id: &str) -> Result<Found> {
    service.sandbox.container(container)?.find(exec_id).await
}
