//! `start`: the address of the server for a container. A member of a pod gets the server of its sandbox; for every other
//! container a server is made: this program again, with the listener as its standard input.
//!
//! containerd takes everything this prints, on either stream, for the address: nothing else may be printed.

use std::{
    io::{IsTerminal, Read},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bulkhead_sandbox::{Error, enter_private_mount_namespace};

use crate::{
    annotations::{Role, role},
    args::Args,
    bootstrap::Bootstrap,
    bundle, error, server,
    socket::{self, Bound},
};

/// More than any containerd sends.
const INPUT_LIMIT: u64 = 4 << 20;

/// Makes or finds the server; returns what is to be printed.
pub(crate) fn run(args: &Args) -> Result<Vec<u8>, Error> {
    if args.address.is_empty() {
        return Err(Error::Invalid("-address is required".to_owned()));
    }
    let bootstrap = Bootstrap::read(&input()?, &args.id, &args.namespace);
    let bundle = args.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let role = role(&bundle::annotations(&bundle)?).map_err(|error| Error::Invalid(error.to_string()))?;
    let directory = bootstrap.socket_directory.as_deref().unwrap_or(Path::new(socket::DIRECTORY));
    let group = group(&role, &args.id);
    let path = socket::path(directory, &args.address, &args.namespace, group);
    let address = socket::address(&path);

    if let Role::Member { sandbox } = &role {
        if !socket::is_alive(&path) {
            let text = format!(
                "container {} belongs to the pod {sandbox}, whose shim does not listen on {address}",
                args.id
            );
            return Err(Error::WrongState(text));
        }
        bundle::write(&bundle, bundle::ADDRESS, &address)?;
        return Ok(bootstrap.answer(&address));
    }
    match socket::listen(&path).map_err(|source| error::io("listen on", &path, source))? {
        Bound::Alive => bundle::write(&bundle, bundle::ADDRESS, &address)?,
        Bound::New(listener) => {
            if let Err(error) = launch(args, &bootstrap, &bundle, &address, listener) {
                let _ = socket::remove(&path);
                return Err(error);
            }
        }
    }
    Ok(bootstrap.answer(&address))
}

/// The containers with one server between them.
pub(crate) fn group<'a>(role: &'a Role, id: &'a str) -> &'a str {
    match role {
        Role::Member { sandbox } => sandbox,
        Role::Single | Role::Sandbox => id,
    }
}

/// Standard input, if containerd sent something and nobody sits in front of it.
fn input() -> Result<Vec<u8>, Error> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let read = stdin.lock().take(INPUT_LIMIT).read_to_end(&mut input);
        read.map_err(|source| Error::Io { what: "read standard input".to_owned(), source })?;
    }
    Ok(input)
}

fn launch(
    args: &Args,
    bootstrap: &Bootstrap,
    bundle: &Path,
    address: &str,
    listener: UnixListener,
) -> Result<(), Error> {
    // Here and not in the server, so that a failure reaches containerd as the outcome of `start`.
    enter_private_mount_namespace()?;
    let program = std::env::current_exe()
        .map_err(|source| Error::Io { what: "find the path of this program".to_owned(), source })?;
    let mut command = Command::new(&program);
    command
        .args([
            "-namespace",
            &args.namespace,
            "-address",
            &args.address,
            "-publish-binary",
            &args.publish_binary,
        ])
        .args(["-id", &args.id])
        .current_dir(bundle)
        .stdin(server::hand_over(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if args.debug || bootstrap.debug {
        command.arg("-debug");
    }
    if let Some(ttrpc) = &bootstrap.ttrpc_address {
        command.env("TTRPC_ADDRESS", ttrpc);
    }
    bundle::write(bundle, bundle::ADDRESS, address)?;
    let mut child = command.spawn().map_err(|source| error::io("start", &program, source))?;
    bundle::write(bundle, bundle::PID, &child.id().to_string()).inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
    })
}
