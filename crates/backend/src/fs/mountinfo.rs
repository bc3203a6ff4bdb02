//! The one question to `/proc/self/mountinfo`.

use std::path::Path;

/// Whether the mount on which `path` (absolute, without links) lies is shared, so that later mounts below it reach slaves.
pub(crate) fn is_shared(mountinfo: &str, path: &Path) -> bool {
    let mut found = (0, false);
    for line in mountinfo.lines() {
        // id parent major:minor root mountpoint options optional-fields... - type source super-options
        let mut fields = line.split(' ').skip(4);
        let Some(point) = fields.next().map(unescape) else { continue };
        let shared =
            fields.skip(1).take_while(|field| *field != "-").any(|field| field.starts_with("shared:"));
        // The deepest mount point counts; of several on one point, the last.
        if path.starts_with(&point) && point.len() >= found.0 {
            found = (point.len(), shared);
        }
    }
    found.1
}

/// Blanks and backslashes are written as three octal digits.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
21 20 0:20 / /run rw,nosuid shared:5 master:2 - tmpfs tmpfs rw
22 21 0:21 / /run/slave rw master:7 - tmpfs tmpfs rw
23 21 0:22 / /run/with\\040blank rw - tmpfs tmpfs rw
24 21 0:23 / /run/twice rw - tmpfs tmpfs rw
25 24 0:24 / /run/twice rw shared:9 - tmpfs tmpfs rw
";

    #[test]
    fn the_deepest_and_latest_mount_decides() {
        for (path, shared) in [
            ("/home", true),
            ("/run/x", true),
            ("/run/slave/x", false),
            ("/run/slavery", true),
            ("/run/with blank", false),
            ("/run/twice/x", true),
        ] {
            assert_eq!(is_shared(TABLE, Path::new(path)), shared, "{path}");
        }
        assert!(!is_shared("", Path::new("/")));
    }
}
