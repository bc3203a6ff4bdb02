//! QEMU's command line: a pure function of what the VM shall be. Fit for QEMU 7.2 and newer.
//!
//! Files and sockets are passed as descriptors, because the VMM runs as a user who may open none of them.

use std::os::fd::RawFd;

use crate::Accel;

/// The machine.
pub(super) struct Guest<'a> {
    /// Names the process.
    pub id: &'a str,
    /// Machine type, with options if somebody wants them.
    pub machine: &'a str,
    /// What executes it.
    pub accel: Accel,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's file.
    pub kernel: RawFd,
    /// The initramfs' file.
    pub initramfs: RawFd,
    /// The kernel's command line.
    pub append: &'a str,
    /// The virtual CPUs wait for `cont`.
    pub paused: bool,
}

/// What is plugged into it.
#[derive(Default)]
pub(super) struct Devices<'a> {
    /// A listening socket for QMP.
    pub qmp: Option<RawFd>,
    /// The way to the guest's ports.
    pub vsock: Option<Vsock>,
    /// A connection to the file system's backend, and the tag.
    pub fs: Option<(RawFd, &'a str)>,
}

/// Who moves the bytes of vsock.
#[derive(Clone, Copy)]
pub(super) enum Vsock {
    /// The host's kernel.
    Kernel {
        /// `/dev/vhost-vsock`, with the context id claimed.
        vhost: RawFd,
        /// The guest's context id.
        cid: u32,
    },
    /// A backend process.
    Backend {
        /// The connection to it.
        socket: RawFd,
    },
}

/// All arguments after the program's name.
pub(super) fn arguments(guest: &Guest, devices: &Devices) -> Vec<String> {
    let mut args = Vec::new();
    let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
    option("-name", format!("sandbox-{}", escaped(guest.id)));
    option("-machine", machine(guest));
    // Shared, so that the backends can map it too.
    option("-object", format!("memory-backend-memfd,id=mem,size={}M,share=on", guest.memory_mib));
    option("-m", format!("{}M", guest.memory_mib));
    option("-cpu", cpu(guest.accel).to_owned());
    option("-smp", guest.vcpus.to_string());
    option("-display", "none".to_owned());
    option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
    option("-chardev", "stdio,id=console,signal=off".to_owned());
    option("-serial", "chardev:console".to_owned());
    option("-kernel", format!("/dev/fd/{}", guest.kernel));
    option("-initrd", format!("/dev/fd/{}", guest.initramfs));
    option("-append", guest.append.to_owned());
    if let Some(fd) = devices.qmp {
        option("-chardev", format!("socket,id=qmp,fd={fd},server=on,wait=off"));
        option("-mon", "chardev=qmp,mode=control".to_owned());
    }
    option("-device", "virtio-rng-pci".to_owned());
    option("-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on".to_owned());
    match devices.vsock {
        Some(Vsock::Kernel { vhost, cid }) => {
            option("-device", format!("vhost-vsock-pci,vhostfd={vhost},guest-cid={cid}"));
        }
        Some(Vsock::Backend { socket }) => {
            option("-chardev", format!("socket,id=vsock,fd={socket}"));
            option("-device", "vhost-user-vsock-pci,chardev=vsock".to_owned());
        }
        None => {}
    }
    if let Some((fd, tag)) = devices.fs {
        option("-chardev", format!("socket,id=fs,fd={fd}"));
        option("-device", format!("vhost-user-fs-pci,chardev=fs,tag={},queue-size=1024", escaped(tag)));
    }
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    if guest.paused {
        args.push("-S".to_owned());
    }
    args
}

/// The kernel's command line: what makes it boot fastest, then what the caller wants, which wins.
pub(super) fn append(accel: Accel, params: &[String]) -> String {
    let mut append = vec![
        // Errors and the agent's own words go to the console. A panic reboots at once, by the keyboard controller, and
        // "reboot" means the end of the VMM (-no-reboot).
        "console=ttyS0 quiet panic=-1 reboot=k",
        // No checks of timers and no probing for hardware that no machine of ours has.
        "tsc=reliable no_timer_check noreplace-smp i8042.noaux i8042.nopnp 8250.nr_uarts=1 pci=lastbus=0",
        "rcupdate.rcu_expedited=1 random.trust_cpu=on cryptomgr.notests net.ifnames=0",
    ];
    if accel == Accel::Tcg {
        // The guest's instructions are not the CPU's: these protect nothing there and cost a tenth of the boot.
        append.push("mitigations=off");
    }
    append.extend(params.iter().map(String::as_str));
    append.join(" ")
}

fn machine(guest: &Guest) -> String {
    let accel = match guest.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    };
    // Controllers that nothing of ours is plugged into are so much less for a guest to attack.
    let without = if guest.machine == "q35" { ",smm=off,vmport=off,usb=off,sata=off,smbus=off" } else { "" };
    format!("{},accel={accel},memory-backend=mem{without}", guest.machine)
}

fn cpu(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "host",
        // Images may be built for x86-64-v3. A lesser model boots hardly faster.
        Accel::Tcg => "max",
    }
}

/// A comma ends a value in QEMU's options; doubled it stands for itself.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(accel: Accel) -> Guest<'static> {
        Guest {
            id: "a,b",
            machine: "q35",
            accel,
            vcpus: 2,
            memory_mib: 512,
            kernel: 10,
            initramfs: 11,
            append: "quiet",
            paused: false,
        }
    }

    /// Whether the option occurs with the value.
    fn has(args: &[String], option: &str, value: &str) -> bool {
        args.windows(2).any(|pair| pair == [option, value])
    }

    #[test]
    fn the_machine_is_what_was_asked_for() {
        let args = arguments(&guest(Accel::Tcg), &Devices::default());
        for (option, value) in [
            ("-name", "sandbox-a,,b"),
            ("-machine", "q35,accel=tcg,memory-backend=mem,smm=off,vmport=off,usb=off,sata=off,smbus=off"),
            ("-object", "memory-backend-memfd,id=mem,size=512M,share=on"),
            ("-m", "512M"),
            ("-cpu", "max"),
            ("-smp", "2"),
            ("-kernel", "/dev/fd/10"),
            ("-initrd", "/dev/fd/11"),
            ("-append", "quiet"),
            ("-serial", "chardev:console"),
        ] {
            assert!(has(&args, option, value), "{option} {value} in {args:?}");
        }
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(args.iter().any(|arg| arg == flag), "{flag}");
        }
        assert!(!args.iter().any(|arg| arg.contains("qmp") || arg.contains("vhost")), "{args:?}");
    }

    #[test]
    fn kvm_and_other_machines() {
        let kvm = Guest { machine: "microvm,pcie=on", ..guest(Accel::Kvm) };
        let args = arguments(&kvm, &Devices::default());
        assert!(has(&args, "-machine", "microvm,pcie=on,accel=kvm,memory-backend=mem"), "{args:?}");
        assert!(has(&args, "-cpu", "host"));
    }

    #[test]
    fn a_paused_guest_is_told_so() {
        let stands = |paused| {
            let guest = Guest { paused, ..guest(Accel::Tcg) };
            arguments(&guest, &Devices::default()).iter().any(|arg| arg == "-S")
        };
        assert!(stands(true) && !stands(false));
    }

    #[test]
    fn devices_table() {
        let vsock = |vsock| Devices { vsock: Some(vsock), ..Devices::default() };
        let table = [
            (
                Devices { qmp: Some(5), ..Devices::default() },
                ["-chardev", "socket,id=qmp,fd=5,server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
                    .as_slice(),
            ),
            (
                vsock(Vsock::Kernel { vhost: 7, cid: 99 }),
                &["-device", "vhost-vsock-pci,vhostfd=7,guest-cid=99"],
            ),
            (
                vsock(Vsock::Backend { socket: 8 }),
                &["-chardev", "socket,id=vsock,fd=8", "-device", "vhost-user-vsock-pci,chardev=vsock"],
            ),
            (
                Devices { fs: Some((9, "share")), ..Devices::default() },
                &[
                    "-chardev",
                    "socket,id=fs,fd=9",
                    "-device",
                    "vhost-user-fs-pci,chardev=fs,tag=share,queue-size=1024",
                ],
            ),
        ];
        for (devices, expected) in table {
            let args = arguments(&guest(Accel::Tcg), &devices);
            assert!(
                args.windows(expected.len()).any(|window| window == expected),
                "{expected:?} in {args:?}"
            );
        }
    }

    #[test]
    fn mitigations_go_only_where_they_protect_nothing_and_the_callers_words_come_last() {
        let params = ["quiet".to_owned(), "agent.log=debug".to_owned()];
        let tcg = append(Accel::Tcg, &params);
        assert!(tcg.contains(" mitigations=off ") && tcg.ends_with(" quiet agent.log=debug"), "{tcg}");
        assert!(!append(Accel::Kvm, &params).contains("mitigations"));
        assert!(tcg.starts_with("console=ttyS0 "), "{tcg}");
    }
}
