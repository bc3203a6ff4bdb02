//! `-u` and an image's `User`: names and numbers, looked up in the container's own `/etc/passwd` and `/etc/group`.
//!
//! A number needs no entry; a name does. Without a group the user's own one and the groups that list the user apply.

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::inroot::Root;

/// Larger than any real account file.
const MAX_FILE: u64 = 4 << 20;

/// Whom a container's process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Home directory, for `$HOME`.
    pub(crate) home: String,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Resolves `USER[:GROUP]`; the empty text is root.
pub(crate) fn resolve(root: &Root, text: &str) -> Result<User> {
    let read = |path: &str| -> Result<String> {
        let bytes = root.read(path, MAX_FILE).with_context(|| format!("{path} of the container"))?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    lookup(text, &read("/etc/passwd")?, &read("/etc/group")?).with_context(|| format!("user {text:?}"))
}

fn lookup(text: &str, passwd: &str, group: &str) -> Result<User> {
    let (user, wanted) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = id(user)?;
    let account = accounts(passwd).find(|account| account.name == user || Some(account.uid) == number);
    let uid = match (&account, number) {
        (Some(account), _) => account.uid,
        (None, Some(uid)) => uid,
        (None, None) => {
            bail!("no such name in the container's /etc/passwd; use a numeric id, or one of its names")
        }
    };
    let home = account.as_ref().map_or("", |account| account.home);
    let home = if home.is_empty() { "/" } else { home }.to_owned();
    if let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty()) {
        let number = id(wanted)?;
        let named = groups(group).find(|group| group.name == wanted).map(|group| group.gid);
        let gid =
            named.or(number).ok_or_else(|| anyhow!("no group {wanted:?} in the container's /etc/group"))?;
        return Ok(User { uid, gid, groups: Vec::new(), home });
    }
    let gid = account.as_ref().map_or(0, |account| account.gid);
    let name = account.as_ref().map(|account| account.name);
    let lists =
        |group: &Group<'_>| name.is_some_and(|name| group.members.split(',').any(|member| member == name));
    let mut extra: Vec<u32> =
        groups(group).filter(lists).map(|group| group.gid).filter(|id| *id != gid).collect();
    extra.sort_unstable();
    extra.dedup();
    Ok(User { uid, gid, groups: extra, home })
}

/// A number that is an id, `None` for a name. The kernel keeps the last value for "no change".
fn id(text: &str) -> Result<Option<u32>> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    let id: u32 = text
        .parse()
        .ok()
        .filter(|id| *id != u32::MAX)
        .with_context(|| format!("{text} is not a valid id"))?;
    Ok(Some(id))
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some(Account {
            name,
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: fields.nth(1).unwrap_or(""),
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Group { name, gid: gid.parse().ok()?, members: fields.next().unwrap_or("") })
    })
}

/// Whether a text can be a user at all; said before anything is started.
pub(crate) fn check(text: &str) -> Result<String> {
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    ensure!(!user.is_empty(), "a user is UID, UID:GID, NAME or NAME:GROUP");
    id(user)?;
    id(group).map(drop).or_else(|error| if group.is_empty() { Ok(()) } else { Err(error) })?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:100::/home/app:\nnohome:x:7:7\n#c:x:y:z\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:app\nwheel:x:10:root,app\naudio:x:29:app,other\nbad:x\n";

    #[test]
    fn names_and_numbers() {
        let home = |home: &str| home.to_owned();
        for (text, uid, gid, groups, at) in [
            ("", 0, 0, vec![10], "/root"),
            ("0", 0, 0, vec![10], "/root"),
            ("root", 0, 0, vec![10], "/root"),
            ("app", 1000, 100, vec![10, 29], "/home/app"),
            ("1000", 1000, 100, vec![10, 29], "/home/app"),
            ("app:wheel", 1000, 10, vec![], "/home/app"),
            ("app:5", 1000, 5, vec![], "/home/app"),
            ("app:", 1000, 100, vec![10, 29], "/home/app"),
            ("4321", 4321, 0, vec![], "/"),
            ("4321:4322", 4321, 4322, vec![], "/"),
            ("nohome", 7, 7, vec![], "/"),
        ] {
            let user = lookup(text, PASSWD, GROUP).unwrap();
            assert_eq!(user, User { uid, gid, groups, home: home(at) }, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_resolved() {
        for text in ["nobody", "app:nogroup", "4294967295", "99999999999", "1:4294967295", "-1"] {
            assert!(lookup(text, PASSWD, GROUP).is_err(), "{text}");
        }
        assert_eq!(lookup("1:2", "", "").unwrap().gid, 2);
    }

    #[test]
    fn texts_are_checked_early() {
        assert!(check(":5").is_err());
        assert!(check("99999999999").is_err());
        assert!(check("1:99999999999").is_err());
        assert!(check("name:group").is_ok() && check("1:").is_ok());
    }
}
