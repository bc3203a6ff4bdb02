//! The kernel's vsock device for guests, where the host has it.

use std::{
    fs::OpenOptions,
    hash::{BuildHasher, RandomState},
    io,
    os::fd::OwnedFd,
};

use crate::sys;

/// How many context ids are tried before the kernel's vsock counts as unusable.
const ATTEMPTS: u32 = 64;
/// 0 to 2 have a meaning of their own.
const FIRST_CID: u32 = 3;

/// Opens the device and claims a context id nobody else on this host has; the id is ours as long as the file is open.
/// An error means that this host cannot do it.
pub(super) fn claim() -> io::Result<(OwnedFd, u32)> {
    let vhost = OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/vhost-vsock")?);
    let cid = first_free(u64_random(), |cid| sys::set_guest_cid(&vhost, cid))?;
    Ok((vhost, cid))
}

/// Tries ids from a random one up, so that two VMs that start together seldom meet.
fn first_free(random: u64, mut claim: impl FnMut(u32) -> io::Result<()>) -> io::Result<u32> {
    let range = u64::from(u32::MAX - FIRST_CID);
    for attempt in 0..u64::from(ATTEMPTS) {
        let offset = u32::try_from((random + attempt) % range).map_err(io::Error::other)?;
        let cid = FIRST_CID + offset;
        match claim(cid) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {}
            done => return done.map(|()| cid),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EADDRINUSE))
}

fn u64_random() -> u64 {
    RandomState::new().hash_one(std::process::id()) >> 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_ids_are_skipped_and_other_failures_end_it() {
        let in_use = || Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
        assert_eq!(first_free(0, |cid| if cid < 6 { in_use() } else { Ok(()) }).unwrap(), 6);
        let denied = first_free(0, |_| Err(io::Error::from_raw_os_error(libc::EPERM)));
        assert_eq!(denied.unwrap_err().raw_os_error(), Some(libc::EPERM));
        let mut tried = 0;
        let full = first_free(7, |_| {
            tried += 1;
            in_use()
        });
        assert_eq!((full.unwrap_err().raw_os_error(), tried), (Some(libc::EADDRINUSE), ATTEMPTS));
    }

    #[test]
    fn ids_stay_in_range() {
        for random in [0, u64::from(u32::MAX) - 4, u64::MAX >> 1] {
            let cid = first_free(random, |_| Ok(())).unwrap();
            assert!((FIRST_CID..u32::MAX).contains(&cid), "{cid}");
        }
    }
}
