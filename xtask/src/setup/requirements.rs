//! What building and testing takes, and the Debian package that has it.

use std::fs;
use std::path::Path;

use bulkhead_image::elf::Elf;

use crate::process;

/// Something that has to be there.
pub(super) struct Requirement {
    /// The Debian package that has it.
    pub(super) package: &'static str,
    need: Need,
}

enum Need {
    /// A program on the `PATH`.
    Program(&'static str),
    /// A program on the `PATH` that is linked statically, so that it runs in any root.
    StaticProgram(&'static str),
    /// A file in any of these places.
    File(&'static [&'static str]),
}

/// Everything that has to be there.
const ALL: &[Requirement] = &[
    Requirement { package: "qemu-system-x86", need: Need::Program("qemu-system-x86_64") },
    Requirement { package: "busybox-static", need: Need::StaticProgram("busybox") },
    Requirement { package: "containerd", need: Need::Program("containerd") },
    Requirement { package: "runc", need: Need::Program("runc") },
    Requirement { package: "kmod", need: Need::Program("depmod") },
    Requirement { package: "erofs-utils", need: Need::Program("mkfs.erofs") },
    Requirement { package: "e2fsprogs", need: Need::Program("mkfs.ext4") },
    Requirement { package: "iproute2", need: Need::Program("ip") },
    // For the build: a linker, glibc's libc.a for the agent, libcap-ng for virtiofsd, protoc for the CRI client of the tests.
    Requirement { package: "gcc", need: Need::Program("cc") },
    Requirement {
        package: "libc6-dev",
        need: Need::File(&["/usr/lib/x86_64-linux-gnu/libc.a", "/usr/lib64/libc.a", "/usr/lib/libc.a"]),
    },
    Requirement { package: "libcap-ng-dev", need: Need::File(&["/usr/include/cap-ng.h"]) },
    Requirement { package: "protobuf-compiler", need: Need::Program("protoc") },
];

impl Requirement {
    /// How a person would call it.
    pub(super) fn what(&self) -> &'static str {
        match self.need {
            Need::Program(name) | Need::StaticProgram(name) => name,
            Need::File(places) => places[0],
        }
    }

    fn is_met(&self) -> bool {
        match self.need {
            Need::Program(name) => process::find(name).is_some(),
            Need::StaticProgram(name) => process::find(name).is_some_and(|path| is_static(&path)),
            Need::File(places) => places.iter().any(|path| Path::new(path).exists()),
        }
    }
}

/// What is not there.
pub(super) fn missing() -> Vec<&'static Requirement> {
    ALL.iter().filter(|requirement| !requirement.is_met()).collect()
}

fn is_static(program: &Path) -> bool {
    fs::read(program).is_ok_and(|data| Elf::parse(&data).is_some_and(|elf| !elf.needs_interpreter()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_and_what_is_not() {
        let met = |need| Requirement { package: "p", need }.is_met();
        assert!(met(Need::Program("sh")));
        assert!(!met(Need::Program("no-such-program")));
        assert!(met(Need::File(&["/nonexistent", "/proc/self/status"])));
        assert!(!met(Need::File(&["/nonexistent"])));
        assert!(!met(Need::StaticProgram("cargo")), "cargo is linked dynamically");
    }
}
