//! The guest's pool of huge pages: each user adds what it needs and gives it back.

use std::{path::Path, sync::Mutex};

use super::Undo;
use crate::{
    error::{During, Error, Result},
    sync::lock,
};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The kernel takes an absolute number, so a change is a look and a write.
static CHANGING: Mutex<()> = Mutex::new(());

/// Huge pages of one size, so many as are needed.
#[derive(Debug, PartialEq)]
pub(super) struct Need {
    /// Bytes of a page.
    pub(super) page: u64,
    /// Bytes altogether.
    pub(super) size: u64,
}

impl Need {
    /// Reads the values of `pagesize=` and `size=`: bytes, or with a unit K, M or G.
    pub(super) fn parse(page: Option<String>, size: Option<String>) -> Result<Need> {
        let (Some(page), Some(size)) = (page, size) else {
            return Err(Error::Invalid(
                "hugetlbfs needs the options pagesize=<bytes> and size=<bytes>".into(),
            ));
        };
        let need = Need { page: bytes(&page)?, size: bytes(&size)? };
        if need.page < 1024 || need.size == 0 {
            return Err(Error::Invalid(format!("pagesize={page} and size={size} are no huge pages")));
        }
        Ok(need)
    }

    fn pages(&self) -> u64 {
        self.size.div_ceil(self.page)
    }

    /// Enlarges the guest's pool; says how to undo it. Blocks.
    pub(super) fn reserve(&self) -> Result<Undo> {
        self.reserve_in(Path::new(POOLS))
    }

    fn reserve_in(&self, pools: &Path) -> Result<Undo> {
        let pool = pools.join(format!("hugepages-{}kB/nr_hugepages", self.page / 1024));
        if !pool.exists() {
            return Err(Error::Invalid(format!("the guest has no huge pages of {} bytes", self.page)));
        }
        let _changing = lock(&CHANGING);
        let before = read(&pool)?;
        let wanted = before.saturating_add(self.pages());
        write(&pool, wanted)?;
        let there = read(&pool)?;
        if there < wanted {
            write(&pool, before)?;
            return Err(Error::State(format!(
                "the guest has memory for {} more huge pages of {} bytes, and {} are asked for",
                there.saturating_sub(before),
                self.page,
                self.pages()
            )));
        }
        Ok(Undo::GiveBackPages { pool, pages: self.pages() })
    }
}

/// Makes a pool smaller again. Pages still in use stay until their last user ends.
pub(super) fn give_back(pool: &Path, pages: u64) -> Result<()> {
    let _changing = lock(&CHANGING);
    write(pool, read(pool)?.saturating_sub(pages))
}

fn bytes(text: &str) -> Result<u64> {
    let (digits, shift) = match text.trim_end_matches(['b', 'B', 'i']) {
        text if text.ends_with(['k', 'K']) => (text.trim_end_matches(['k', 'K']), 10),
        text if text.ends_with(['m', 'M']) => (text.trim_end_matches(['m', 'M']), 20),
        text if text.ends_with(['g', 'G']) => (text.trim_end_matches(['g', 'G']), 30),
        text => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| Error::Invalid(format!("{text:?} is no number of bytes")))
}

fn read(pool: &Path) -> Result<u64> {
    let what = || format!("read {}", pool.display());
    std::fs::read_to_string(pool).during(what)?.trim().parse().map_err(std::io::Error::other).during(what)
}

fn write(pool: &Path, pages: u64) -> Result<()> {
    std::fs::write(pool, pages.to_string()).during(|| format!("write {pages} to {}", pool.display()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn pool(pages: u64) -> (tempfile::TempDir, PathBuf) {
        let pools = tempfile::tempdir().unwrap();
        let pool = pools.path().join("hugepages-2048kB");
        std::fs::create_dir(&pool).unwrap();
        std::fs::write(pool.join("nr_hugepages"), format!("{pages}\n")).unwrap();
        (pools, pool.join("nr_hugepages"))
    }

    #[test]
    fn sizes_are_read_with_and_without_units() {
        let need = |page: &str, size: &str| Need::parse(Some(page.into()), Some(size.into()));
        assert_eq!(need("2097152", "4194304").unwrap(), Need { page: 2 << 20, size: 4 << 20 });
        assert_eq!(need("2Mi", "1G").unwrap(), Need { page: 2 << 20, size: 1 << 30 });
        assert_eq!(need("2MB", "3M").unwrap().pages(), 2);
        for (page, size) in [("0", "1"), ("x", "1"), ("2M", "0"), ("2M", "-1"), ("2M", "99999999999G")] {
            assert!(matches!(need(page, size).unwrap_err(), Error::Invalid(_)), "{page} {size}");
        }
        assert!(Need::parse(None, Some("1".into())).is_err());
    }

    #[test]
    fn two_users_add_up_and_give_back() {
        let (pools, pool) = pool(5);
        let first = Need { page: 2 << 20, size: 8 << 20 }.reserve_in(pools.path()).unwrap();
        let second = Need { page: 2 << 20, size: 2 << 20 }.reserve_in(pools.path()).unwrap();
        assert_eq!(read(&pool).unwrap(), 10);
        first.run().unwrap();
        assert_eq!(read(&pool).unwrap(), 6);
        second.run().unwrap();
        assert_eq!(read(&pool).unwrap(), 5);
        let unknown = Need { page: 1 << 30, size: 1 << 30 }.reserve_in(pools.path());
        assert!(matches!(unknown.unwrap_err(), Error::Invalid(_)));
    }

    #[test]
    fn users_at_once_do_not_overwrite_each_other() {
        let (pools, pool) = pool(0);
        let pools = std::sync::Arc::new(pools);
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let pools = std::sync::Arc::clone(&pools);
                std::thread::spawn(move || {
                    for _ in 0..50 {
                        let need = Need { page: 2 << 20, size: 6 << 20 };
                        let kept = need.reserve_in(pools.path()).unwrap();
                        let given = need.reserve_in(pools.path()).unwrap();
                        given.run().unwrap();
                        drop(kept);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(read(&pool).unwrap(), 8 * 50 * 3);
    }
}
