//! What a VM is made from: a plain value.

use std::path::PathBuf;

use crate::AccelPolicy;

/// A host directory shown to the guest.
#[derive(Clone, Debug)]
pub struct Share {
    /// The virtio-fs tag.
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
}

/// Which kind of VM.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A virtual machine under QEMU.
    Qemu,
    /// No VM: a plain process that listens on `<dir>/agent.sock`, in a mount namespace of its own in which the shared
    /// directory is bound at `share_at`. The test double; it isolates nothing.
    Local {
        /// The program.
        program: PathBuf,
        /// Its arguments.
        args: Vec<String>,
        /// Where it sees the shared directory.
        share_at: PathBuf,
    },
}

/// What a VM is made from.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Which kind of VM.
    pub kind: Kind,
    /// The sandbox' id; names the process.
    pub id: String,
    /// A directory of this VM alone (mode 0700), made by `boot` and removed with the VM: sockets, logs. At most 80 bytes,
    /// because of the limit on socket paths.
    pub dir: PathBuf,
    /// The VMM (`qemu-system-x86_64`).
    pub vmm: PathBuf,
    /// The program that serves vhost-user devices (`bulkhead-backend`).
    pub backend: PathBuf,
    /// The guest kernel (bzImage or vmlinux).
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// Kernel command line parameters after the hypervisor's own.
    pub kernel_params: Vec<String>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// KVM, TCG, or whichever works.
    pub accel: AccelPolicy,
    /// Machine type, `q35` by default.
    pub machine: String,
    /// A directory to share by virtio-fs.
    pub share: Option<Share>,
    /// Where the outcome of the KVM probe is remembered (`/var/cache/bulkhead` by default).
    pub cache_dir: PathBuf,
    /// The virtual CPUs stand still until `Vm::resume`.
    pub paused: bool,
    /// A network namespace the VMM is started in (path), or the caller's.
    pub netns: Option<PathBuf>,
}
