//! Mount options as fstab and containerd write them, as flags and data of mount(2).

use nix::mount::MsFlags;

use crate::Error;

/// What a list of options asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) flags: MsFlags,
    /// Options of the file system, in their order.
    pub(crate) data: Vec<String>,
}

/// Options that set a flag, and those that clear it.
const FLAGS: [(&str, MsFlags, bool); 29] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("mand", MsFlags::MS_MANDLOCK, true),
    ("nomand", MsFlags::MS_MANDLOCK, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("bind", MsFlags::MS_BIND, true),
    ("rbind", MsFlags::from_bits_retain(libc::MS_BIND | libc::MS_REC), true),
    ("silent", MsFlags::MS_SILENT, true),
    ("loud", MsFlags::MS_SILENT, false),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
    ("nolazytime", MsFlags::MS_LAZYTIME, false),
    ("defaults", MsFlags::empty(), true),
    ("auto", MsFlags::empty(), true),
];

/// Splits options into flags and data. Later options win over earlier ones.
pub(crate) fn parse(options: &[String]) -> Result<Options, Error> {
    let mut parsed = Options { flags: MsFlags::empty(), data: Vec::new() };
    for option in options {
        if let Some((_, flag, set)) = FLAGS.iter().find(|(name, ..)| name == option) {
            parsed.flags.set(*flag, *set);
        } else if option == "loop"
            || option == "remount"
            || option.starts_with("X-")
            || option.starts_with("io.")
        {
            return Err(Error::Unsupported(format!("the mount option {option}")));
        } else if !option.is_empty() {
            parsed.data.push(option.clone());
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(options: &[&str]) -> Result<Options, Error> {
        parse(&options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_told_from_data_and_the_last_one_wins() {
        let none = MsFlags::empty();
        for (options, flags, data) in [
            (&[][..], none, &[][..]),
            (&["ro", "nosuid", "nodev"], MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV, &[]),
            (&["ro", "rw"], none, &[]),
            (&["rbind", "ro"], MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY, &[]),
            (&["lowerdir=/a:/b", "index=off", "defaults"], none, &["lowerdir=/a:/b", "index=off"]),
        ] {
            let parsed = of(options).unwrap();
            assert_eq!(
                (parsed.flags, parsed.data),
                (flags, data.iter().map(|d| (*d).to_owned()).collect()),
                "{options:?}"
            );
        }
    }

    #[test]
    fn what_needs_more_than_mount_is_refused() {
        for option in ["loop", "remount", "X-containerd.mkdir.path=/x", "io.katacontainers.volume=e30="] {
            assert!(matches!(of(&[option]), Err(Error::Unsupported(_))), "{option}");
        }
    }
}
