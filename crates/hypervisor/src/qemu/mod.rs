//! A virtual machine under QEMU.
//!
//! The order of a boot: claim vsock and start the backends, start QEMU with everything in its descriptors, talk to it over
//! QMP until it says that the guest runs. QEMU itself runs as a user without rights, see [`Identity`](crate::identity::Identity).

mod cmdline;
mod launch;
mod qmp;
mod vhost;

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use serde_json::Value;

pub(crate) use launch::{Probe, find_program, probe};

use crate::{
    Accel, Device, Endpoint, Error, Vm, VmConfig, VmExit, accel, backend,
    machine::{Crew, Machine},
    workdir::Workdir,
};
use cmdline::{Devices, Vsock};
use launch::Files;
use qmp::Qmp;

/// What QEMU may take, under KVM, to set up its machine or to answer a command.
const ANSWER: Duration = Duration::from_secs(10);

/// A running QEMU.
struct Qemu {
    accel: Accel,
    endpoint: Endpoint,
    qmp: Qmp,
    machine: Machine,
}

/// Boots; see [`crate::boot`].
pub(crate) async fn boot(config: &VmConfig) -> Result<Box<dyn Vm>, Error> {
    if config.vcpus == 0 || config.memory_mib == 0 {
        return Err(Error::Invalid("a VM needs at least one virtual CPU and some memory".to_owned()));
    }
    let files = Files::open(&config.vmm, &config.kernel, &config.initramfs)?;
    let accel = accel::resolve_accel(&config.into()).await?.accel;
    let mut crew = Crew::new(Workdir::create(&config.dir)?);
    let (vsock, endpoint) = open_vsock(&mut crew, config).await?;
    let fs = match &config.share {
        Some(share) => Some((backend::start_fs(&mut crew, &config.backend, share).await?, share)),
        None => None,
    };
    let qmp = crew.dir().listen("qmp.sock")?;
    let devices = Devices {
        qmp: Some(qmp.as_raw_fd()),
        vsock: Some(vsock.number()),
        fs: fs.as_ref().map(|(fd, share)| (fd.as_raw_fd(), share.tag.as_str())),
    };
    let append = cmdline::append(accel, &config.kernel_params);
    let mut program = files.program(config, accel, &append, &devices)?;
    program.inherit.extend([qmp.into(), vsock.into_fd()].into_iter().chain(fs.map(|(fd, _)| fd)));
    if let Some(netns) = &config.netns {
        program.namespaces.push(crate::netns(netns)?);
    }
    let qmp_path = crew.dir().join("qmp.sock");
    let machine = crew.man("QEMU", program.spawn().await?)?;
    let bound = accel.scale(ANSWER);
    let tail = machine.tail().clone();
    let started = machine.unless_gone("starting QEMU", bound, async {
        let qmp = Qmp::connect(&qmp_path, bound, move |event, data| {
            tail.push(format!("QEMU: {event} {data}"));
        });
        let qmp = qmp.await?;
        let expected = if config.paused { "prelaunch" } else { "running" };
        match qmp.execute("query-status", Value::Null).await?["status"].as_str() {
            Some(status) if status == expected => Ok(qmp),
            status => Err(Error::Qmp {
                command: "query-status".to_owned(),
                reason: format!("the guest is {}, not {expected}", status.unwrap_or("nowhere")),
            }),
        }
    });
    let qmp = started.await?;
    Ok(Box::new(Qemu { accel, endpoint, qmp, machine }))
}

/// The kernel's vsock where the host has it, else a backend's.
async fn open_vsock(crew: &mut Crew, config: &VmConfig) -> Result<(VsockFd, Endpoint), Error> {
    match vhost::claim() {
        Ok((vhost, cid)) => Ok((VsockFd::Kernel(vhost, cid), Endpoint::Vsock { cid })),
        Err(error) => {
            tracing::debug!(%error, "no vhost-vsock on this host: a backend process serves vsock");
            let (socket, endpoint) = backend::start_vsock(crew, &config.backend).await?;
            Ok((VsockFd::Backend(socket), endpoint))
        }
    }
}

/// The descriptor behind [`Vsock`].
enum VsockFd {
    Kernel(OwnedFd, u32),
    Backend(OwnedFd),
}

impl VsockFd {
    fn number(&self) -> Vsock {
        match self {
            VsockFd::Kernel(vhost, cid) => Vsock::Kernel { vhost: vhost.as_raw_fd(), cid: *cid },
            VsockFd::Backend(socket) => Vsock::Backend { socket: socket.as_raw_fd() },
        }
    }

    fn into_fd(self) -> OwnedFd {
        match self {
            VsockFd::Kernel(fd, _) | VsockFd::Backend(fd) => fd,
        }
    }
}

impl Qemu {
    async fn command(&self, command: &str) -> Result<(), Error> {
        self.qmp.execute(command, Value::Null).await.map(drop)
    }
}

#[async_trait::async_trait]
impl Vm for Qemu {
    fn accel(&self) -> Accel {
        self.accel
    }

    fn pid(&self) -> u32 {
        self.machine.pid()
    }

    fn helper_pids(&self) -> Vec<u32> {
        self.machine.helper_pids()
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn last_words(&self) -> String {
        self.machine.tail().text()
    }

    async fn attach(&self, device: Device) -> Result<String, Error> {
        // A PCIe machine takes new devices on root ports only, and has none: each would cost boot time.
        let Device::Block { .. } = device;
        Err(Error::Unsupported { operation: "plugging a disk into a running VM", backend: "QEMU" })
    }

    async fn pause(&self) -> Result<(), Error> {
        self.command("stop").await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.command("cont").await
    }

    async fn wait(&self) -> VmExit {
        self.machine.wait().await
    }

    async fn stop(&self, grace: Duration) -> Result<VmExit, Error> {
        let quit = async {
            if let Err(error) = self.command("quit").await {
                tracing::debug!(%error, "QEMU was asked to quit");
            }
        };
        Ok(self.machine.stop(grace, quit).await)
    }
}
